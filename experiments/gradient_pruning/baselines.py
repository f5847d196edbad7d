"""What gradient pruning is compared with: PyTorch's own communication hooks, on any backend; and a clock that all share."""

import json
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ...errors import InputError
from ...files import write_json


class CompressionHook(Callback):
    """Registers one of PyTorch's hooks; Lightning would register it on CUDA alone.

    Args:
        kind: ``float16``; ``powersgd`` (arXiv 1905.13727); or ``none``, which sends nothing, to see what a network costs.
        rank: Rank of PowerSGD's matrices.
        start_step: Steps of plain all-reduce before PowerSGD begins, at least 2.
    """

    def __init__(self, kind: Literal["float16", "powersgd", "none"] = "float16", *, rank: int = 1, start_step: int = 8) -> None:
        if kind not in ("float16", "powersgd", "none"):
            raise InputError(f"kind={kind!r} is unknown. Legal: float16, powersgd, none.")
        self.kind, self.rank, self.start_step = kind, rank, start_step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hook, where there is DDP."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            return
        if self.kind != "powersgd":
            model.register_comm_hook(None, fp16_compress_hook if self.kind == "float16" else noop_hook)
            return
        state = PowerSGDState(None, matrix_approximation_rank=self.rank, start_powerSGD_iter=self.start_step)
        model.register_comm_hook(state, powerSGD_hook)


class StepLog(Callback):
    """Writes when each step ended, in seconds of training alone, with what was sent until then, what was logged, and losses.

    Args:
        file: JSON file that rank 0 writes when training ends.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.seconds = 0.0
        self.steps: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a step."""
        step = time.perf_counter() - self._begin
        self.seconds += step
        names = ("prune_rate", "exposed_seconds", "bandwidth_mbit", "packing_seconds")
        logged = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        self.steps.append({"at": self.seconds, "clock": time.time(), "seconds": step, "sent_bytes": _sent_bytes(), **logged})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a validation loss."""
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val_loss"])
            self.validations.append({"step": trainer.global_step, "at": self.seconds, "loss": loss})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            write_json(self.file, {"steps": self.steps, "validations": self.validations})


def _sent_bytes() -> int:
    """Return what this process's network has sent over links, headers included."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines if not line.strip().startswith("lo:"))


def read_log(file: Path) -> dict[str, list[dict[str, float]]]:
    """Return what a ``StepLog`` wrote."""
    return dict(json.loads(file.read_text("utf-8")))
