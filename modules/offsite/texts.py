"""The owner's side of generation: texts that are being written, with keys and values of the owner's layers kept for each."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from ...errors import InputError
from .owner import OwnerLayers, UnknownStep, in_place
from .prefix import Prefix
from .split import with_virtual


@dataclass(eq=False)
class _Text:
    length: int
    prefix: Prefix | None
    cache: Cache
    tokens: int = 0  # in the cache, without virtual positions
    last: tuple[int, int, Tensor, dict[str, Tensor]] | None = None  # the call answered last: place, top, states, and the answer
    touched: float = 0.0


class OwnerTexts:
    """Texts of several parties, continued one call at a time.

    Args:
        layers: The owner's layers.
        most_texts: Texts at once, of each party; the one that was silent longest makes room.
        most_tokens: Of a text, with its virtual positions.

    Raises:
        InputError: If a bound is below 1.
    """

    def __init__(self, layers: OwnerLayers, *, most_texts: int = 4, most_tokens: int = 8192) -> None:
        for name, value in {"most_texts": most_texts, "most_tokens": most_tokens}.items():
            if value < 1:
                raise InputError(f"{name}={value} leaves no text. Legal: 1 or more.")
        self.layers, self.most_texts, self.most_tokens = layers, most_texts, most_tokens
        self._texts: dict[tuple[str, int], _Text] = {}

    def open(self, party: str, text: int, length: int, prefix: Prefix | None) -> None:
        """Begin a text; one of the same number is dropped.

        Args:
            party: Its name.
            text: Number of the text.
            length: See ``OwnerLayers.begin``.
            prefix: See there.

        Raises:
            InputError: If the prefix does not fit the layers.
        """
        layers = self.layers
        if prefix is not None and prefix.settings.length != length:
            raise InputError(f"length={length}, but the prefix has {prefix.settings.length} rows.")
        with layers.turns.of(party):
            with in_place(layers.part, prefix):
                pass  # it fits
            self._forget_old()
            self._texts.pop((party, text), None)
            own = [key for key in self._texts if key[0] == party]
            if len(own) >= self.most_texts:
                del self._texts[min(own, key=lambda key: self._texts[key].touched)]
            prefix = None if prefix is None else prefix.to(layers.device)
            self._texts[party, text] = _Text(length, prefix, layers.part.new_cache(), touched=layers.clock())

    def extend(self, party: str, text: int, place: int, states: Tensor, *, top: int = 0) -> dict[str, Tensor]:
        """Go on with a text.

        Args:
            party: Its name.
            text: Of ``open``.
            place: Tokens of the text that were sent before.
            states: Of its next tokens [1, tokens, hidden size]; at place 0 with virtual positions only where ``open`` says so.
            top: Of a head that the owner keeps: how many ids of the next token are wanted; 0 asks for states.

        Returns:
            ``states`` of the last token [1, 1, hidden size]; or ``ids`` [top], the most likely first, and their ``logits`` [top].

        Raises:
            UnknownStep: If the text is not known, or is not as long as ``place``: send it from its begin on.
            InputError: If it is too long, or ``top`` is no number of ids.
        """
        layers = self.layers
        width, vocabulary = int(layers.part.body.config.hidden_size), int(layers.part.body.config.vocab_size)
        if not 0 <= top <= vocabulary:
            raise InputError(f"top={top} is no number of ids. Legal: 0 to {vocabulary}.")
        with layers.turns.of(party), torch.inference_mode():
            self._forget_old()
            known = self._texts.get((party, text))
            if known is None:
                raise UnknownStep(f"text={text} was not begun, or is forgotten. Send it from its begin on.")
            known.touched = layers.clock()
            virtual = known.length if place == 0 and layers.brings_virtual_states(known.prefix) else 0
            tokens = states.shape[1] - virtual if states.dim() == 3 else 0
            if tokens < 1 or len(states) != 1 or states.shape[2] != width:
                raise InputError(f"The states have the shape {list(states.shape)}. Legal: [1, tokens, {width}].")
            states = states.to(next(layers.part.parameters()))
            if known.last is not None and known.last[:2] == (place, top) and torch.equal(known.last[2], states):
                return known.last[3]
            if place != known.tokens:
                raise UnknownStep(f"text={text} has {known.tokens} tokens here, not {place}. Send it from its begin on.")
            if known.length + place + tokens > self.most_tokens:
                raise InputError(f"text={text} is longer than the owner's limit of {self.most_tokens} tokens.")
            del self._texts[party, text]  # if this fails, its cache is of no use
            answer = self._answer(known, states, place, top)
            self._texts[party, text] = known
            known.tokens, known.last = place + tokens, (place, top, states, answer)
            return answer

    def _answer(self, known: _Text, states: Tensor, place: int, top: int) -> dict[str, Tensor]:
        part, length = self.layers.part, known.length
        if place == 0 and length and not self.layers.brings_virtual_states(known.prefix):
            states = with_virtual(states, length)
        begin = 0 if place == 0 else length + place
        positions = torch.arange(begin, begin + states.shape[1], device=states.device)[None]
        with in_place(part, known.prefix if place == 0 else None):  # behind the first tokens, the prefix is in the cache
            last = part(states, position_ids=positions, cache=known.cache)[:, -1:]
        if not top:
            return {"states": last}
        logits, ids = part.logits(last)[0, 0].float().topk(top)
        return {"ids": ids, "logits": logits}

    def forget_old(self) -> None:
        """Drop texts that were silent for too long; calls do so by themselves."""
        with self.layers.turns.of(""):
            self._forget_old()

    def _forget_old(self) -> None:
        old = self.layers.clock() - self.layers.lifetime
        for key in [key for key, text in self._texts.items() if text.touched < old]:
            del self._texts[key]
