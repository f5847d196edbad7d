"""Writes the text that ``predict`` generates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class TextWriter(BasePredictionWriter):
    """Appends every prompt and its text as a JSON line, batch by batch; each rank writes a file of its own.

    Args:
        file: File to write, of several ranks with ``-<rank>`` behind the name; None is ``text-<rank>.jsonl`` in the run's folder.
    """

    def __init__(self, file: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.file = file

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append one batch, if it is text."""
        if not isinstance(prediction, list):
            return
        path = Path(self.file) if self.file else Path(trainer.default_root_dir) / "text.jsonl"
        if not self.file or trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}-{trainer.global_rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)
