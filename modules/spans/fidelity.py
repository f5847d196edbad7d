"""How close a model with spans stays to the dense one, on the dense model's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from ..pretrained import head_weight
from .measurements import Answered
from .rules import SpanPlan
from .runtime import apply_plan, remove_plan


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


@torch.no_grad()
def answer_log_probabilities(model: PreTrainedModel, text: Answered) -> Tensor:
    """Return the log-probabilities of the next token at each token of the answer, float32 [tokens, vocabulary]."""
    ids = text.ids[None, :-1].to(model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, text.answer_start - 1 :]
    return (states @ head_weight(model).T).float().log_softmax(dim=-1)


def fidelity(model: PreTrainedModel, plans: Sequence[SpanPlan], texts: Sequence[Answered]) -> list[Fidelity]:
    """Measure what plans lose.

    Args:
        model: Dense, in evaluation mode; it is dense again afterwards.
        plans: To try, one after another.
        texts: With the answers of the dense model.
    """
    totals = torch.zeros(len(plans), 5, dtype=torch.float64)
    with Progress() as bar:
        task = bar.add_task("Validating plans", total=len(texts) * (len(plans) + 1))
        for text in texts:
            target = text.ids[text.answer_start :].to(model.device)
            dense = answer_log_probabilities(model, text)
            bar.advance(task)
            for number, plan in enumerate(plans):
                apply_plan(model, plan)
                try:
                    ours = answer_log_probabilities(model, text)
                finally:
                    remove_plan(model)
                same = ours.argmax(dim=-1)
                totals[number] += torch.tensor(
                    [
                        -ours.gather(-1, target[:, None]).mean(),
                        -dense.gather(-1, target[:, None]).mean(),
                        (dense.exp() * (dense - ours)).sum(dim=-1).mean(),
                        (same == dense.argmax(dim=-1)).float().mean(),
                        (same == target).all().float(),
                    ],
                    dtype=torch.float64,
                )
                bar.advance(task)
    return [Fidelity(*row) for row in (totals / max(len(texts), 1)).tolist()]
