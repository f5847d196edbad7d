"""The teacher that reads a text once and gives its compressed soft labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ..linear_loss import shift_labels
from ..precision import FrozenDtype, frozen_dtype
from ..pretrained import head_weight, load_config, load_model, load_tokenizer, model_fingerprint, resolve_source
from .labels import LabelSettings, SoftLabels, sampling_chances, select_labels


@dataclass
class CapturedLabels:
    """What a teacher says of some rows of a batch.

    Args:
        rows: Their indices in the batch.
        tokens_per_row: Number of supervised tokens of each.
        labels: The labels of all their supervised tokens, row after row.
    """

    rows: list[int]
    tokens_per_row: list[int]
    labels: SoftLabels


class SoftLabelTeacher(LightningModule):
    """Predicts compressed soft labels; ``SoftLabelWriter`` stores them.

    Args:
        source: The teacher; see ``LanguageModel``.
        selection: Which labels are kept of every token.
        weights: Type of the weights; ``auto`` is bfloat16 where that is fast.
        attn_implementation: Attention function of ``transformers``; its own choice when None.

    Raises:
        InputError: If the source is unknown or the selection does not fit its vocabulary, before weights are read.
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        selection: LabelSettings = LabelSettings(),  # noqa: B008  (frozen)
        weights: FrozenDtype = "auto",
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.source = resolve_source(source)
        if selection.selection == "full":
            raise InputError("selection='full' is never stored: use 'fixed', 'adaptive' or 'sampled', or an online teacher.")
        selection.check()
        selection.check(load_config(source).get_text_config().vocab_size)
        self.selection = selection
        self.weights = frozen_dtype(weights)
        self.attn_implementation = attn_implementation
        self.model: PreTrainedModel | None = None
        self.wanted_rows: Callable[[dict[str, Any]], list[int]] | None = None
        """Set by a writer: the rows of a batch that it does not have yet. None wants all."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source.name)
        return self._tokenizer

    def configure_model(self) -> None:
        """Load the weights."""
        if self.model is None:
            self.model = load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)
            self.fingerprint = model_fingerprint(self.model)

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> CapturedLabels | None:
        """Label the supervised tokens of the batch's wanted rows.

        Args:
            batch: ``input_ids``, ``position_ids`` and ``labels`` [batch, length], int64.
            batch_idx: Not used.
            dataloader_idx: Not used.

        Returns:
            The labels, or None where no row is wanted.
        """
        rows = list(range(len(batch["input_ids"]))) if self.wanted_rows is None else self.wanted_rows(batch)
        if not rows:
            return None
        chosen = {name: batch[name][rows] for name in ("input_ids", "position_ids", "labels")}
        assert self.model is not None
        with torch.autocast(self.device.type, enabled=False):  # ``weights`` alone says in which type it computes
            labels = teacher_labels(self.model, chosen, self.selection)
        return CapturedLabels(rows, (shift_labels(chosen["labels"]) != -100).sum(dim=1).tolist(), labels)


@torch.no_grad()
def teacher_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return a teacher's final hidden states of a batch's supervised tokens [tokens, hidden size]."""
    states = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    return states[shift_labels(batch["labels"]) != -100]


@torch.no_grad()
def teacher_labels(model: PreTrainedModel, batch: dict[str, Any], settings: LabelSettings) -> SoftLabels:
    """Return a teacher's kept labels of a batch's supervised tokens; capture and online distillation both call this."""
    targets = shift_labels(batch["labels"])
    supervised = targets != -100
    chances = sampling_chances(batch["input_ids"], batch["position_ids"], supervised, settings)
    return select_labels(teacher_states(model, batch), head_weight(model), targets[supervised], settings, chances=chances)
