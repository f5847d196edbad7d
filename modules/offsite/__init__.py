"""Tuning and use of one model by an owner of its weights and parties that hold data."""

from .client import OwnerAccess
from .distillation import EmulatorDistillation
from .emulator import EmulatorManifest, EmulatorSpec
from .module import OffsitePrefixTuning
from .prefix import Prefix, PrefixSettings, StandsFor, behind_prefix, carried_over, plugged_in
from .split import ModelPart, with_virtual, without_virtual

__all__ = [
    "EmulatorDistillation",
    "EmulatorManifest",
    "EmulatorSpec",
    "ModelPart",
    "OffsitePrefixTuning",
    "OwnerAccess",
    "Prefix",
    "PrefixSettings",
    "StandsFor",
    "behind_prefix",
    "carried_over",
    "plugged_in",
    "with_virtual",
    "without_virtual",
]
