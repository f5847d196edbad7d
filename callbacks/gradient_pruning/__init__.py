"""Gradient pruning for data-parallel training on slow networks."""

from .callback import GradientPruning
from .policy import Adaptive, FixedRate, Measurement, PruningPolicy, PublishedRule

__all__ = ["Adaptive", "FixedRate", "GradientPruning", "Measurement", "PruningPolicy", "PublishedRule"]
