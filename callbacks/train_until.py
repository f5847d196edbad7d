"""Ends a stage of training when the loss says so."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..errors import InputError, nearest
from .loss_rate import StepLosses

log = logging.getLogger(__name__)


class TrainUntilCondition(Callback):
    """Trains until the loss is below a bound, no longer falls, or a number of steps is spent: whichever comes first.

    A module with stages (it has ``begin_next_stage``) then begins its next one; the last is ended by the Trainer's own limits. Of
    any other module the training ends.

    Args:
        below: The loss, as a mean over the last ``window`` steps, in nats.
        flat: Share of the loss by which the mean over the last ``window`` steps has to lie below that of the ``window`` before;
            where it lies no more than that below, the loss no longer falls.
        window: Optimizer steps of a mean.
        max_steps: Optimizer steps of a stage; of each in turn, where the last number holds for all that follow; or by the
            stages' names, where those that are not named have no limit.

    Raises:
        InputError: If a value is out of range, or there is no condition at all.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrainUntilCondition(flat=0.005, window=20, max_steps=500)])
    """

    def __init__(
        self,
        *,
        below: float | None = None,
        flat: float | None = None,
        window: int = 20,
        max_steps: int | list[int] | dict[str, int] | None = None,
    ) -> None:
        if below is None and flat is None and max_steps is None:
            raise InputError("TrainUntilCondition has no condition: give below, flat or max_steps.")
        if flat is not None and not 0 <= flat < 1:
            raise InputError(f"flat={flat} is no share of a loss. Legal: 0 up to 1.")
        if window < 1:
            raise InputError(f"window={window} holds no step. Legal: 1 or more.")
        limits = [max_steps] if isinstance(max_steps, int) else max_steps
        numbers = limits.values() if isinstance(limits, dict) else limits
        if numbers is not None and (not numbers or min(numbers) < 1):
            raise InputError(
                f"max_steps={max_steps} trains nothing. Legal: 1 or more, a list of such, one a stage, or such by a stage's name."
            )
        self.below, self.flat, self.window, self.limits = below, flat, window, limits
        self._steps = StepLosses()
        self._losses: deque[float] = deque(maxlen=2 * window)
        self._count = self._ended = 0

    def reason(self, stage: str = "") -> str | None:
        """Return which condition holds for the steps seen so far in this stage, in words; None if none does.

        Args:
            stage: Its name, if it has one.
        """
        losses = list(self._losses)
        recent = losses[-self.window :]
        if self.below is not None and len(recent) == self.window and statistics.fmean(recent) < self.below:
            return f"the loss's mean over {self.window} steps is below {self.below}"
        if self.flat is not None and len(losses) == 2 * self.window:
            before, now = statistics.fmean(losses[: self.window]), statistics.fmean(recent)
            if before - now <= self.flat * abs(before):
                return f"the loss fell by no more than {100 * self.flat:g} % over {self.window} steps"
        limit: int | None = None
        if isinstance(self.limits, dict):
            limit = self.limits.get(stage)
        elif self.limits is not None:
            limit = self.limits[min(self._ended, len(self.limits) - 1)]
        if limit is not None and self._count >= limit:
            return f"its {limit} steps are spent"
        return None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting at the run's step.

        Raises:
            InputError: If ``max_steps`` names stages that the module cannot have.
        """
        known: tuple[str, ...] = getattr(pl_module, "STAGES", ())
        if isinstance(self.limits, dict) and not known:
            raise InputError(f"max_steps={self.limits}: {type(pl_module).__name__} has no stages with names. Give a number.")
        for name in self.limits if isinstance(self.limits, dict) else ():
            if name not in known:
                raise InputError(f"max_steps={self.limits}: there is no stage {name!r}.{nearest(name, known)}")
        self._steps.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step, and end the stage where a condition holds."""
        loss = self._steps.add(trainer, outputs)
        if loss is None or getattr(pl_module, "in_last_stage", False):
            return
        self._count += 1
        if math.isfinite(loss):
            self._losses.append(loss)
        reason = self.reason(getattr(pl_module, "stage_name", ""))
        if reason is None:
            return
        log.info("Step %d: %s", trainer.global_step, reason)
        self._losses.clear()
        self._count = 0
        self._ended += 1
        begin_next_stage = getattr(pl_module, "begin_next_stage", None)
        if begin_next_stage is None:
            trainer.should_stop = True
        else:
            begin_next_stage()

    def state_dict(self) -> dict[str, Any]:
        """Return the stage's steps."""
        return {"losses": list(self._losses), "count": self._count, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the stage of a checkpoint."""
        self._losses.extend(state_dict["losses"])
        self._count, self._ended = state_dict["count"], state_dict["ended"]
