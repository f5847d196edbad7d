"""Shows how far a run is."""

from lightning.pytorch.callbacks import RichProgressBar


class TrainProgress(RichProgressBar):
    """Lightning's progress bar, with the batches that the run will take.

    Lightning's own counts those of a whole epoch where gradients are accumulated or an epoch is gone on with, and calls the last
    epoch -2 where the number of steps ends the run.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, or as many as the steps that are left need, where that is fewer."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        left = max(0, trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return f"Epoch {current_epoch + 1} of {epochs}" if epochs is not None and epochs > 0 else f"Epoch {current_epoch + 1}"
