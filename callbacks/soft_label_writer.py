"""Writes a teacher's predictions to a soft-label store while ``predict`` runs."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from ..datamodules.soft_labels import SoftLabelAppender, StoredSequence, StoreHeader
from ..datamodules.soft_labels.store import prepare_store, sequence_layout
from ..errors import InputError
from ..modules.distillation import SoftLabelTeacher
from ..modules.distillation.teacher import CapturedLabels
from ..modules.pretrained import tokenizer_fingerprint

log = logging.getLogger(__name__)


class SoftLabelWriter(BasePredictionWriter):
    """Appends every batch's labels to a store as soon as they are predicted, so memory does not grow.

    Each rank writes files of its own. Run again with the same settings, it goes on where a killed or stopped run was:
    sequences that the store has are not predicted again.

    Args:
        store: Folder of the store, made when missing.
        tokens: ``stored`` keeps the text's tokens, so that a student trains from the store alone; ``external`` leaves
            them out, and training needs the same text again.
        compression: Level of zstd, 1 (fast) to 19 (small).
        shard_bytes: A new file is begun when one has grown beyond this many bytes.

    Raises:
        InputError: If a setting is out of range, or the store was made with another teacher or settings (before anything
            is predicted).
    """

    def __init__(
        self,
        store: str,
        *,
        tokens: Literal["stored", "external"] = "stored",
        compression: int = 3,
        shard_bytes: int = 1 << 28,
    ) -> None:
        super().__init__(write_interval="batch")
        if tokens not in ("stored", "external"):
            raise InputError(f"tokens={tokens!r} is unknown. Legal: stored, external.")
        if not 1 <= compression <= 19:
            raise InputError(f"compression={compression} is no level of zstd. Legal: 1 to 19.")
        if shard_bytes < 1 << 10:
            raise InputError(f"shard_bytes={shard_bytes} is too small for a sequence. Legal: 1024 or more.")
        self.store, self.tokens, self.compression, self.shard_bytes = Path(store), tokens, compression, shard_bytes
        self.captured_tokens = 0
        self._appender: SoftLabelAppender | None = None
        self._keys: list[bytes] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store, and ask the teacher only for what it lacks."""
        if not isinstance(pl_module, SoftLabelTeacher):
            raise InputError(f"SoftLabelWriter stores what SoftLabelTeacher predicts, not {type(pl_module).__name__}.")
        assert pl_module.model is not None
        # Sequences are known by their keys, not by their places in the loader.
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
        header = StoreHeader(
            teacher=pl_module.source.title,
            teacher_fingerprint=pl_module.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(pl_module.tokenizer),
            vocabulary=pl_module.model.get_output_embeddings().weight.shape[0],
            settings=pl_module.selection,
            weights=pl_module.weights,
            tokens=self.tokens,
            compression=self.compression,
        )
        if trainer.is_global_zero:
            prepare_store(self.store, header)
        trainer.strategy.barrier("soft-label store")
        self._appender = SoftLabelAppender(self.store, header, rank=trainer.global_rank, shard_bytes=self.shard_bytes)
        pl_module.wanted_rows = self._missing_rows

    def _missing_rows(self, batch: dict[str, Any]) -> list[int]:
        assert self._appender is not None
        self._layouts = []
        rows = []
        for row, length in enumerate(batch["lengths"].tolist()):
            tokens, positions, labels = (batch[name][row, :length].cpu() for name in ("input_ids", "position_ids", "labels"))
            starts, supervised = sequence_layout(positions, labels)
            key = self._appender.header.key(tokens.numpy(), starts, supervised)
            if key not in self._appender and supervised.any():
                rows.append(row)
                self._layouts.append((key, tokens.numpy(), starts, supervised))
        return rows

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: CapturedLabels | None,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append one batch."""
        if prediction is None:
            return
        assert self._appender is not None
        labels = prediction.labels.to(torch.device("cpu"))
        sequences, begin = [], 0
        for (key, tokens, starts, supervised), count in zip(self._layouts, prediction.tokens_per_row):
            part = labels.where(slice(begin, begin + count))
            begin += count
            kept = part.ids >= 0
            sequence = StoredSequence(
                tokens=tokens if self.tokens == "stored" else np.empty(0, dtype=np.uint32),
                starts=starts,
                supervised=supervised,
                counts=part.counts.numpy(),
                ids=part.ids[kept].numpy(),
                probabilities=_bits(part.probabilities[kept]),
                tail=_bits(part.tail),
                realised=_bits(part.realised),
            )
            sequences.append((key, sequence))
            self.captured_tokens += count
        self._appender.append(sequences)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the store."""
        self._close()
        log.info("Soft labels are in %s (this process labelled %d tokens)", self.store, self.captured_tokens)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the store; what was appended stays."""
        self._close()

    def _close(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None


def _bits(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)
