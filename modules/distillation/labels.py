"""Compressed soft labels: what is kept of a teacher's distribution, and how it is selected."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

Selection = Literal["fixed", "adaptive", "sampled", "random", "full"]

_SAMPLED_LOGITS = 1 << 22  # of whole rows that exist at the same time where labels are sampled

# Rows whose threshold is not reached within this many labels are selected again by a full sort.
_FIRST_LOOK = 512


@dataclass(frozen=True)
class LabelSettings:
    """How the labels of a token are chosen from the teacher's distribution.

    Args:
        selection: ``fixed`` keeps the ``k`` most likely tokens; ``adaptive`` the fewest whose probabilities add up to
            ``threshold``; ``sampled`` keeps every probability p >= ``theta``, and each smaller one with probability
            p / ``theta`` at the value ``theta``, by systematic sampling; ``random`` draws ``k`` times with replacement and
            keeps how often each token came (Sparse Logit Sampling, arXiv 2503.16870). The last two are unbiased: the
            expected gradient of forward KL at temperature 1 is that of the whole distribution. ``full`` keeps the whole
            distribution (online distillation only, it is never stored).
        k: Number of labels kept by ``fixed``, the cap of ``adaptive`` (None: no cap), the draws of ``random``; the default is 50.
        threshold: Probability mass that ``adaptive`` keeps, in (0, 1].
        theta: Probability from which on ``sampled`` keeps all, in (0, 0.5].
        temperature: The teacher's logits are divided by it before the softmax; training uses the same one.
    """

    selection: Selection = "fixed"
    k: int | None = 50
    threshold: float = 0.95
    temperature: float = 1.0
    theta: float = 0.025

    @property
    def unbiased(self) -> bool:
        """Whether kept probabilities are samples that are right on average, and nothing is left for a tail."""
        return self.selection in ("sampled", "random")

    @property
    def floor(self) -> float:
        """The value of the probabilities that ``sampled`` drew: ``theta`` as bfloat16 writes it; 0 for the others."""
        return float(torch.tensor(self.theta).bfloat16()) if self.selection == "sampled" else 0.0

    def identity(self) -> dict[str, Any]:
        """Return the settings that the labels depend on, by name."""
        fields = {
            name: float(value) if name in ("threshold", "temperature", "theta") else value for name, value in asdict(self).items()
        }
        if self.selection != "sampled":
            del fields["theta"]
        return fields

    def check(self, vocabulary: int | None = None) -> None:
        """Raise an InputError that names the setting which is out of range.

        Args:
            vocabulary: Size of the teacher's vocabulary, where it is known already.
        """
        if self.selection not in get_args(Selection):
            raise InputError(f"selection={self.selection!r} is unknown. Legal: {', '.join(get_args(Selection))}.")
        if self.selection in ("fixed", "random") and self.k is None:
            raise InputError(
                f"k=None is no number of labels: selection={self.selection!r} needs k >= 1; 'adaptive' takes no cap."
            )
        if self.selection == "random" and not 2 <= (self.k or 0) <= 256:
            raise InputError(
                f"k={self.k} draws of selection='random': counts of more than 256 cannot be told apart. Legal: 2 to 256."
            )
        if self.k is not None and self.k < 1:
            raise InputError(f"k={self.k} keeps no label. Legal: 1 up to the vocabulary's size.")
        ranked = self.selection in ("fixed", "adaptive") and self.k is not None
        if ranked and vocabulary is not None and (self.k or 0) > vocabulary:
            raise InputError(f"k={self.k} is larger than the teacher's vocabulary. Legal: 1 to {vocabulary}.")
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold={self.threshold} is no probability mass. Legal: above 0, up to 1.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be above 0; 1 leaves the distribution as it is.")
        if not 1e-4 <= self.theta <= 0.5:
            raise InputError(f"theta={self.theta} is no probability to sample below. Legal: 0.0001 to 0.5.")
        if self.unbiased and self.temperature != 1.0:
            raise InputError(
                f"temperature={self.temperature} with selection={self.selection!r}: sampled labels are right on average for the "
                "teacher's own probabilities only. Use temperature=1, or selection='fixed' or 'adaptive'."
            )


@dataclass
class SoftLabels:
    """Kept labels of N tokens, padded to the K of the token with the most.

    Args:
        ids: Token ids in order of falling probability [N, K], int32; the padding is -1.
        probabilities: Their probabilities [N, K], bfloat16, as stored; the padding is 0.
        tail: Probability of all tokens that were not kept (of all that were sampled, where labels are) [N], bfloat16.
        realised: Log-probability (nats) that the teacher gives the text's own next token [N], bfloat16.
        temperature: Temperature of the teacher's softmax.
        unbiased: Whether the probabilities are samples; see ``LabelSettings.unbiased``.
        chunk_tokens: With labels of another tokenizer: how many tokens the chunk has that begins at this one, 0 where none does
            [N], int32; see ``chunk_loss``.
        chunk_log_probability: Log-probability (nats) that the teacher gives the text of that chunk [N], float32.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor
    realised: Tensor
    temperature: float = 1.0
    unbiased: bool = False
    chunk_tokens: Tensor | None = None
    chunk_log_probability: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def counts(self) -> Tensor:
        """Number of labels kept for each token [N], int64."""
        return (self.ids >= 0).sum(dim=1)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SoftLabels":
        """Return the same labels on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def to_type(self, dtype: torch.dtype) -> "SoftLabels":
        """Return the same labels with probabilities of another type."""
        return self._map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    def where(self, rows: "slice | Tensor") -> "SoftLabels":
        """Return the labels of some tokens, given as a slice, a mask [N] or indices."""
        return self._map(lambda part: part[rows])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SoftLabels":
        return replace(
            self,
            ids=change(self.ids),
            probabilities=change(self.probabilities),
            tail=change(self.tail),
            realised=change(self.realised),
            chunk_tokens=None if self.chunk_tokens is None else change(self.chunk_tokens),
            chunk_log_probability=None if self.chunk_log_probability is None else change(self.chunk_log_probability),
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
            parts[0].unbiased,
            _joined([part.chunk_tokens for part in parts]),
            _joined([part.chunk_log_probability for part in parts]),
        )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None


@torch.no_grad()
def select_labels(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: LabelSettings,
    *,
    chances: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
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
        chances: Random numbers in [0, 1), one per token and draw [N, draws], where labels are sampled; see ``sampling_chances``.
        dtype: Of what is returned; bfloat16 is what stores hold.
        chunk_tokens: Tokens worked on at the same time.
        chunk_vocabulary: Vocabulary entries whose logits exist at the same time; all, of fewer tokens, where labels are sampled.

    Returns:
        The kept labels; ``probabilities`` are those of the full softmax, rounded to ``dtype``.
    """
    settings.check(weight.shape[0])
    if not len(labels):
        nothing = torch.empty(0, device=weight.device, dtype=dtype)
        return SoftLabels(nothing[:, None].int(), nothing[:, None], nothing, nothing, settings.temperature, settings.unbiased)
    hidden_states = hidden_states.to(weight.dtype)
    if settings.unbiased:
        assert chances is not None
        step = max(1, min(chunk_tokens, max(64, _SAMPLED_LOGITS // weight.shape[0])))
        pieces = [slice(start, start + step) for start in range(0, len(labels), step)]
        parts = [
            _sample_chunk(hidden_states[rows], weight, labels[rows], settings, chances[rows].to(weight.device)) for rows in pieces
        ]
        return SoftLabels.concatenate(parts).to_type(dtype)
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
    return SoftLabels.concatenate(parts).to_type(dtype)


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
        probabilities,
        tail.float(),
        realised - log_normaliser,
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


def _sample_chunk(hidden_states: Tensor, weight: Tensor, labels: Tensor, settings: LabelSettings, chances: Tensor) -> SoftLabels:
    """Sample the labels of a few tokens, whose logits all exist."""
    log_p = torch.mm(hidden_states, weight.t()).float()
    log_p -= log_p.logsumexp(dim=1, keepdim=True)
    realised = log_p.gather(1, labels[:, None])[:, 0]
    p = log_p.exp_()
    tail = torch.zeros_like(realised)
    if settings.selection == "sampled":
        likely = p >= settings.floor
        tail = p.masked_fill(likely, 0).double().sum(dim=1)
        # Systematic sampling: of marks one theta apart, the first at random, each takes the token on whose stretch it falls.
        marks = (p.masked_fill(likely, 0).cumsum(dim=1, dtype=torch.float64) / settings.floor + chances).floor_()
        drawn = marks.diff(dim=1, prepend=torch.zeros_like(marks[:, :1])) > 0
        rows, ids = (likely | drawn).nonzero(as_tuple=True)
        values = p[rows, ids].clamp(min=settings.floor)
    else:
        places = p.cumsum(dim=1, dtype=torch.float64)
        drawn_ids = torch.searchsorted(places, chances * places[:, -1:]).clamp_(max=p.shape[1] - 1)
        owners = torch.arange(len(p), device=p.device)[:, None] * p.shape[1]
        flat, times = torch.unique(owners + drawn_ids, return_counts=True)
        rows, ids, values = flat // p.shape[1], flat % p.shape[1], times.float() / chances.shape[1]
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=len(p))
    kept = torch.arange(int(counts.max()), device=p.device) < counts[:, None]
    shape = (len(p), kept.shape[1])
    return SoftLabels(
        torch.full(shape, -1, dtype=torch.int32, device=p.device).masked_scatter_(kept, ids[order].int()),
        torch.zeros(shape, device=p.device).masked_scatter_(kept, values[order]),
        tail.float(),
        realised,
        settings.temperature,
        unbiased=True,
    )


def sampling_chances(ids: Tensor, positions: Tensor, supervised: Tensor, settings: LabelSettings) -> Tensor | None:
    """Return the random numbers that a batch's labels are sampled by; None for selections that do not sample.

    They depend on a sequence alone, up to its last supervised token and not on padding, so that capture and online distillation
    draw the same, in any batch.

    Args:
        ids: Token ids [batch, length].
        positions: Within documents [batch, length].
        supervised: Which tokens have a successor to predict [batch, length].
        settings: What to keep.

    Returns:
        float64 [supervised tokens, 1] for ``sampled``, [supervised tokens, k] for ``random``.
    """
    if not settings.unbiased:
        return None
    draws = settings.k or 1 if settings.selection == "random" else 1
    parts = []
    for row, mask in enumerate(supervised.cpu()):
        count = int(mask.sum())
        stop = int(mask.nonzero().max()) + 2 if count else 0
        content = torch.stack([ids[row, :stop], positions[row, :stop]]).cpu().numpy().astype("<i8").tobytes()
        seed = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
        parts.append(np.random.Generator(np.random.PCG64(seed)).random((count, draws)))
    return torch.from_numpy(np.concatenate(parts))
