"""A split model at a party: its own layers, and behind them one layer that stands for all of the owner's."""

import copy
import logging
import random
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache, PreTrainedModel

from ...errors import InputError
from ..pretrained import CACHE
from ..student import decoder_layers
from .owner import HeadRequest, OwnerLayers, UnknownStep, brings_its_virtual_states
from .prefix import Prefix
from .split import with_noise, with_virtual, without_virtual
from .texts import OwnerTexts

log = logging.getLogger(__name__)
_REPLAYS = 5  # of one call, before an owner that forgets every time is given up


class Owner(Protocol):
    """An owner as a party sees it: ``OwnerClient`` over a network, ``LocalOwner`` in the same process."""

    def begin(self, step: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerLayers.begin``."""

    def forward(self, step: int, batch: int, states: Tensor, head: HeadRequest | None = None, *, train: bool = True) -> Tensor:
        """See ``OwnerLayers.forward``."""
        ...

    def backward(self, step: int, batch: int, gradient: Tensor, *, wanted: bool = True) -> Tensor | None:
        """See ``OwnerLayers.backward``."""
        ...

    def collect(self, step: int) -> list[Tensor]:
        """See ``OwnerLayers.collect``."""
        ...

    def open(self, text: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerTexts.open``."""

    def extend(self, text: int, place: int, states: Tensor, *, top: int = 0) -> dict[str, Tensor]:
        """See ``OwnerTexts.extend``."""
        ...


class LocalOwner:
    """An owner in the same process: the same calls and numbers, no network.

    Args:
        layers: The owner's layers.
        party: Name of the party that calls.
    """

    def __init__(self, layers: OwnerLayers, party: str = "party") -> None:
        self.layers, self.texts, self.party = layers, OwnerTexts(layers), party

    def begin(self, step: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerLayers.begin``."""
        copied = None if prefix is None else Prefix(prefix.settings, list(prefix.rows))
        self.layers.begin(self.party, step, length, copied)

    def forward(self, step: int, batch: int, states: Tensor, head: HeadRequest | None = None, *, train: bool = True) -> Tensor:
        """See ``OwnerLayers.forward``."""
        return self.layers.forward(self.party, step, batch, states, head, train=train)

    def backward(self, step: int, batch: int, gradient: Tensor, *, wanted: bool = True) -> Tensor | None:
        """See ``OwnerLayers.backward``."""
        found = self.layers.backward(self.party, step, batch, gradient)
        return found if wanted else None

    def collect(self, step: int) -> list[Tensor]:
        """See ``OwnerLayers.collect``."""
        return self.layers.collect(self.party, step)

    def open(self, text: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerTexts.open``."""
        self.texts.open(self.party, text, length, prefix)

    def extend(self, text: int, place: int, states: Tensor, *, top: int = 0) -> dict[str, Tensor]:
        """See ``OwnerTexts.extend``."""
        return self.texts.extend(self.party, text, place, states, top=top)


@dataclass(eq=False)
class _Sent:
    """A batch that was sent, until its optimizer step is over: enough to send it again."""

    states: Tensor
    head: HeadRequest | None
    gradient: Tensor | None = None


class RemoteSteps:
    """A party's calls in training, sent again to an owner that was restarted.

    An optimizer step is begun with its first batch, and anew whenever the rows have changed. Steps are counted from a random
    number on: another process with the same party's token, whatever it is doing, has other ones.

    Args:
        owner: The owner.
        length: Of the prefix.
        prefix: Rows of the owner's layers, counted from the cut on; the same parameters that are trained. None where they all
            stay with the party.
    """

    def __init__(self, owner: Owner, length: int, prefix: Prefix | None) -> None:
        self.owner, self.length, self.prefix = owner, length, prefix
        self._step = random.getrandbits(48)
        self._rows_were: list[Tensor] | None = None
        self._sent: list[_Sent] = []
        self._over = True  # what was trained on has been collected

    @property
    def rows(self) -> list[nn.Parameter]:
        """The owner's rows, which are trained at the party."""
        return [] if self.prefix is None else list(self.prefix.rows)

    def forward(self, states: Tensor, head: HeadRequest | None) -> Tensor:
        """Return what the owner computes of states [rows, length, hidden size], differentiable where gradients are wanted."""
        if torch.is_grad_enabled() and (states.requires_grad or any(rows.requires_grad for rows in self.rows)):
            return _Remote.apply(self, head, states, *self.rows)
        self._enter(training=False)
        return self._asked(lambda: self.owner.forward(self._step, 0, states, head, train=False)).to(states.device)

    def collect(self) -> None:
        """Add the gradient of the owner's rows to theirs; to be called once before each optimizer step."""
        if self._over:
            return
        for rows, gradient in zip(self.rows, self._asked(lambda: self.owner.collect(self._step)) if self.rows else []):
            gradient = gradient.to(rows)
            rows.grad = gradient if rows.grad is None else rows.grad + gradient
        self._over = True

    def send(self, states: Tensor, head: HeadRequest | None) -> tuple[int, Tensor]:
        """Return the number of a batch and what the owner computes of its states [rows, length, hidden size]."""
        self._enter(training=True)
        self._sent.append(_Sent(states, head))
        number = len(self._sent) - 1
        return number, self._asked(lambda: self.owner.forward(self._step, number, states, head))

    def back(self, number: int, gradient: Tensor, *, wanted: bool) -> Tensor | None:
        """Return the gradient of the states [rows, length, hidden size] of a batch, if it is wanted."""
        found = self._asked(lambda: self.owner.backward(self._step, number, gradient, wanted=wanted))
        self._sent[number].gradient = gradient  # only now: sent again, a batch without one is not sent back
        return found

    def _enter(self, *, training: bool) -> None:
        # Compared by value: not everything that writes into parameters counts up their version.
        same = self._rows_were is not None and all(map(torch.equal, self._rows_were, self.rows))
        if not same or (training and self._over):
            self._rows_were = [rows.detach().clone() for rows in self.rows]
            self._step, self._sent, self._over = self._step + 1, [], True
            self.owner.begin(self._step, self.length, self.prefix)
        self._over = self._over and not training

    def _asked(self, call: Any) -> Any:
        for attempt in range(_REPLAYS):
            try:
                if attempt:
                    self._again()
                return call()
            except UnknownStep as error:
                log.info("The owner has forgotten step %d; sending it again", self._step)
                lost = error
        raise lost

    def _again(self) -> None:
        self.owner.begin(self._step, self.length, self.prefix)
        for number, sent in enumerate(self._sent):
            self.owner.forward(self._step, number, sent.states, sent.head)
            if sent.gradient is not None:
                self.owner.backward(self._step, number, sent.gradient, wanted=False)


class _Remote(torch.autograd.Function):
    """What the owner computes. Its rows are inputs, so that there is a backward pass even where the states need none."""

    @staticmethod
    def forward(ctx: Any, steps: RemoteSteps, head: HeadRequest | None, states: Tensor, *rows: Tensor) -> Tensor:
        ctx.steps, ctx.like, ctx.rows = steps, states, len(rows)
        ctx.number, output = steps.send(states.detach(), head)
        return output.to(states.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found = ctx.steps.back(ctx.number, gradient.detach(), wanted=ctx.needs_input_grad[2])
        return (None, None, None if found is None else found.to(ctx.like), *[None] * ctx.rows)


class OwnersHead(nn.Module):
    """Stands for a head that the owner keeps, in generation: the ids that it names have logits, others none.

    Args:
        owners: The layer before, which the owner answers.
        vocabulary: Number of ids.
    """

    def __init__(self, owners: "OwnersLayers", vocabulary: int) -> None:
        super().__init__()
        self._owners, self._vocabulary = (owners,), vocabulary

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return logits [1, positions, vocabulary]; they are the owner's at the last position."""
        last = self._owners[0].last
        logits = torch.full((1, hidden_states.shape[1], self._vocabulary), -torch.inf, device=hidden_states.device)
        logits[0, -1, last["ids"].to(logits.device)] = last["logits"].to(logits)
        return logits


class OwnersLayers(nn.Module):
    """Stands for the owner's layers as a party's last layer, in training and in generation.

    Args:
        owner: The owner.
        layers: How many layers it has.
        length: Of the prefix; 0 without one.
        prefix: See ``RemoteSteps``.
        noise: Deviation of Gaussian noise on the states that are sent, as a share of each token's root mean square.
    """

    def __init__(self, owner: Owner, layers: int, length: int = 0, prefix: Prefix | None = None, noise: float = 0.0) -> None:
        super().__init__()
        self.owner, self.length, self.noise = owner, length, noise
        self.sends_virtual_states = brings_its_virtual_states(prefix, layers)
        """Whether states travel with their virtual positions."""
        self.steps = RemoteSteps(owner, length, prefix)
        self._prefix = (prefix,)  # in a tuple: its parameters are those of the module that trains it
        self.request: HeadRequest | None = None  # asks the owner's head in training, instead of states
        self.top = 0  # ids that are asked of the owner's head in generation; 0 asks for states
        self.answer: Tensor | None = None  # of the owner's head to ``request``
        self.last: dict[str, Tensor] = {}  # the answer about the last token, in generation
        self._text = 0
        self._sent: list[Tensor] = []  # states of the text that is being written

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """Return the states behind the owner's layers [batch, positions, hidden size]; zeros at virtual positions.

        Where the owner's head is asked, its answer is left in ``answer`` or ``last``.

        Args:
            hidden_states: Behind the party's layers [batch, positions, hidden size].
            given: What a layer of the model gets besides; with the party's own cache, a text is being written, and only its last
                state comes back.
        """
        cache: Cache | None = given.get(CACHE)
        if cache is not None:
            return self._written(hidden_states, cache.get_seq_length() - hidden_states.shape[1])
        found = self.steps.forward(self._travelling(hidden_states), self.request)
        if self.request is not None:
            self.answer = found
            return hidden_states  # not read by anyone
        found = found.to(hidden_states.dtype)
        return with_virtual(found, self.length) if self.length else found

    def _travelling(self, states: Tensor) -> Tensor:
        return with_noise(states if self.sends_virtual_states else without_virtual(states, self.length), self.noise)

    def _written(self, states: Tensor, place: int) -> Tensor:
        if len(states) != 1:
            raise InputError(f"{len(states)} texts at once cannot be written through a split. Legal: one.")
        if place == 0:
            self._text, self._sent = random.getrandbits(48), []
            self.owner.open(self._text, self.length, self._prefix[0])
            sent = self._travelling(states)
        else:
            sent = with_noise(states, self.noise)
        # As many as were sent before; the first ones with their virtual positions, where those travel.
        before = sum(part.shape[1] for part in self._sent) - (self.length if place and self.sends_virtual_states else 0)
        self._sent.append(sent)
        for attempt in range(_REPLAYS):
            try:
                if attempt:
                    self.owner.open(self._text, self.length, self._prefix[0])
                    before, sent = 0, torch.cat(self._sent, dim=1)
                self.last = self.owner.extend(self._text, before, sent, top=self.top)
                break
            except UnknownStep:
                log.info("The owner has forgotten the text; sending it again")
                if attempt == _REPLAYS - 1:
                    raise
        if "states" not in self.last:
            return states  # the owner's head has spoken: nothing here is read
        return torch.cat([torch.zeros_like(states[:, 1:]), self.last["states"].to(states)], dim=1)


def split_model(model: PreTrainedModel, cut: int, owners: OwnersLayers) -> PreTrainedModel:
    """Return a model, changed in place, whose layers from the cut on are the owner's.

    Args:
        model: An emulator, whose first layers, embedding and head are those of the owner's model.
        cut: The owner's first layer.
        owners: Stands for the owner's.

    Raises:
        InputError: If the model has not so many layers.
    """
    layers = decoder_layers(model)
    if not 1 <= cut <= len(layers):
        raise InputError(f"cut={cut}: the emulator has {len(layers)} layers. Legal: 1 to {len(layers)}.")
    base: Any = model.base_model
    whole = model.config
    config = copy.deepcopy(whole)
    config.num_hidden_layers = cut + 1
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types[:cut], config.layer_types[cut - 1]]
    base.layers = nn.ModuleList([*layers[:cut], owners])
    part: Any
    for part in model.modules():
        if getattr(part, "config", None) is whole:
            part.config = config
    return model
