"""Attention in which each key/value head sees the first positions and as many of the last ones as its rule says.

Importing this makes ``from_pretrained`` apply the plan that a model's folder carries, and ``generate`` use a cache that forgets.
"""

from .cache import SpanCache
from .rules import DENSE, NOTICE, SpanPlan, SpanRule, full_layers, plan_of, refuse_plan
from .runtime import adopt_plan, apply_plan, load, remove_plan

__all__ = [
    "DENSE",
    "NOTICE",
    "SpanCache",
    "SpanPlan",
    "SpanRule",
    "adopt_plan",
    "apply_plan",
    "full_layers",
    "load",
    "plan_of",
    "refuse_plan",
    "remove_plan",
]
