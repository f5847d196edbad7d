"""Gradient pruning for data-parallel training on slow networks."""

from .adaptive import Adaptive
from .callback import GradientPruning
from .policy import FixedRate, Measurement, PruningPolicy, PublishedRule

__all__ = ["Adaptive", "FixedRate", "GradientPruning", "Measurement", "PruningPolicy", "PublishedRule"]
