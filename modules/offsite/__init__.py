"""Tuning and use of one model by an owner of its weights and parties that hold data."""

from .prefix import Prefix, PrefixSettings, behind_prefix, carried_over, plugged_in
from .split import ModelPart, with_virtual, without_virtual

__all__ = [
    "ModelPart",
    "Prefix",
    "PrefixSettings",
    "behind_prefix",
    "carried_over",
    "plugged_in",
    "with_virtual",
    "without_virtual",
]
