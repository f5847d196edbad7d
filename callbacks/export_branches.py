"""Exports the branches of a multi-task model as folders that plain ``transformers`` loads."""

import logging
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from ..errors import InputError, nearest
from ..files import atomic_folder, check_replaceable
from ..modules.multitask import MultiTask
from .export_pretrained import model_card

log = logging.getLogger(__name__)

_USES = {"next_token": "text-generation", "token": "token-classification"}


class ExportBranches(Callback):
    """At the end of ``fit``, writes shared layers and one branch as a plain model, for each task where there is such a model.

    Those are causal language models behind a decoder; classifiers of texts, classifiers of tokens and regressions behind an
    encoder. The log names the tasks that have none; ``predict`` answers those.

    Args:
        folder: Where to write a folder for each task; None is ``export`` in the run's folder.
        tasks: Tasks to write, of text tasks with their aim; None writes all that can be.
        dtype: Type of the exported weights: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        InputError: If ``dtype`` is unknown; before training, if the module is no ``MultiTask``, a task is not among its own,
            the strategy divides weights, or ``folder`` holds something else under a task's name.
    """

    def __init__(self, folder: str | None = None, *, tasks: list[str] | None = None, dtype: str = "bfloat16") -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"dtype={dtype!r} is unknown. Legal: float32, bfloat16, float16.")
        self.folder, self.tasks, self.dtype = folder, tasks, dtype
        self.written: list[Path] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be exported, before training."""
        if not isinstance(pl_module, MultiTask):
            raise InputError(f"ExportBranches exports a MultiTask, not a {type(pl_module).__name__}.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"ExportBranches needs whole weights, which {type(trainer.strategy).__name__} may divide. Leave it out of "
                "trainer.callbacks, or use one device or ddp."
            )
        for task in self.tasks or []:
            if task not in pl_module.objectives:
                raise InputError(f"tasks has {task!r}, which the model has not.{nearest(task, pl_module.objectives)}")
            reason = pl_module.why_not_plain(task)
            if reason is not None:
                raise InputError(f"tasks: {task!r} cannot be exported to transformers: {reason}. Leave it out.")
        if self.folder is not None:
            for task in pl_module.objectives:
                check_replaceable(Path(self.folder) / task, "config.json")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folders."""
        if not trainer.is_global_zero or (getattr(trainer, "fast_dev_run", False) and self.folder is None):
            return
        assert isinstance(pl_module, MultiTask)
        root = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "export"
        for task, objective in pl_module.objectives.items():
            if self.tasks is not None and task not in self.tasks:
                continue
            reason = pl_module.why_not_plain(task)
            if reason is not None:
                log.info("Not exported: %s, since %s", task, reason)
                continue
            plain = pl_module.plain_model(task).to(getattr(torch, self.dtype))
            figures = {
                name: float(value)
                for name, value in sorted(trainer.callback_metrics.items())
                if name.startswith("val_") and name.partition("/")[2] == task
            }
            card = model_card(
                trainer, pl_module, plain, trainer.global_step, figures, _USES.get(objective.kind, "text-classification")
            )
            with atomic_folder(root / task) as new:
                plain.save_pretrained(new)
                pl_module.tokenizer.save_pretrained(new)
                (new / "README.md").write_text(card, "utf-8")
            self.written.append(root / task)
            log.info("Exported %s to %s", task, root / task)
