"""Learning-rate schedules for the command line's ``lr_scheduler``."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..errors import InputError


class WarmupCosine(LambdaLR):
    """Linear warm-up from 0, then a half cosine down to a share of the optimizer's learning rate.

    Args:
        optimizer: Optimizer whose learning rates are the peak.
        warmup: Share of all optimizer steps spent warming up, in [0, 1).
        floor: Learning rate at the end, as a share of the peak, in [0, 1].
        total_steps: Number of optimizer steps of the run; None takes the Trainer's estimate, of a run that goes on anew.

    Raises:
        InputError: If a share is out of range.
    """

    def __init__(self, optimizer: Optimizer, *, warmup: float = 0.1, floor: float = 0.1, total_steps: int | None = None) -> None:
        if not 0 <= warmup < 1:
            raise InputError(f"warmup={warmup} is no share of the run. Legal: 0 up to, not including, 1.")
        if not 0 <= floor <= 1:
            raise InputError(f"floor={floor} is no share of the learning rate. Legal: 0 to 1.")
        self.warmup, self.floor, self.total_steps = warmup, floor, total_steps
        self.estimated = total_steps is None
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if self.total_steps is None:  # before the Trainer has told; step 0 of a warm-up in any case
            return 1.0
        warm = self.warmup * self.total_steps
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / max(1.0, self.total_steps - warm))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def set_total_steps(self, total_steps: int) -> None:
        """Fix the length of the run and the learning rate of the first step.

        Args:
            total_steps: Number of optimizer steps.
        """
        self.total_steps = total_steps
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = peak * self._factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
