"""The Trainer of the command line, which can choose the precision that the machine computes in at speed."""

import logging
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer

from ..modules.precision import compute_device, fast_in_bfloat16

log = logging.getLogger("fulgurite")

Precision = Literal["auto"] | _PRECISION_INPUT


def chosen_precision(precision: Precision | None, accelerator: Any = None) -> _PRECISION_INPUT | None:
    """Return a precision that Lightning's Trainer takes.

    Args:
        precision: What a setting says: ``auto`` becomes ``bf16-mixed`` where that is fast and ``32-true`` elsewhere; anything
            else stays, with a warning where it is slow.
        accelerator: Of the Trainer; None finds one, as it does.
    """
    device = "cpu" if accelerator in ("cpu", "mps") else compute_device()
    fast = fast_in_bfloat16(device)
    if precision == "auto":
        return "bf16-mixed" if fast else "32-true"
    on_processor = accelerator == "cpu" or not (device == "cuda" or torch.backends.mps.is_available())
    if on_processor and not fast and str(precision).startswith("bf16"):
        log.warning(
            "trainer.precision=%s: this processor has no instructions for bfloat16; float32 is many times faster here. Use auto.",
            precision,
        )
    return precision


class AutoPrecisionTrainer(Trainer):
    """Lightning's Trainer, with ``precision: auto``.

    Args:
        precision: ``auto`` is ``bf16-mixed`` where the machine multiplies bfloat16 fast, ``32-true`` elsewhere; or a precision of
            ``Trainer``.
        settings: See ``Trainer``.
    """

    def __init__(self, *, precision: Precision | None = None, **settings: Any) -> None:
        super().__init__(precision=chosen_precision(precision, settings.get("accelerator")), **settings)
