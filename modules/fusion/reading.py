"""How a plain or a fused model reads a text: its states as its head reads them, and its loss."""

from typing import Any

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
