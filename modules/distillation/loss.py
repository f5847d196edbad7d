"""Divergences of a student from a teacher, on kept labels or on the full vocabulary, for ``linear_loss``."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import InputError
from .labels import LabelSettings, SoftLabels

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "uld"]
Remainder = Literal["tail_bucket", "text_tail", "renormalize"]

_TINY = 1e-7  # below this, 1 - sum(q) is rounding noise in float32


def check_divergence(divergence: str, remainder: str, settings: LabelSettings | None = None) -> None:
    """Raise an InputError for a name that is unknown, a pair that has no finite value, or labels that are wrong for it.

    Args:
        divergence: ``forward_kl``, ``reverse_kl``, ``jensen_shannon`` or ``uld``.
        remainder: ``tail_bucket``, ``text_tail`` or ``renormalize``.
        settings: How the labels are selected, where it is known already.
    """
    for name, value, legal in (
        ("divergence", divergence, get_args(Divergence)),
        ("remainder", remainder, get_args(Remainder)),
    ):
        if value not in legal:
            raise InputError(f"{name}={value!r} is unknown. Legal: {', '.join(legal)}.")
    if divergence == "reverse_kl" and remainder == "renormalize":
        raise InputError(
            "divergence='reverse_kl' is infinite with remainder='renormalize', which gives every token that was not kept "
            "the probability 0. Use remainder='tail_bucket', or forward_kl or jensen_shannon."
        )
    if remainder == "text_tail" and divergence != "forward_kl":
        raise InputError(
            f"divergence={divergence!r} does not split into the kept tokens and the tail. Use remainder='tail_bucket', or "
            "divergence='forward_kl'."
        )
    if settings is None:
        return
    if remainder == "text_tail" and settings.temperature != 1.0:
        raise InputError(
            f"temperature={settings.temperature} with remainder='text_tail': the text is no sample of a tempered distribution. "
            "Use remainder='tail_bucket', or labels of temperature 1."
        )
    if divergence == "uld" and settings.selection == "full":
        raise InputError("divergence='uld' compares kept labels. Use selection='fixed' or 'adaptive', or another divergence.")
    if not settings.unbiased:
        return
    if divergence != "forward_kl":
        raise InputError(
            f"divergence={divergence!r} with selection={settings.selection!r}: sampled probabilities are right on average only, "
            "which is enough where the gradient is linear in them, as that of forward_kl. Use divergence='forward_kl', or labels "
            "of selection 'fixed' or 'adaptive'."
        )
    if remainder == "renormalize":
        raise InputError(
            f"remainder='renormalize' with selection={settings.selection!r}: scaling a sample to 1 makes it wrong on average. "
            "Leave remainder at 'tail_bucket' (sampled labels have no tail), or use labels selected by 'fixed' or 'adaptive'."
        )


def divergence_and_slope(p: Tensor, log_q: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Return D(p, q) [tokens] and dD / dlog q [tokens, outcomes] of two distributions over the same outcomes.

    Args:
        p: The teacher's probabilities [tokens, outcomes]; zeros are allowed but for ``reverse_kl``.
        log_q: The student's log-probabilities [tokens, outcomes].
        divergence: Jensen-Shannon is the mean of both KLs to the even mixture (Lin 1991), in nats; ``uld`` the sum of absolute
            differences, of outcomes that the caller has sorted.
    """
    if divergence == "uld":
        q = log_q.exp()
        return (p - q).abs().sum(dim=1), q * torch.sign(q - p)
    if divergence == "forward_kl":
        return (torch.xlogy(p, p) - p * log_q).sum(dim=1), -p
    q = log_q.exp()
    if divergence == "reverse_kl":
        ratio = log_q - p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return (q * ratio).sum(dim=1), q * (ratio + 1)
    mixture = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny).log()
    value = (torch.xlogy(p, p) - p * mixture + q * (log_q - mixture)).sum(dim=1) / 2
    return value, q * (log_q - mixture) / 2


@dataclass
class KeptLabelTargets:
    """A teacher's kept labels; the student's distribution is compared over the kept tokens and one bucket for the rest.

    Sampled labels need no bucket: each stands for itself and, on average, for those that were not drawn.

    Args:
        labels: Kept labels of the supervised tokens.
        divergence: Divergence of the student from the teacher. ``uld`` compares the likeliest with the likeliest, the second
            with the second and so on, whatever tokens they are (universal logit distillation, arXiv 2402.12030).
        remainder: ``tail_bucket`` keeps the teacher's remaining mass as one outcome, to which the student's remaining
            mass is compared. ``text_tail`` does so too, and where the text's own token lies in the tail, it stands for what is in
            there: KL splits into that over the kept tokens and the tail as a whole, and that within the tail, of which the text
            is a sample as good as the teacher is calibrated. ``renormalize`` scales the kept probabilities up to 1 (the plain
            form of the method; Sparse Logit Sampling, arXiv 2503.16870, shows what it teaches wrongly).
        text: The text's own next tokens [tokens], int64; for ``text_tail``.
    """

    labels: SoftLabels
    divergence: Divergence = "forward_kl"
    remainder: Remainder = "tail_bucket"
    text: Tensor | None = None

    @property
    def temperature(self) -> float:
        """Temperature that the labels were made with."""
        return self.labels.temperature

    def chunk(self, rows: slice, logits: Tensor) -> "_KeptLabelChunk":
        """Read the kept tokens' logits of a chunk [tokens, vocabulary]."""
        return _KeptLabelChunk(self, self.labels.where(rows), None if self.text is None else self.text[rows], logits)


