"""Losses over the vocabulary, computed from hidden states and the head's weight in chunks of tokens.

Full logits [tokens, vocabulary] never exist at once: each chunk's logits are made in one reused buffer, turned into
their gradient in place, and folded into the gradients of the hidden states and of the weight during the forward pass
(the scheme of Liger Kernel, arXiv 2410.10989; ours also takes soft targets). ``backward`` only scales what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SLICE = 4096  # vocabulary entries


class SoftTargets(Protocol):
    """What a loss on a teacher's distribution provides; see ``distillation.loss`` for the two forms."""

    @property
    def temperature(self) -> float:
        """Both models' logits are divided by it."""
        ...

    def chunk(self, rows: slice, logits: Tensor) -> "SoftChunk":
        """Read what is needed of a chunk's logits [tokens, vocabulary] (already divided by the temperature)."""
        ...


class SoftChunk(Protocol):
    """One chunk of a soft loss; made from the logits, finished with their normaliser."""

    top_ids: Tensor

    def loss(self, log_normaliser: Tensor) -> Tensor:
        """Return the divergence of every token [tokens] in nats, given logsumexp of its logits [tokens]."""
        ...

    def blend_(self, probabilities: Tensor, hard: float, soft: float) -> None:
        """Turn probabilities q in place into ``hard * q + soft * d loss / d logits``, both [tokens, vocabulary]."""
        ...


@dataclass
class LossParts:
    """Means over the supervised tokens of a batch, in nats where they are losses, and what calibration is measured by.

    Args:
        loss: What is minimised; differentiable.
        hard: Cross-entropy to the labels.
        soft: Divergence from the teacher (without the squared temperature); 0 without soft targets.
        agreement: Share of tokens whose most likely token is the teacher's (the label without soft targets).
        tokens: Number of supervised tokens.
        confidence: Probability of the most likely token, for every supervised token [tokens].
        correct: Whether that token is the label [tokens].
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    tokens: int
    confidence: Tensor
    correct: Tensor


def shift_labels(labels: Tensor) -> Tensor:
    """Align labels [batch, length] with the positions that predict them: each takes its successor's, the last -100."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def linear_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    soft_targets: SoftTargets | None = None,
    soft_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> LossParts:
    """Cross-entropy, and optionally a divergence from a teacher, of ``softmax(hidden_states @ weight.T)``.

    Args:
        hidden_states: Final hidden states of the supervised tokens [tokens, hidden size].
        weight: Weight of the language-model head [vocabulary, hidden size]; may be tied to the embedding.
        labels: Next token's id for each of them [tokens], int64.
        soft_targets: The teacher's distributions for the same tokens.
        soft_weight: Share of the divergence in the loss, in [0, 1]; the cross-entropy has the rest.
        chunk_tokens: Tokens whose logits exist at the same time; None takes 64 on a CPU and 1024 elsewhere.

    Returns:
        The loss and its parts. Under autocast the matrix products run in its type; everything else in float32.
    """
    grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    device = hidden_states.device.type
    chunk_tokens = chunk_tokens or default_chunk(device)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    loss, hard, soft, agreement, confidence, correct = _LinearLoss.apply(
        hidden_states, weight, labels, soft_targets, soft_weight, chunk_tokens, dtype, grad
    )
    return LossParts(loss, hard, soft, agreement, labels.numel(), confidence, correct)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        soft_targets: SoftTargets | None,
        soft_weight: float,
        chunk_tokens: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        device = hidden_states.device
        tokens, vocabulary = labels.numel(), weight.shape[0]
        with torch.autocast(device.type, enabled=False):
            head, states = weight.detach(), hidden_states.detach().to(dtype)
            # The hidden states may be frozen below a trained head, or the head be frozen above them.
            ctx.hidden_gradient = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32) if grad else None
            ctx.weight_gradient = weight.new_zeros(weight.shape, dtype=torch.float32) if grad and weight.requires_grad else None
            sums = torch.zeros(3, device=device, dtype=torch.float64)
            confidence = torch.empty(tokens, device=device)
            correct = torch.empty(tokens, device=device, dtype=torch.bool)
            tempered = soft_targets is not None and soft_targets.temperature != 1.0
            scratch = torch.empty(min(chunk_tokens, tokens), vocabulary, device=device) if tempered else None
            for rows, logits in _chunks_of_logits(hidden_states, weight, chunk_tokens, dtype):
                second = None if scratch is None else scratch[: len(logits)]
                top_ids, confidence[rows] = _chunk(logits, labels[rows], sums, soft_targets, soft_weight, rows, second, grad)
                correct[rows] = top_ids == labels[rows]
                if ctx.hidden_gradient is not None:
                    _project_back(logits, states[rows], head, ctx.hidden_gradient[rows], ctx.weight_gradient)
        ctx.tokens, ctx.dtypes, ctx.used = tokens, (hidden_states.dtype, weight.dtype), False
        hard, soft, agreement = (sums / max(tokens, 1)).float().unbind()
        scale = 1.0 if soft_targets is None else soft_targets.temperature**2
        loss = (1 - soft_weight) * hard + soft_weight * scale * soft
        ctx.mark_non_differentiable(hard, soft, agreement, confidence, correct)
        return loss, hard, soft, agreement, confidence, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError("linear_loss keeps its gradients for one backward pass; call it again for another.")
        ctx.used = True
        scale = loss_gradient / max(ctx.tokens, 1)
        results: list[Tensor | None] = []
        for gradient, dtype in zip((ctx.hidden_gradient, ctx.weight_gradient), ctx.dtypes):
            results.append(None if gradient is None else gradient.mul_(scale).to(dtype))
        ctx.hidden_gradient = ctx.weight_gradient = None
        return (*results, None, None, None, None, None, None)


