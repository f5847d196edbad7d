"""A cache that keeps for each key/value head what its rule still lets be seen, and forgets the rest.

Heads of one rule share their memory. Which of its slots hold what is the same in all layers, and is counted once, on the CPU: a
new key takes the slot of the one that has just fallen out of sight, or a new slot where the span grows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ...errors import InputError
from .flex import attend_flex
from .rules import SpanPlan, SpanRule, groups_of, growth
from .windows import HIDDEN, attend, attend_in_blocks


@dataclass
class Turn:
    """What happens to the slots of a rule when some tokens come.

    Args:
        seen: Tokens before them.
        queries: Positions of the new tokens [rows, tokens].
        keys: Positions of what is held and of the new tokens [rows, held + tokens]; of the slots, where ``slots`` is given.
        slots: Slot of the one new token [rows], or None where many came.
        grow: Slots to add first.
        used: Slots that are in use afterwards.
        visible: What the one new token sees of the slots [rows, used]; None for everything.
        kept: Of what was held and the new tokens, what is kept [rows, used], where many came.
    """

    seen: int
    queries: np.ndarray
    keys: np.ndarray
    slots: np.ndarray | None = None
    grow: int = 0
    used: int = 0
    visible: np.ndarray | None = None
    kept: np.ndarray | None = None


class Slots:
    """Which positions the slots of a rule hold, for all layers.

    Args:
        rule: Of the heads.
        sink: First positions that are always kept.
    """

    def __init__(self, rule: SpanRule, sink: int) -> None:
        self.rule, self.sink = rule, sink
        self.positions = np.zeros((1, 0), np.int64)  # [rows, used slots]
        self.capacity = 0
        self._turn: Turn | None = None

    def advance(self, seen: int, new: np.ndarray, upcoming: np.ndarray) -> Turn:
        """Make room for new tokens and forget what they put out of sight; the same call of another layer gets the same turn.

        Args:
            seen: Tokens before them.
            new: Positions of the new tokens [rows, tokens]; below 0 for padding.
            upcoming: Position of the token after them [rows].
        """
        if self._turn is not None and self._turn.seen == seen and self._turn.queries.shape[1] == new.shape[1]:
            return self._turn
        if len(new) > len(self.positions):
            self.positions = np.repeat(self.positions, len(new), axis=0)
        one = new.shape[1] == 1 and self.positions.shape[1] > 0
        self._turn = self._one(seen, new) if one else self._many(seen, new, upcoming)
        return self._turn

    def _seen_from(self, query: np.ndarray, keys: np.ndarray) -> np.ndarray:
        span = np.maximum(self.rule.least, self.rule.alpha + np.floor(self.rule.beta * (query + 1)).astype(np.int64))
        return (keys >= 0) & ((keys < self.sink) | (query - keys < span))

    def _one(self, seen: int, new: np.ndarray) -> Turn:
        visible = self._seen_from(new, self.positions)
        free = ~visible
        slots = free.argmax(axis=1)
        slots[~free.any(axis=1)] = self.positions.shape[1]
        grow = 0
        if (slots == self.positions.shape[1]).any():
            pad = ((0, 0), (0, 1))
            self.positions = np.pad(self.positions, pad, constant_values=HIDDEN)
            visible = np.pad(visible, pad)
            if self.positions.shape[1] > self.capacity:
                grow = growth(self.capacity)
                if self.rule.beta == 0:  # it grows no further
                    grow = max(1, min(grow, self.sink + self.rule.span(0) - self.capacity))
                self.capacity += grow
        rows = np.arange(len(slots))
        self.positions[rows, slots] = new[:, 0]
        visible[rows, slots] = True
        used = self.positions.shape[1]
        return Turn(seen, new, self.positions, slots, grow, used, None if visible.all() else visible)

    def _many(self, seen: int, new: np.ndarray, upcoming: np.ndarray) -> Turn:
        keys = np.concatenate([np.broadcast_to(self.positions, (len(new), self.positions.shape[1])), new], axis=1)
        keep = self._seen_from(upcoming[:, None], keys)
        used = int(keep.sum(axis=1).max())
        kept = np.argsort(~keep, axis=1, kind="stable")[:, :used]
        self.positions = np.where(np.take_along_axis(keep, kept, 1), np.take_along_axis(keys, kept, 1), HIDDEN)
        self.capacity = used
        return Turn(seen, new, keys, used=used, kept=kept)

    def select(self, rows: Tensor) -> None:
        """Take these rows [any], int64, of the batch, in this order."""
        if len(self.positions) > 1:
            self.positions = self.positions[rows.cpu().numpy()]
        self._turn = None


class Book:
    """What all layers of a cache share: the slots of each rule, and how many tokens of each row have come.

    Args:
        plan: Rules of the heads.
    """

    def __init__(self, plan: SpanPlan) -> None:
        self._plan = plan
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        rules = {rule for layer in self._plan.rules if layer is not None for rule in layer}
        self.slots = {rule: Slots(rule, self._plan.sink) for rule in rules}
        self.tokens = np.zeros(1, np.int64)  # that have come, padding left out [rows]
        self.real = np.ones((1, 0), bool)  # whether each token that has come is none of padding [rows, seen]
        self._new: tuple[int, int, np.ndarray] = (0, 0, np.zeros((1, 0), np.int64))

    def positions(self, seen: int, count: int, mask: Tensor | None) -> np.ndarray:
        """Return the positions of new tokens [rows, count], below 0 for padding; the same call of another layer gets the same.

        Args:
            seen: Tokens before them, with padding.
            count: New tokens.
            mask: False for padding, bool [batch, seen + count]; None where there is none.
        """
        if self._new[:2] == (seen, count):
            return self._new[2]
        real = np.ones((len(self.tokens), count), bool)
        if mask is not None:
            whole = mask.cpu().numpy()
            real = whole[:, seen : seen + count]
            changed = not np.array_equal(np.broadcast_to(self.real, (len(whole), seen)), whole[:, :seen])
        else:
            changed = not self.real.all()
        if changed:
            raise InputError(
                "attention_mask: tokens that came before are masked now, or no longer. A cache of spans has already forgotten "
                "what they put out of sight. Read the text again with a new cache, without what filled up texts that had ended."
            )
        places = self.tokens[:, None] + real.cumsum(axis=1)
        self._new = (seen, count, np.where(real, places - 1, HIDDEN))
        self.tokens = places[:, -1]
        self.real = np.concatenate([np.broadcast_to(self.real, (len(real), seen)), real], axis=1)
        return self._new[2]

    def select(self, rows: Tensor) -> None:
        """Take these rows [any], int64, of the batch, in this order."""
        if len(self.tokens) > 1:
            self.tokens = self.tokens[rows.cpu().numpy()]
        if len(self.real) > 1:
            self.real = self.real[rows.cpu().numpy()]
        for slots in self.slots.values():
            slots.select(rows)


class SpanLayer(CacheLayerMixin):
    """The keys and values of one layer, a piece of memory for the heads of each rule.

    ``update`` hands the layer itself to the attention function, which calls ``attend``: what is forgotten is known only there.

    Args:
        rules: Of its key/value heads.
        sink: First positions that are always kept.
        book: Shared by all layers.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, rules: tuple[SpanRule, ...], sink: int, book: Book) -> None:
        super().__init__()
        self.rules, self.sink, self.book = rules, sink, book
        # Neighbours are a slice, which copies nothing.
        self.groups = {
            rule: slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else heads
            for rule, heads in groups_of(rules).items()
        }
        self.memory: dict[SpanRule, tuple[Tensor, Tensor]] = {}  # keys and values [batch, heads of the rule, capacity, size]
        self.seen = 0
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note type and device of keys and values [batch, key/value heads, tokens, size]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new keys and values [batch, key/value heads, tokens, size]; what comes back is for ``span_attention``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        return self, self

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, *, flex: bool = False) -> Tensor:
        """Attend to what is held and to the tokens that have just come, and forget what falls out of sight.

        Args:
            query: [batch, key/value heads, group, tokens, size].
            mask: False for padding, bool [batch, seen + tokens]; None where there is none.
            scaling: Of the scores.
            flex: Read a whole text with FlexAttention.

        Returns:
            The shape of the query.
        """
        assert self._new is not None
        (keys, values), self._new = self._new, None
        count = query.shape[3]
        new = self.book.positions(self.seen, count, mask)
        whole = flex and self.seen == 0 and mask is None and count > 1
        out = attend_flex(query, keys, values, self.rules, self.sink, scaling) if whole else torch.empty_like(query)
        for rule, mine in self.groups.items():
            turn = self.book.slots[rule].advance(self.seen, new, self.book.tokens)
            key, value = keys[:, mine], values[:, mine]
            if turn.slots is not None:
                out[:, mine] = self._one(rule, turn, query[:, mine], key, value, scaling)
            else:
                key, value = self._with_held(rule, turn, key, value)
                if not whole:
                    out[:, mine] = self._many(rule, turn, query[:, mine], key, value, scaling)
                self._keep(rule, turn, key, value)
        self.seen += count
        return out

    def _one(self, rule: SpanRule, turn: Turn, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        held = self.memory[rule]
        if turn.grow:
            held = tuple(torch.nn.functional.pad(part, (0, 0, 0, turn.grow)) for part in held)  # type: ignore[assignment]
            self.memory[rule] = held
        assert turn.slots is not None
        for part, new in zip(held, (key, value)):
            if len(turn.slots) == 1:
                part[:, :, int(turn.slots[0])] = new[:, :, 0]
            else:
                part[torch.arange(len(part)), :, torch.from_numpy(turn.slots).to(part.device)] = new[:, :, 0]
        allowed = None if turn.visible is None else torch.from_numpy(turn.visible).to(query.device)[:, None]
        return attend(query, held[0][:, :, : turn.used], held[1][:, :, : turn.used], allowed, scaling)

    def _with_held(self, rule: SpanRule, turn: Turn, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        held = self.memory.get(rule)
        if held is None:
            return key, value
        before = turn.keys.shape[1] - key.shape[2]
        return torch.cat([held[0][:, :, :before], key], dim=2), torch.cat([held[1][:, :, :before], value], dim=2)

    def _many(self, rule: SpanRule, turn: Turn, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return attend_in_blocks(
            query,
            key,
            value,
            rule,
            self.sink,
            scaling,
            queries=torch.from_numpy(turn.queries).to(query.device),
            keys=torch.from_numpy(turn.keys).to(query.device),
            ordered=rule not in self.memory,
        )

    def _keep(self, rule: SpanRule, turn: Turn, key: Tensor, value: Tensor) -> None:
        assert turn.kept is not None
        kept = torch.from_numpy(turn.kept).to(key.device)
        if len(kept) == 1:
            self.memory[rule] = (key.index_select(2, kept[0]), value.index_select(2, kept[0]))
        else:
            places = kept[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            self.memory[rule] = (key.gather(2, places), value.gather(2, places))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length that masks have, the forgotten tokens included, and where they begin."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have come."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: it grows with the text."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.memory.clear()
        self.seen = 0

    def select(self, rows: Tensor) -> None:
        """Take these rows [any], int64, of the batch, in this order."""
        self.memory = {
            rule: tuple(part.index_select(0, rows.to(part.device)) for part in parts)  # type: ignore[misc]
            for rule, parts in self.memory.items()
        }

    def nbytes(self) -> int:
        """Return the bytes that it holds."""
        return sum(part.numel() * part.element_size() for parts in self.memory.values() for part in parts)


class SpanCache(Cache):
    """The cache of a model with a plan of spans; layers with their own attention have their own.

    Args:
        plan: Rules of the heads.
        config: Of the model.

    Raises:
        InputError: If the plan is for another model.
    """

    def __init__(self, plan: SpanPlan, config: PreTrainedConfig) -> None:
        plan.check(config)
        self.book = Book(plan)
        layers: list[Any] = DynamicCache(config=config).layers
        for number, rules in enumerate(plan.rules):
            if rules is not None:
                layers[number : number + 1] = [SpanLayer(rules, plan.sink, self.book)]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Return the bytes of all keys and values that it holds."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, SpanLayer):
                total += layer.nbytes()
            elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                total += int(layer.keys.nbytes + layer.values.nbytes)
        return total

    def _select(self, rows: Tensor) -> None:
        self.book.select(rows)
        for layer in self.layers:
            if isinstance(layer, SpanLayer):
                layer.select(rows)
            elif isinstance(layer, DynamicLayer):
                layer.batch_select_indices(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams that were kept [batch], int64."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows [any], int64, of the batch."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        batch = next(
            len(part)
            for layer in self.layers
            if isinstance(layer, SpanLayer)
            for parts in layer.memory.values()
            for part in parts
        )
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.book.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what has been forgotten cannot be had back.

        Raises:
            InputError: Always.
        """
        raise InputError("A cache of spans cannot take tokens back, as assisted generation would need. Generate without a draft.")
