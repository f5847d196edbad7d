"""Exports a trained prefix."""

import logging
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from ..errors import InputError
from ..files import check_replaceable
from ..modules.offsite import OffsitePrefixTuning

log = logging.getLogger(__name__)


class ExportPrefix(Callback):
    """At the end of ``fit``, writes the prefix as a folder, which replaces one of an earlier run when it is complete.

    Args:
        folder: Where to write; None is ``prefix`` in the run's folder.

    Raises:
        InputError: If the module is no ``OffsitePrefixTuning``, or ``folder`` holds something that is no prefix.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has no prefix, before training."""
        if not isinstance(pl_module, OffsitePrefixTuning):
            raise InputError(f"ExportPrefix exports the prefix of OffsitePrefixTuning, not of {type(pl_module).__name__}.")
        if self.folder is not None:
            check_replaceable(Path(self.folder), "prefix.json")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        if (getattr(trainer, "fast_dev_run", False) and self.folder is None) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, OffsitePrefixTuning)
        folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "prefix"
        pl_module.save_prefix(folder)
        log.info("Exported the prefix of step %d to %s", trainer.global_step, folder)