class _KeptLabelChunk:
    def __init__(self, targets: KeptLabelTargets, labels: SoftLabels, text: Tensor | None, logits: Tensor) -> None:
        self.divergence = targets.divergence
        self.text: Tensor | None = None
        if targets.remainder == "text_tail" and not labels.unbiased:
            assert text is not None
            self.text = text[:, None]
            self.text_logits = logits.gather(1, self.text)
            self.in_tail = (labels.ids != self.text).all(dim=1, keepdim=True).float()
            self.text_log_p = labels.realised.float()[:, None] - labels.tail.float()[:, None].clamp(min=_TINY).log()
        self.ids = labels.ids.long().clamp(min=0)
        self.padding = labels.ids < 0
        self.top_ids = labels.ids[:, 0].long()  # -1, which no token is, without labels
        if targets.divergence == "uld":
            self.kept_logits, self.ids = logits.topk(self.ids.shape[1], dim=1)
        else:
            self.kept_logits = logits.gather(1, self.ids)
        p = labels.probabilities.float()
        if targets.remainder == "renormalize" or labels.unbiased:
            tail = torch.zeros_like(p[:, :1])
        else:
            tail = labels.tail.float()[:, None].clamp(min=_TINY)
        self.p = torch.cat([p, tail], dim=1)
        if not labels.unbiased:
            # Both were rounded when they were stored; a token without labels has no mass to renormalise.
            self.p /= self.p.sum(dim=1, keepdim=True).clamp(min=_TINY)

    def loss(self, log_normaliser: Tensor) -> Tensor:
        log_q = self.kept_logits - log_normaliser[:, None]
        q = log_q.exp().masked_fill_(self.padding, 0)
        self.tail_q = (1 - q.sum(dim=1, keepdim=True)).clamp_(min=_TINY)
        outcomes = torch.cat([log_q, self.tail_q.log()], dim=1)
        absent = torch.nn.functional.pad(self.padding, (0, 1))
        # A padded outcome has p = 0; at log q = -100 its q is 0 too, and nothing becomes NaN.
        outcomes.masked_fill_(absent, -100.0)
        value, slope = divergence_and_slope(self.p, outcomes, self.divergence)
        self.q, self.slope = q, slope.masked_fill_(absent, 0)
        value = value.masked_fill(self.p.sum(dim=1) == 0, 0.0)  # nothing to renormalise
        if self.text is not None:
            within = self.text_logits - log_normaliser[:, None] - self.tail_q.log()
            value = value + (self.in_tail * (self.text_log_p.clamp(max=0) - within.clamp(max=0)))[:, 0]
            self.slope[:, -1:] += self.in_tail
        return value

    def blend_(self, probabilities: Tensor, hard: float, soft: float) -> None:
        # With g = dD/dlog q: dD/dz_j = q_j (g_tail / q_tail - sum g), and for kept j also g_j - q_j g_tail / q_tail.
        tail = self.slope[:, -1:] / self.tail_q
        total = self.slope.sum(dim=1, keepdim=True)
        if self.text is not None:
            total = total - self.in_tail  # the text's token is an outcome too, with a slope of -1
        probabilities.mul_(hard + soft * (tail - total))
        kept = soft * (self.slope[:, :-1] - self.q * tail)
        probabilities.scatter_add_(1, self.ids, kept.masked_fill_(self.padding, 0))
        if self.text is not None:
            probabilities.scatter_add_(1, self.text, -soft * self.in_tail)


@dataclass
class FullVocabularyTargets:
    """The teacher's whole distribution, made chunk by chunk from its final hidden states (online distillation).

    Args:
        hidden_states: The teacher's final hidden states of the supervised tokens [tokens, teacher's hidden size].
        weight: Weight of the teacher's head [vocabulary, teacher's hidden size].
        divergence: Divergence of the student from the teacher.
        temperature: Both models' logits are divided by it.
    """

    hidden_states: Tensor
    weight: Tensor
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0

    def chunk(self, rows: slice, logits: Tensor) -> "_FullVocabularyChunk":
        """Make the teacher's distribution for a chunk whose student logits [tokens, vocabulary] are given."""
        teacher = torch.mm(self.hidden_states[rows].to(self.weight.dtype), self.weight.t()).float()
        return _FullVocabularyChunk(self.divergence, teacher.div_(self.temperature), logits)


class _FullVocabularyChunk:
    def __init__(self, divergence: str, teacher_logits: Tensor, logits: Tensor) -> None:
        self.divergence = divergence
        self.top_ids = teacher_logits.argmax(dim=1)
        log_p = teacher_logits.sub_(teacher_logits.logsumexp(dim=1, keepdim=True))
        if divergence == "forward_kl":
            self.p = log_p.exp()
            self.partial = torch.linalg.vecdot(self.p, log_p.sub_(logits))
        else:
            self.p, self.logits = log_p.exp_(), logits.clone()

    def loss(self, log_normaliser: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return self.partial + log_normaliser
        value, self.slope = divergence_and_slope(self.p, self.logits.sub_(log_normaliser[:, None]), self.divergence)
        return value

    def blend_(self, probabilities: Tensor, hard: float, soft: float) -> None:
        if self.divergence == "forward_kl":
            probabilities.mul_(hard + soft).sub_(self.p, alpha=soft)
        else:
            probabilities.mul_(hard - soft * self.slope.sum(dim=1, keepdim=True)).add_(self.slope, alpha=soft)
