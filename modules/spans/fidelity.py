"""How close a model with spans stays to the dense one, on the dense model's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from ..pretrained import head_weight
from ..span_attention.rules import SpanPlan
from ..span_attention.runtime import apply_plan, remove_plan
from .measurements import Answered


@dataclass(frozen=True)
class Fidelity:
    """Means over texts, each text with equal weight; in nats where they are losses.

    Args:
        loss: Cross-entropy of the answers' tokens.
        dense_loss: That of the dense model.
        kl: Divergence of the model's distribution from the dense model's, KL(dense || model).
        agreement: Share of tokens whose most likely token is the dense model's.
        right: Share of texts whose every token would be written greedily.
    """

    loss: float
    dense_loss: float
    kl: float
    agreement: float
    right: float


_CHUNK = 64  # tokens whose distributions exist at the same time


@torch.no_grad()
def answer_states(model: PreTrainedModel, text: Answered) -> Tensor:
    """Return the final hidden states that predict the tokens of an answer [tokens, hidden size]."""
    ids = text.ids[None, :-1].to(model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, text.answer_start - 1 :]


def fidelity(model: PreTrainedModel, plans: Sequence[SpanPlan], texts: Sequence[Answered]) -> list[Fidelity]:
    """Measure what plans lose.

    Args:
        model: Dense, in evaluation mode; it is again what it was afterwards.
        plans: To try, one after another.
        texts: With the answers of the dense model.
    """
    weight = head_weight(model)
    totals = torch.zeros(len(plans), 5, dtype=torch.float64)
    with Progress() as bar:
        task = bar.add_task("Validating plans", total=len(texts) * (len(plans) + 1))
        for text in texts:
            target = text.ids[text.answer_start :].to(model.device)
            dense = answer_states(model, text)
            bar.advance(task)
            for number, plan in enumerate(plans):
                apply_plan(model, plan)
                try:
                    ours = answer_states(model, text)
                finally:
                    remove_plan(model)
                totals[number] += _compared(dense, ours, weight, target)
                bar.advance(task)
    return [Fidelity(*row) for row in (totals / max(len(texts), 1)).tolist()]


@torch.no_grad()
def _compared(dense: Tensor, ours: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the five figures of ``Fidelity`` for one text, from final hidden states [tokens, hidden size]."""
    parts = []
    for start in range(0, len(target), _CHUNK):
        rows = slice(start, start + _CHUNK)
        before, now = ((states[rows] @ weight.T).float().log_softmax(dim=-1) for states in (dense, ours))
        own = target[rows, None]
        best = now.argmax(dim=-1)
        parts.append(
            torch.stack(
                [
                    -now.gather(-1, own)[:, 0],
                    -before.gather(-1, own)[:, 0],
                    (before.exp() * (before - now)).sum(dim=-1),
                    (best == before.argmax(dim=-1)).float(),
                    (best == target[rows]).float(),
                ],
                dim=1,
            )
        )
    tokens = torch.cat(parts).double().cpu()
    return torch.cat([tokens[:, :4].mean(dim=0), tokens[:, 4:].amin(dim=0)])
