"""What it would cost that a head no longer sees far keys, to first order: one backward pass of a text with its answer.

With A the weights of a row of an attention map, g the loss's gradient with respect to them and G = sum A g, dropping key j and
normalising the row again changes the loss by ``E_j = A_j (G - g_j) / (1 - A_j)``, and dropping a set F of keys by
``(sum_F A (G - g)) / (1 - sum_F A)``. Three forms sum this over the rows of a text and the query heads of a key/value head:

* ``published``: the sum of ``|E_j|`` over all keys of F (MoA, arXiv 2406.14909, which sums blocks of 64 x 64);
* ``net``: the change by the set, summed with its sign and, for each text, taken as 0 where it is below;
* ``absolute``: the magnitude of each row's change by the set.

The loss is the cross-entropy of the answer, or its logit margin, which does not saturate where the model is sure of what it wrote
itself: ``logsumexp`` of the other tokens' logits minus the own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..pretrained import head_weight
from ..span_attention.rules import SpanPlan, SpanRule
from ..span_attention.windows import attend_with_rules, spans_at
from .measurements import Loss
from .probe import frozen, probed

Form = Literal["published", "net", "absolute"]
Rows = Literal["answer", "all"]
FORMS: tuple[Form, ...] = ("published", "net", "absolute")
ROWS: tuple[Rows, ...] = ("answer", "all")

_BLOCK = 64  # queries whose attention maps exist at the same time: a block of a head stays in a CPU's cache
_CHECKPOINTED = 2048  # tokens from which on a layer's activations are computed again in the backward pass


class _ReadGradient(torch.autograd.Function):
    """Passes an attention's output on; in the backward pass its gradient, which is all that the sums need, is read off."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float, sums: "_Sums", layer: int
    ) -> Tensor:
        # Saved this way, a checkpointed layer's are made again when they are wanted.
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.sums, ctx.layer = scaling, sums, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sums.add(ctx.layer, *ctx.saved_tensors, ctx.scaling, gradient)
        return gradient, None, None, None, None, None, None


class _Sums:
    """The three sums of each rule, for every key/value head of a layer, filled while the backward pass goes down.

    Args:
        rules: Candidate rules.
        sink: First positions that stay.
        answer_row: First row whose logits predict the answer.
        shape: Layers and key/value heads.
    """

    def __init__(self, rules: Sequence[SpanRule], sink: int, answer_row: int, shape: tuple[int, int]) -> None:
        self.rules, self.sink, self.answer_row = rules, sink, answer_row
        self.values = torch.zeros(len(ROWS), len(FORMS), *shape, len(rules), dtype=torch.float64)

    @torch.no_grad()
    def add(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, gradient: Tensor) -> None:
        """Add a layer.

        Args:
            layer: Its number.
            query: [1, heads, tokens, size].
            key: [1, key/value heads, tokens, size].
            value: As the keys.
            scaling: Of the scores.
            gradient: Of the loss with respect to the output [1, tokens, heads, size].
        """
        heads, length = key.shape[1], key.shape[2]
        grouped = query[0].unflatten(0, (heads, -1)).float()
        backward = gradient[0].transpose(0, 1).unflatten(0, (heads, -1)).float()
        # From the last key to the first: sums of what stays are then exact where nearly all of a row's weight is dropped.
        keys, values = (part[0].flip(1).float().transpose(1, 2) for part in (key, value))
        for start in range(0, length, _BLOCK):
            stop = min(start + _BLOCK, length)
            rows = torch.arange(start, stop, device=key.device)
            first = (rows[:, None] - spans_at(self.rules, rows) + 1).clamp(min=self.sink)  # key in the span
            if not (first > self.sink).any():
                continue
            behind = torch.arange(stop - 1, -1, -1, device=key.device) > rows[:, None]
            answers = slice(max(self.answer_row - start, 0), stop - start)
            for head in range(heads):
                scores = grouped[head, :, start:stop] @ keys[head, :, length - stop :] * scaling
                weights = scores.masked_fill_(behind, float("-inf")).softmax(dim=-1)
                pull = backward[head, :, start:stop] @ values[head, :, length - stop :]
                change = (weights * pull).sum(dim=-1, keepdim=True).sub(pull).mul_(weights)
                index = (stop - 1 - first).expand(len(change), -1, -1)

                def stays(part: Tensor, index: Tensor = index) -> Tensor:
                    sink = part[..., part.shape[-1] - self.sink :].sum(dim=-1, keepdim=True)
                    return part.cumsum(dim=-1).gather(-1, index) + sink

                single = (change / (1 - weights).clamp_(min=1e-6)).abs_()
                far = single.sum(dim=-1, keepdim=True) - stays(single)
                net = stays(change).neg_() / stays(weights).clamp_(min=1e-30)
                for number, part in enumerate((far, net, net.abs())):
                    part = part.masked_fill(first <= self.sink, 0.0)
                    self.values[1, number, layer, head] += part.sum(dim=(0, 1)).double().cpu()
                    self.values[0, number, layer, head] += part[:, answers].sum(dim=(0, 1)).double().cpu()


