"""Tuning and use of one model by an owner of its weights and parties that hold data."""

from .prefix import Prefix, PrefixSettings, behind_prefix, carried_over, plugged_in

__all__ = ["Prefix", "PrefixSettings", "behind_prefix", "carried_over", "plugged_in"]
