"""A checkpoint to go on from, also of runs that are shorter than its interval."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..errors import InputError


class NewestCheckpoint(Checkpoint):
    """Keeps one checkpoint, ``checkpoints/newest.ckpt`` in the run's folder: of every n-th step, and of a run's last.

    So what has ended can be trained on with more steps. A new file takes the place of the old one when it is whole.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.

    Raises:
        InputError: If ``every_n_train_steps`` is below 1.
    """

    def __init__(self, every_n_train_steps: int = 100) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"every_n_train_steps={every_n_train_steps}: legal is 1 or more.")
        self.every_n_train_steps = every_n_train_steps
        self._saved = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, where it is time."""
        step = trainer.global_step
        if step == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if step % self.every_n_train_steps == 0 or _is_last(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, where a validation ended the run."""
        if trainer.global_step != self._saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved = trainer.global_step
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "newest.ckpt")

    def state_dict(self) -> dict[str, int]:
        """Return the step of the checkpoint: a run that goes on must not save within the accumulation of the next step."""
        return {"step": self._saved}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the step of the checkpoint that a run goes on from."""
        self._saved = state_dict["step"]


def _is_last(trainer: Trainer) -> bool:
    if trainer.should_stop or trainer.global_step == trainer.max_steps:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
