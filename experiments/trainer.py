"""The Trainer of the command line, which can choose the precision that the machine computes in at speed."""

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import MixedPrecision
from transformers.modeling_layers import GradientCheckpointingLayer

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
    device = "cpu" if accelerator in ("cpu", "mps") else "cuda" if accelerator in ("gpu", "cuda") else compute_device()
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


class LayerwiseFSDPStrategy(FSDPStrategy):
    """FSDP of transformers: divided layer by layer, so that one layer at a time is whole, and with buffers in float32.

    Lightning's own takes the model as one unit, and rounds the frequencies of rotary positions to bfloat16.

    Args:
        settings: See ``FSDPStrategy``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"auto_wrap_policy": {GradientCheckpointingLayer}, **settings})

    def setup(self, trainer: Trainer) -> None:
        """Divide the model, and tell it where it is, which Lightning leaves out: frozen teachers go there by themselves."""
        super().setup(trainer)
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """See ``FSDPStrategy``."""
        config = super().mixed_precision_config
        return None if config is None else replace(config, buffer_dtype=torch.float32)


_SHARDED: dict[str, dict[str, Any]] = {"fsdp": {}, "fsdp_cpu_offload": {"cpu_offload": True}}


class AutoPrecisionTrainer(Trainer):
    """Lightning's Trainer, with ``precision: auto``, and ``strategy: fsdp`` by ``LayerwiseFSDPStrategy``.

    Args:
        precision: ``auto`` is ``bf16-mixed`` where the machine multiplies bfloat16 fast, ``32-true`` elsewhere; or a precision of
            ``Trainer``.
        settings: See ``Trainer``.
    """

    def __init__(self, *, precision: Precision | None = None, **settings: Any) -> None:
        strategy = settings.get("strategy")
        if isinstance(strategy, str) and strategy in _SHARDED:
            settings["strategy"] = LayerwiseFSDPStrategy(**_SHARDED[strategy])
        super().__init__(precision=chosen_precision(precision, settings.get("accelerator")), **settings)
