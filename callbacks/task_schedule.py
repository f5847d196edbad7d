"""Adds tasks one after another, as ERNIE 2.0's continual multi-task learning does."""

from lightning.pytorch import Callback, LightningModule, Trainer

from ..datamodules.multitask import MultiTaskDataModule
from ..errors import InputError, nearest


class TaskSchedule(Callback):
    """Tasks that join at a step; those before go on being trained (Sun et al., ERNIE 2.0, arXiv 1907.12412).

    Args:
        starts: Optimizer step at which a task joins, by name; those not named are there from the start.

    Raises:
        InputError: If a step is below 0; before training, if a name is no task of the data, or none is there from the start.
    """

    def __init__(self, starts: dict[str, int]) -> None:
        for name, step in starts.items():
            if step < 0:
                raise InputError(f"starts.{name}={step} is below 0. Legal: an optimizer step, 0 or more.")
        self.starts = starts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data, before it makes its batches."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultiTaskDataModule):
            raise InputError("TaskSchedule needs MultiTaskDataModule, which has tasks to add.")
        for name in self.starts:
            if name not in data.tasks:
                raise InputError(f"starts has {name!r}, which is no task of the data.{nearest(name, data.tasks)}")
        if all(self.starts.get(name, 0) for name in data.tasks):
            raise InputError(f"starts={self.starts}: no task is there from the start. Leave one out, or give it 0.")
        data.schedule = dict(self.starts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse tasks that would never join, now that it is known how long the run is."""
        steps = trainer.estimated_stepping_batches
        for name, start in self.starts.items():
            if start >= steps:
                raise InputError(
                    f"starts.{name}={start}: the run ends after {steps} optimizer steps. Legal: 0 to {int(steps) - 1}; or give "
                    "trainer.max_steps or max_epochs more."
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the data as it was, for another Trainer."""
        trainer.datamodule.schedule = {}  # type: ignore[attr-defined]