def influences(
    model: PreTrainedModel,
    ids: Tensor,
    answer_start: int,
    rules: Sequence[SpanRule],
    *,
    sink: int,
    loss: Loss = "margin",
    plan: SpanPlan | None = None,
) -> np.ndarray:
    """Return what each head would cost the answer of a text if it had each rule, in all forms and for both sets of rows.

    Memory is that of a backward pass without the weights' gradients, and of blocks of attention maps.

    Args:
        model: Dense, in evaluation mode.
        ids: Text and answer, int64 [tokens].
        answer_start: Where the answer begins, 1 or more.
        rules: Candidates.
        sink: First positions that are always seen.
        loss: ``margin`` or ``cross_entropy``, its mean over the answer's tokens.
        plan: Spans that the heads have while gradients are taken; None takes them of the dense model. The costs are compared
            with the whole text either way.

    Returns:
        float64 [rows (see ``ROWS``), forms (see ``FORMS``), layers, key/value heads, rules]; layers with their own window are 0.
    """
    shape = (int(model.config.num_hidden_layers), int(model.config.num_key_value_heads))
    sums = _Sums(rules, sink, answer_start - 1, shape)
    ids = ids.to(model.device)[None]

    def probe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, dense: Callable[[], Tensor]) -> Tensor:
        if plan is None:
            out = dense()
        else:
            own = plan.rules[layer]
            assert own is not None
            places = torch.arange(key.shape[2], device=key.device)[None]
            grouped = query.unflatten(1, (len(own), -1))
            out = attend_with_rules(grouped, key, value, own, plan.sink, scaling, queries=places, keys=places, ordered=True)
            out = out.flatten(1, 2).transpose(1, 2)
        return _ReadGradient.apply(out, query, key, value, scaling, sums, layer)

    with torch.enable_grad(), probed(model, probe), frozen(model, checkpointed=ids.shape[1] > _CHECKPOINTED):
        embedded = model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
        states = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        rows = states[0, answer_start - 1 :]
        rows.backward(_gradient(rows.detach(), head_weight(model).detach(), ids[0, answer_start:], loss))
    return sums.values.numpy()


def _gradient(states: Tensor, weight: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Return the gradient of the mean loss with respect to the final hidden states [tokens, size], a few logits at a time."""
    parts = []
    for chunk, own in zip(states.split(_BLOCK), targets.split(_BLOCK)):
        logits = (chunk @ weight.T).float()
        rows = torch.arange(len(own), device=own.device)
        if loss == "margin":
            logits[rows, own] = float("-inf")
        probabilities = logits.softmax(dim=-1)
        probabilities[rows, own] -= 1.0
        parts.append((probabilities / len(targets)).to(weight.dtype) @ weight)
    return torch.cat(parts)
