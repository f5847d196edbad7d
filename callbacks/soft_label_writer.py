"""Writes a teacher's predictions to a soft-label store while ``predict`` runs."""

import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from ..datamodules.soft_labels import SoftLabelAppender, StoredSequence, StoreHeader
from ..datamodules.soft_labels.appender import prepare_store
from ..datamodules.soft_labels.format import CODECS, write_spelling
from ..datamodules.soft_labels.ranked import RankedCodec
from ..datamodules.soft_labels.steps import Values, ValueSteps
from ..datamodules.soft_labels.store import sequence_layout
from ..errors import InputError
from ..modules.distillation import SoftLabelTeacher
from ..modules.distillation.alignment import Spelling
from ..modules.distillation.teacher import CapturedLabels
from ..modules.pretrained import SourceError
from ..modules.tokens import tokenizer_fingerprint

log = logging.getLogger(__name__)

_MASS_BINS = np.linspace(0, 1, 51)


class SoftLabelWriter(BasePredictionWriter):
    """Appends every batch's labels to a store as soon as they are predicted, so memory does not grow.

    Each rank writes files of its own. Run again with the same settings, it goes on where a killed or stopped run was:
    sequences that the store has are not predicted again.

    Args:
        store: Folder of the store, made when missing.
        tokens: ``stored`` keeps the text's tokens, so that a student trains from the store alone; ``external`` leaves
            them out, and training needs the same text again.
        compression: Level of zstd, 1 (fast) to 19 (small).
        codec: ``ranked-2`` rounds values and learns which ids are likely, to a third of the size; ``plain-1`` keeps bfloat16.
        values: How ``ranked-2`` rounds probabilities: in even steps of the square root (``sqrt``), or of the logarithm (``log``)
            for temperatures above 1 or reverse KL.
        value_step: Size of the steps; None takes 0.011 for ``sqrt`` and 0.05 for ``log``.
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
        codec: Literal["ranked-2", "plain-1"] = "ranked-2",
        values: Values = "sqrt",
        value_step: float | None = None,
        shard_bytes: int = 1 << 28,
    ) -> None:
        super().__init__(write_interval="batch")
        if tokens not in ("stored", "external"):
            raise InputError(f"tokens={tokens!r} is unknown. Legal: stored, external.")
        if not 1 <= compression <= 19:
            raise InputError(f"compression={compression} is no level of zstd. Legal: 1 to 19.")
        if codec not in CODECS:
            raise InputError(f"codec={codec!r} is unknown. Legal: {', '.join(CODECS)}.")
        self.codec = codec
        self.values = values
        self.steps = ValueSteps(values, (0.011 if values == "sqrt" else 0.05) if value_step is None else value_step)
        if shard_bytes < 1 << 10:
            raise InputError(f"shard_bytes={shard_bytes} is too small for a sequence. Legal: 1024 or more.")
        self.store, self.tokens, self.compression, self.shard_bytes = Path(store), tokens, compression, shard_bytes
        self.captured_tokens = 0
        self._mass_kept = np.zeros(len(_MASS_BINS) - 1, dtype=np.int64)
        self._appender: SoftLabelAppender | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the teacher's labels can be written so, before it is loaded."""
        if not isinstance(pl_module, SoftLabelTeacher):
            raise InputError(f"SoftLabelWriter stores what SoftLabelTeacher predicts, not {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"trainer.strategy={type(trainer.strategy).__name__}: each rank reads its share of the text with the whole "
                "teacher. Legal: ddp, or one device."
            )
        converted = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}.get(str(trainer.precision))
        if converted not in (None, pl_module.weights):
            raise InputError(
                f"trainer.precision={trainer.precision!r} would turn the teacher's weights into {converted}, but model.weights="
                f"{pl_module.weights!r} is what the store says of them. Leave trainer.precision out; model.weights is the type "
                "that labels are computed in."
            )
        if self.codec == RankedCodec.name:
            ValueSteps(self.steps.values, self.steps.step, pl_module.selection.floor)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store, and ask the teacher only for what it lacks."""
        assert isinstance(pl_module, SoftLabelTeacher)
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
            codec=self.codec,
            values=self.values,
            value_step=self.steps.step,
        )
        if trainer.is_global_zero:
            prepare_store(self.store, header)
            with suppress(SourceError):  # a tokenizer whose tokens spell nothing teaches students of its own kind alone
                write_spelling(self.store, Spelling.of(pl_module.tokenizer))
        trainer.strategy.barrier("soft-label store")
        self._appender = SoftLabelAppender(self.store, header, rank=trainer.global_rank, shard_bytes=self.shard_bytes)
        pl_module.wanted_rows = self._missing_rows

    def _missing_rows(self, batch: dict[str, Any]) -> list[int]:
        assert self._appender is not None
        if "lengths" not in batch:
            raise InputError("These batches are prompts without successors to label: give data.predict_split=train or val.")
        keys = [sequence_key(self._appender.header, batch, row)[0] for row in range(len(batch["lengths"]))]
        return [row for row, key in enumerate(keys) if key not in self._appender]

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
        self._appender.append(to_sequences(self._appender.header, batch, prediction))
        self.captured_tokens += sum(prediction.tokens_per_row)
        kept = 1 - prediction.labels.tail.float().cpu().numpy()
        self._mass_kept += np.histogram(kept, bins=_MASS_BINS)[0]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the store, and draw how much of the teacher's mass was kept."""
        self._close()
        if isinstance(trainer.logger, TensorBoardLogger) and self._mass_kept.any():
            middles = (_MASS_BINS[1:] + _MASS_BINS[:-1]) / 2
            trainer.logger.experiment.add_histogram_raw(
                "labels/mass_kept",
                min=float(_MASS_BINS[0]),
                max=float(_MASS_BINS[-1]),
                num=int(self._mass_kept.sum()),
                sum=float((self._mass_kept * middles).sum()),
                sum_squares=float((self._mass_kept * middles**2).sum()),
                bucket_limits=_MASS_BINS[1:].tolist(),
                bucket_counts=self._mass_kept.tolist(),
            )
        log.info("Soft labels are in %s (this process labelled %d tokens)", self.store, self.captured_tokens)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the store; what was appended stays."""
        self._close()

    def _close(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None


def sequence_key(header: StoreHeader, batch: dict[str, Any], row: int) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """Return a row's key, tokens [length], starts of its pieces and mask of supervised tokens [length].

    Args:
        header: What the labels are made with.
        batch: Batch of a data module, with ``lengths``.
        row: Index of the row.
    """
    length = int(batch["lengths"][row])
    tokens, positions, labels = (batch[name][row, :length].cpu() for name in ("input_ids", "position_ids", "labels"))
    layout = sequence_layout(positions, labels)
    return header.key(tokens.numpy(), *layout), tokens.numpy(), *layout


def to_sequences(header: StoreHeader, batch: dict[str, Any], prediction: CapturedLabels) -> list[tuple[bytes, StoredSequence]]:
    """Return the captured rows of a batch as keys and sequences to append.

    Args:
        header: What the labels are made with.
        batch: The batch that was predicted on.
        prediction: What the teacher said of it.
    """
    labels = prediction.labels.to(torch.device("cpu"))
    sequences, begin = [], 0
    for row, count in zip(prediction.rows, prediction.tokens_per_row):
        part = labels.where(slice(begin, begin + count))
        begin += count
        kept = part.ids >= 0
        key, tokens, starts, supervised = sequence_key(header, batch, row)
        sequence = StoredSequence(
            tokens=tokens if header.tokens == "stored" else np.empty(0, dtype=np.uint32),
            starts=starts,
            supervised=supervised,
            counts=part.counts.numpy(),
            ids=part.ids[kept].numpy(),
            probabilities=_bits(part.probabilities[kept]),
            tail=_bits(part.tail),
            realised=_bits(part.realised),
        )
        sequences.append((key, sequence))
    return sequences


def _bits(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)
