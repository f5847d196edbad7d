"""How a plain or a fused model reads a text: its states as its head reads them, and its loss."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..language_model import Batch
from ..linear_loss import LossParts, linear_loss, shift_labels
from ..pretrained import head_weight
from .fused import FusedTable


def readable(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return a model's final hidden states [..., hidden size] as its head reads them, [..., size of the head]."""
    head: Any = model.get_output_embeddings()
    return head.expand(states) if isinstance(head, FusedTable) else states


def hidden_distance(residual: Any, ours: Iterable[Tensor], theirs: Iterable[Tensor], supervised: Tensor) -> Tensor | None:
    """Return the mean over layers and tokens of 1 - the cosine between two residual streams; None where they are not as wide.

    Args:
        residual: Operator on the first stream, or None.
        ours: States of each layer [batch, length, size].
        theirs: States to compare with.
        supervised: The tokens that count, bool [batch, length].
    """
    distances = []
    for own, target in zip(ours, theirs):
        wide = own[supervised] if residual is None else residual.expand(own[supervised])
        if wide.shape[-1] != target.shape[-1]:
            return None
        cosine = torch.cosine_similarity(wide.float(), target[supervised].float(), dim=-1)
        distances.append((1 - cosine).sum() / max(len(cosine), 1))
    return torch.stack(distances).mean()


def text_loss(model: PreTrainedModel, batch: Batch, chunk_tokens: int | None = None) -> LossParts:
    """Return a plain or a fused model's loss of a batch's text.

    Args:
        model: A plain model, or what ``fuse`` returns.
        batch: As a DataModule gives it.
        chunk_tokens: See ``linear_loss``.
    """
    targets = shift_labels(batch["labels"])
    supervised = targets != -100
    states = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    return linear_loss(readable(model, states)[supervised], head_weight(model), targets[supervised], chunk_tokens=chunk_tokens)
