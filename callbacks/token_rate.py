"""Counts tokens and the seconds that were spent on them."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TokenRate(Callback):
    """Logs ``tokens_per_second`` of training, and keeps the totals of training or prediction of this process.

    The clock runs from the start of a batch to its end: loading, validation and checkpoints are not counted. A run that goes
    on from a checkpoint goes on counting.

    Attributes:
        tokens: Tokens of all batches so far.
        sequences: Rows of all batches so far.
        seconds: Seconds spent on them.
    """

    def __init__(self) -> None:
        self.tokens = self.sequences = 0
        self.seconds = 0.0
        self._since = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a batch and log the rate so far."""
        self._add(batch)
        pl_module.log("tokens_per_second", self.tokens / self.seconds, prog_bar=True)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch, unless a capture that goes on had stored it already."""
        if outputs is not None:
            self._add(batch)

    def _add(self, batch: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        for part in batch.get("views", [batch]) if isinstance(batch, dict) else []:  # a multi-task batch has several
            if "input_ids" in part:
                self.tokens += part["input_ids"].numel()
                self.sequences += len(part["input_ids"])

    def state_dict(self) -> dict[str, float]:
        """Return the totals, for a run that goes on."""
        return {"tokens": self.tokens, "sequences": self.sequences, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from the totals of a checkpoint."""
        self.tokens, self.seconds = int(state_dict["tokens"]), state_dict["seconds"]
        self.sequences = int(state_dict.get("sequences", 0))  # not in older checkpoints
