"""Counts tokens and the seconds that were spent on them."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TokenRate(Callback):
    """Logs ``tokens_per_second`` of training, and keeps the totals of training or prediction of this process.

    Validation, checkpoints and the start are not counted: the clock runs from one batch's start to its end, the loading of
    the batch included.

    Attributes:
        tokens: Tokens of all batches so far.
        seconds: Seconds spent on them.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a batch and log the rate so far."""
        self._add(batch)
        if self.seconds:
            pl_module.log("tokens_per_second", self.tokens / self.seconds, prog_bar=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of validation out."""
        self._since = time.perf_counter()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch."""
        self._add(batch)

    def _add(self, batch: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        if isinstance(batch, dict) and "input_ids" in batch:
            self.tokens += batch["input_ids"].numel()