def default_chunk(device: str) -> int:
    """Return the tokens whose logits exist at the same time on a kind of device."""
    return 64 if device == "cpu" else 1024


def linear_log_likelihood(hidden_states: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Return each token's log-probability under ``softmax(hidden_states @ weight.T)`` [tokens], differentiable, in nats.

    The backward pass makes the logits again, chunk by chunk, since it does not know before how tokens weigh.

    Args:
        hidden_states: Final hidden states [tokens, hidden size].
        weight: Weight of the language-model head [vocabulary, hidden size].
        labels: Next token's id for each of them [tokens], int64.
        chunk_tokens: Tokens whose logits exist at the same time; None takes 64 on a CPU and 1024 elsewhere.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    chunk_tokens = chunk_tokens or default_chunk(device)
    return _LinearLogLikelihood.apply(hidden_states, weight, labels, chunk_tokens, dtype)


class _LinearLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_states, weight, labels)
        ctx.chunk_tokens, ctx.dtype = chunk_tokens, dtype
        found = torch.empty(len(labels), device=hidden_states.device)
        for rows, logits in _chunks_of_logits(hidden_states, weight, chunk_tokens, dtype):
            chosen = logits.gather(1, labels[rows, None])[:, 0]
            found[rows] = chosen - _exponentiate_(logits)[2]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, labels = ctx.saved_tensors
        hidden_gradient = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32)
        weight_gradient = weight.new_zeros(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        states = hidden_states.detach().to(ctx.dtype)
        for rows, logits in _chunks_of_logits(hidden_states, weight, ctx.chunk_tokens, ctx.dtype):
            inverse_sum = _exponentiate_(logits)[3]
            slope = gradient[rows].float()
            logits.mul_((-slope * inverse_sum)[:, None]).scatter_add_(1, labels[rows, None], slope[:, None])
            _project_back(logits, states[rows], weight.detach(), hidden_gradient[rows], weight_gradient)
        own = None if weight_gradient is None else weight_gradient.to(weight.dtype)
        return hidden_gradient.to(hidden_states.dtype), own, None, None, None


def _chunks_of_logits(
    hidden_states: Tensor, weight: Tensor, chunk_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their float32 logits [tokens, vocabulary], in one buffer."""
    tokens = len(hidden_states)
    head, states = weight.detach(), hidden_states.detach().to(dtype)
    buffer = torch.empty(min(chunk_tokens, tokens), len(weight), device=weight.device, dtype=torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, tokens))
            logits = buffer[: rows.stop - rows.start]
            _project(states[rows], head, logits)
            yield rows, logits


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight in slices of the vocabulary, cast: no cast copy of all of it, no large product in low precision."""
    step = _SLICE if weight.device.type == "cpu" and dtype != torch.float32 else len(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)


def _project(states: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Write ``states @ weight.T`` into float32 logits [tokens, vocabulary]; the product runs in the type of ``states``."""
    for rows, part in _slices(weight, states.dtype):
        if states.dtype == torch.float32:
            torch.mm(states, part.t(), out=logits[:, rows])
        else:
            logits[:, rows] = torch.mm(states, part.t())


def _project_back(
    gradient: Tensor, states: Tensor, weight: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor | None
) -> None:
    """Add ``gradient @ weight`` [tokens, hidden size] and ``gradient.T @ states`` [vocabulary, hidden size] to float32 sums."""
    for rows, part in _slices(weight, states.dtype):
        here = gradient[:, rows].to(states.dtype)
        hidden_gradient += torch.mm(here, part)
        if weight_gradient is None:
            continue
        if states.dtype == torch.float32:
            weight_gradient[rows].addmm_(here.t(), states)
        else:
            weight_gradient[rows] += torch.mm(here.t(), states)


def _chunk(
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    soft_targets: SoftTargets | None,
    soft_weight: float,
    rows: slice,
    scratch: Tensor | None,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """Add a chunk's losses to ``sums`` and turn its logits in place into the gradient of ``tokens * loss``.

    Returns:
        The most likely token and its probability, both [tokens].
    """
    label_column = labels[:, None]
    label_logits = logits.gather(1, label_column)[:, 0]
    soft = None
    if soft_targets is not None:
        if scratch is not None:
            torch.mul(logits, 1 / soft_targets.temperature, out=scratch)
        soft = soft_targets.chunk(rows, logits if scratch is None else scratch)
    _, top_ids, log_normaliser, inverse_sum = _exponentiate_(logits)
    sums[0] += (log_normaliser - label_logits).sum()
    sums[2] += (top_ids == (labels if soft is None else soft.top_ids)).sum()
    if soft is not None and soft_targets is not None:
        if scratch is None:
            soft_normaliser, soft_inverse = log_normaliser, inverse_sum
        else:
            _, _, soft_normaliser, soft_inverse = _exponentiate_(scratch)
        sums[1] += soft.loss(soft_normaliser).sum()
    if not grad:
        return top_ids, inverse_sum  # the largest term of the sum is 1
    logits.mul_(inverse_sum[:, None])
    hard_weight = 1 - soft_weight if soft is not None else 1.0
    if soft is None or soft_targets is None:
        pass
    elif scratch is None:
        soft.blend_(logits, hard_weight, soft_weight)
    else:
        # d(t^2 D(z / t)) / dz = t D'(z / t)
        scratch.mul_(soft_inverse[:, None])
        soft.blend_(scratch, 0.0, soft_weight * soft_targets.temperature)
        logits.mul_(hard_weight).add_(scratch)
    logits.scatter_add_(1, label_column, logits.new_full((), -hard_weight).expand_as(label_column))
    return top_ids, inverse_sum


def _exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace logits by exp(logits - max); return max, its index, logsumexp and 1 / sum, all [tokens]."""
    top, top_ids = logits.max(dim=1)
    total = logits.sub_(top[:, None]).exp_().sum(dim=1)
    return top, top_ids, top + total.log(), total.reciprocal()
