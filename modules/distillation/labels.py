"""Compressed soft labels: what is kept of a teacher's distribution, and how it is selected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError

Selection = Literal["fixed", "adaptive", "full"]

# Rows whose threshold is not reached within this many labels are selected again by a full sort.
_FIRST_LOOK = 512


@dataclass(frozen=True)
class LabelSettings:
    """How the labels of a token are chosen from the teacher's distribution.

    Args:
        selection: ``fixed`` keeps the ``k`` most likely tokens; ``adaptive`` the fewest whose probabilities add up to
            ``threshold``; ``full`` keeps the whole distribution (online distillation only, it is never stored).
        k: Number of labels kept by ``fixed``, and the cap of ``adaptive`` (None: no cap); the default is 50.
        threshold: Probability mass that ``adaptive`` keeps, in (0, 1].
        temperature: The teacher's logits are divided by it before the softmax; training uses the same one.
    """

    selection: Selection = "fixed"
    k: int | None = 50
    threshold: float = 0.95
    temperature: float = 1.0

    def check(self, vocabulary: int | None = None) -> None:
        """Raise an InputError that names the setting which is out of range.

        Args:
            vocabulary: Size of the teacher's vocabulary, where it is known already.
        """
        if self.selection not in ("fixed", "adaptive", "full"):
            raise InputError(f"selection={self.selection!r} is unknown. Legal: fixed, adaptive, full.")
        if self.selection == "fixed" and self.k is None:
            raise InputError("k=None is no number of labels: selection='fixed' needs k >= 1; 'adaptive' takes no cap.")
        if self.k is not None and self.k < 1:
            raise InputError(f"k={self.k} keeps no label. Legal: 1 up to the vocabulary's size.")
        if self.k is not None and vocabulary is not None and self.k > vocabulary:
            raise InputError(f"k={self.k} is larger than the teacher's vocabulary. Legal: 1 to {vocabulary}.")
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold={self.threshold} is no probability mass. Legal: above 0, up to 1.")
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} must be above 0; 1 leaves the distribution as it is.")


@dataclass
class SoftLabels:
    """Kept labels of N tokens, padded to the K of the token with the most.

    Args:
        ids: Token ids in order of falling probability [N, K], int32; the padding is -1.
        probabilities: Their probabilities [N, K], bfloat16, as stored; the padding is 0.
        tail: Probability of all tokens that were not kept [N], bfloat16.
        realised: Log-probability (nats) that the teacher gives the text's own next token [N], bfloat16.
        temperature: Temperature of the teacher's softmax.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor
    realised: Tensor
    temperature: float = 1.0

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def counts(self) -> Tensor:
        """Number of labels kept for each token [N], int64."""
        return (self.ids >= 0).sum(dim=1)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SoftLabels":
        """Return the same labels on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def where(self, rows: "slice | Tensor") -> "SoftLabels":
        """Return the labels of some tokens, given as a slice, a mask [N] or indices."""
        return self._map(lambda part: part[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SoftLabels":
        return SoftLabels(
            change(self.ids), change(self.probabilities), change(self.tail), change(self.realised), self.temperature
        )

    @staticmethod
    def concatenate(parts: "list[SoftLabels]") -> "SoftLabels":
        """Join labels of several groups of tokens, padding to the widest."""
        width = max(part.ids.shape[1] for part in parts)

        def widened(tensor: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

        return SoftLabels(
            torch.cat([widened(part.ids, -1) for part in parts]),
            torch.cat([widened(part.probabilities, 0) for part in parts]),
            torch.cat([part.tail for part in parts]),
            torch.cat([part.realised for part in parts]),
            parts[0].temperature,
        )


@torch.no_grad()
def select_labels(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: LabelSettings,
    *,
    chunk_tokens: int = 256,
    chunk_vocabulary: int = 16384,
) -> SoftLabels:
    """Select the labels of every token from the teacher's final hidden states.

    The logits are made and read in chunks of tokens and of the vocabulary, so that [tokens, vocabulary] never exists.

    Args:
        hidden_states: The teacher's final hidden states [N, hidden size].
        weight: Weight of its language-model head [vocabulary, hidden size].
        labels: The text's next token of each [N], int64.
        settings: What to keep.
        chunk_tokens: Tokens worked on at the same time.
        chunk_vocabulary: Vocabulary entries whose logits exist at the same time.

    Returns:
        The kept labels; ``probabilities`` are those of the full softmax, rounded to bfloat16.
    """
    settings.check(weight.shape[0])
    if not len(labels):
        nothing = torch.empty(0, device=weight.device, dtype=torch.bfloat16)
        return SoftLabels(nothing[:, None].int(), nothing[:, None], nothing, nothing, settings.temperature)
    hidden_states = hidden_states.to(weight.dtype)
    buffer = torch.empty(
        min(chunk_tokens, len(labels)),
        min(chunk_vocabulary, weight.shape[0]),
        device=weight.device,
        dtype=torch.float32,
    )
    look = min(settings.k or weight.shape[0], _FIRST_LOOK if settings.selection == "adaptive" else weight.shape[0])
    parts = [
        _select_chunk(
            hidden_states[start : start + chunk_tokens],
            weight,
            labels[start : start + chunk_tokens],
            settings,
            buffer,
            look,
        )
        for start in range(0, len(labels), chunk_tokens)
    ]
    return SoftLabels.concatenate(parts)


def _select_chunk(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, settings: LabelSettings, buffer: Tensor, look: int
) -> SoftLabels:
    """Select among the ``look`` most likely tokens; rows for which these are too few are looked at again."""
    tokens, vocabulary, step = len(labels), weight.shape[0], buffer.shape[1]
    maxima, totals, values, ids = [], [], [], []
    realised = torch.empty(tokens, device=weight.device)
    for start in range(0, vocabulary, step):
        part = weight[start : start + step]
        logits = buffer[:tokens, : len(part)]
        logits.copy_(torch.mm(hidden_states, part.t()))
        if settings.temperature != 1.0:
            logits.div_(settings.temperature)
        here = (labels >= start) & (labels < start + len(part))
        chosen = logits.gather(1, (labels - start).clamp(0, len(part) - 1)[:, None])[:, 0]
        realised = torch.where(here, chosen, realised)
        top = logits.topk(min(look, len(part)), dim=1)
        values.append(top.values)
        ids.append(top.indices + start)
        maxima.append(top.values[:, 0])
        totals.append(logits.sub_(top.values[:, :1]).exp_().sum(dim=1))
    maximum = torch.stack(maxima).amax(dim=0)
    total = sum(part_total * (part_max - maximum).exp() for part_total, part_max in zip(totals, maxima))
    assert isinstance(total, Tensor)
    log_normaliser = maximum + total.log()
    best = torch.cat(values, dim=1).topk(look, dim=1)
    kept_ids = torch.cat(ids, dim=1).gather(1, best.indices)
    probabilities = (best.values - log_normaliser[:, None]).exp()
    short = torch.zeros(tokens, dtype=torch.bool, device=weight.device)
    if settings.selection == "adaptive":
        mass = probabilities.double().cumsum(dim=1)
        if look < min(settings.k or vocabulary, vocabulary):
            short = mass[:, -1] < settings.threshold
        # A label is needed while the mass before it is below the threshold.
        unneeded = (mass - probabilities) >= settings.threshold
        unneeded[:, 0] = False
        width = int((~unneeded).sum(dim=1).max())
        probabilities = probabilities.masked_fill(unneeded, 0)[:, :width]
        kept_ids = kept_ids.masked_fill(unneeded, -1)[:, :width]
    tail = (1 - probabilities.double().sum(dim=1)).clamp_(min=0)
    selected = SoftLabels(
        kept_ids.int(),
        probabilities.bfloat16(),
        tail.bfloat16(),
        (realised - log_normaliser).bfloat16(),
        settings.temperature,
    )
    if not short.any():
        return selected
    again = _select_chunk(
        hidden_states[short],
        weight,
        labels[short],
        settings,
        buffer,
        min(8 * look, settings.k or vocabulary, vocabulary),
    )
    rows = torch.arange(tokens, device=weight.device)
    order = torch.cat([rows[~short], rows[short]]).argsort()
    return SoftLabels.concatenate([selected.where(~short), again]).where(order)
