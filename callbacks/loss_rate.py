"""How fast the loss falls, seen over a window of optimizer steps."""

import math
import statistics
from collections import deque
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..errors import InputError

PerformanceForm = Literal["deviation", "relative", "sum", "product"]
_FORMS = ("deviation", "relative", "sum", "product")
_EPSILON = 1e-8


def performance(losses: list[float], form: PerformanceForm = "deviation") -> float:
    """Return p(t) of a full window: above 0 while the loss falls, 0 on a plateau, below 0 when it rises.

    The published formula survives only as its list of symbols (the loss now and at the window's start, the window's mean and
    minimum, the deviation of that minimum from that mean); ``deviation`` is a reconstruction, the others are alternatives of the
    same symbols. With d = mean - min:

    * ``deviation``: (L(t-M) - L(t)) / d. Free of the loss's scale; about 2 on a steady fall.
    * ``relative``: (L(t-M) - L(t)) / |L(t-M)|.
    * ``sum``: relative + d / |mean|.
    * ``product``: relative * d / |mean|.

    Args:
        losses: L(t-M) to L(t), in order.
        form: Which formula.
    """
    first, last = losses[0], losses[-1]
    mean = statistics.fmean(losses)
    deviation = mean - min(losses)
    if form == "deviation":
        return (first - last) / (deviation + _EPSILON)
    relative = (first - last) / (abs(first) + _EPSILON)
    spread = deviation / (abs(mean) + _EPSILON)
    return relative + spread if form == "sum" else relative * spread if form == "product" else relative


class LossWindow:
    """The last losses of a run.

    Args:
        window: M, the steps between the two losses that are compared; the window holds M + 1.
        form: Formula of the performance.
        smoothing: Share of the newest value in the moving average that the window is filled with, in (0, 1]; 1 takes the losses
            as they are. A single batch's loss is noisy, and p(t) compares single points.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(self, window: int = 50, form: PerformanceForm = "deviation", smoothing: float = 1.0) -> None:
        if window < 1:
            raise InputError(f"window={window} compares nothing. Legal: 1 or more; below about 50 noise drives it.")
        if form not in _FORMS:
            raise InputError(f"form={form!r} is unknown. Legal: {', '.join(_FORMS)}.")
        if not 0 < smoothing <= 1:
            raise InputError(f"smoothing={smoothing} is no share. Legal: above 0, up to 1.")
        self.window, self.form, self.smoothing = window, form, smoothing
        self.losses: deque[float] = deque(maxlen=window + 1)

    def push(self, loss: float) -> None:
        """Add a step's loss; one that is not finite is left out."""
        if math.isfinite(loss):
            last = self.losses[-1] if self.losses else loss
            self.losses.append(last + self.smoothing * (loss - last))

    def performance(self) -> float | None:
        """Return p(t), or None before the window is full."""
        return performance(list(self.losses), self.form) if len(self.losses) > self.window else None


class StepLosses:
    """Makes of the batches' losses one of each optimizer step: the mean over its accumulated batches and over all ranks."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._step = 0

    def start(self, trainer: Trainer) -> None:
        """Start counting at the run's step."""
        self._step = trainer.global_step

    def add(self, trainer: Trainer, outputs: Any) -> float | None:
        """Add a batch; return the step's loss when it was the last of an optimizer step.

        Args:
            trainer: Behind the batch.
            outputs: What ``on_train_batch_end`` is given.
        """
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return None
        # Lightning divides a batch's loss by the number of accumulated batches.
        self._batches.append(loss.detach().float() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._step:
            return None
        self._step = trainer.global_step
        mean = trainer.strategy.reduce(torch.stack(self._batches).mean(), reduce_op="mean")
        self._batches.clear()
        return float(mean)


class LossRateWindow(Callback):
    """Logs ``loss_rate``, how fast the loss falls over the last optimizer steps; says nothing before its window is full.

    The loss of a step is the mean over its accumulated batches and over all ranks. Its state is part of checkpoints.

    Args:
        window: Optimizer steps between the losses that are compared. Below about 50, noise drives the figure.
        form: Formula: ``deviation``, ``relative``, ``sum`` or ``product``; see ``performance``.
        smoothing: Share of the newest loss in the moving average that is looked at, above 0, up to 1.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LossRateWindow(window=50)])
    """

    def __init__(self, window: int = 50, *, form: PerformanceForm = "deviation", smoothing: float = 1.0) -> None:
        self.losses = LossWindow(window, form, smoothing)
        self._steps = StepLosses()

    @property
    def performance(self) -> float | None:
        """p(t), or None before the window is full."""
        return self.losses.performance()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting at the run's step."""
        self._steps.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a batch; after an optimizer step, add the step and log."""
        loss = self._steps.add(trainer, outputs)
        if loss is None:
            return
        self.losses.push(loss)
        rate = self.performance
        if rate is not None:
            pl_module.log("loss_rate", rate)

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {"losses": list(self.losses.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window of a checkpoint."""
        self.losses.losses.extend(state_dict["losses"])
