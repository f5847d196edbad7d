"""What the suite's systems share: a source, its tokenizer, an optimizer and its schedule."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .precision import Dtype
from .pretrained import load_tokenizer, resolve_source
from .schedules import WarmupCosine


@dataclass
class Rehearsal:
    """A stage of training with models of the right shapes, from which memory and time are estimated.

    Args:
        name: Of the stage.
        models: What is held in memory, teachers too; what is trained requires gradients.
        read: Reads token ids int64 [rows, length] as training does, up to the states before the head [rows, length, hidden size].
        optimizer: Of the stage.
        vocabulary: Size of the head behind the states; 0 where none is trained on.
        head_trained: Whether that head is trained.
        teachers: Those of the models that read every batch, too, up to their logits, without a backward pass.
    """

    name: str
    models: list[nn.Module]
    read: Callable[[Tensor], Tensor]
    optimizer: OptimizerCallable
    vocabulary: int
    head_trained: bool = True
    teachers: Sequence[nn.Module] = ()


class PretrainedModule(LightningModule):
    """Base of systems that start from a pretrained model.

    Args:
        source: Model to start from; see ``modules.pretrained``.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory.
        parts: Arguments of a sub-class that are modules, which a checkpoint holds as such.

    Raises:
        InputError: If the source is unknown.
    """

    def __init__(
        self,
        source: str,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        weights: Dtype,
        parts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=parts)
        # Callables and objects would make the checkpoint unreadable with weights_only=True.
        self.remove_ignored_hparams([name for name, value in self.hparams.items() if not _is_plain(value)])
        self.source = resolve_source(source)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.weights: Dtype = weights
        self._first_step = 0  # of the optimizer at work
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source.name)
        return self._tokenizer

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = self._new_optimizer(self.optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        self._set_length(scheduler)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            settings |= {"interval": "epoch", "monitor": scheduler.monitor}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _new_optimizer(self, make: OptimizerCallable) -> Optimizer:
        """Return an optimizer of all that is trained."""
        optimizer = make([parameter for parameter in self.parameters() if parameter.requires_grad])
        # Fused ones can undo a loss scale by themselves, so that Lightning would not clip under any mixed precision.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def on_train_start(self) -> None:
        """Tell schedules how long the run is.

        Raises:
            InputError: If nothing says how many steps there will be.
        """
        if self._first_step > self.trainer.global_step:  # of an earlier run
            self._first_step = 0
        for each in self.trainer.lr_scheduler_configs:
            self._set_length(each.scheduler)
        if self.lr_scheduler is not None and not 0 < self.trainer.estimated_stepping_batches < math.inf:
            # One that begins with a later stage is not to fail then.
            self._set_length(self.lr_scheduler(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)))

    def _set_length(self, scheduler: Any) -> None:
        """Tell a schedule how long the run is, once the Trainer has its data.

        The estimate would make it prepare them, and data that were prepared before a checkpoint's loops were restored begin at
        the first batch again.
        """
        if isinstance(scheduler, WarmupCosine) and scheduler.estimated and self.trainer.train_dataloader is not None:
            steps = self.trainer.estimated_stepping_batches
            if not 0 < steps < math.inf:
                raise InputError(
                    "lr_scheduler: WarmupCosine follows the length of the run, and nothing says how many steps it has. Give "
                    "trainer.max_steps, or the schedule's total_steps."
                )
            scheduler.set_total_steps(int(steps) - self._first_step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the Trainer is told to; by norm also where FSDP divides the gradients, which Lightning leaves to the module."""
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[union-attr, operator]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """Return the stages of training, with models made of configs alone; called where tensors have no numbers.

        Args:
            data: The run's data module, which was not set up.
        """
        raise InputError(f"{type(self).__name__} cannot say what it holds in memory. Leave --dry_run out.")

    def why_not_sharded(self) -> str:
        """Return why the weights cannot be divided among devices; nothing where they can."""
        return ""

    def check_strategy(self, strategy: Strategy) -> None:
        """Raise an InputError for a strategy that divides weights, where they have to be whole."""
        reason = self.why_not_sharded()
        if reason and not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"strategy: {type(strategy).__name__} may split the weights, and {reason}. Legal: one device, or ddp."
            )

    def card_notice(self) -> str:
        """Return what a reader of the model card must know first; nothing for a model that runs everywhere as it is."""
        return ""

    def card_figures(self) -> dict[str, float]:
        """Return figures for the model card, beside those of validation."""
        return {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)
