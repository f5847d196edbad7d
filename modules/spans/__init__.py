"""Attention spans: each key/value head sees the first positions and as many of the last ones as its rule says.

Importing this makes ``from_pretrained`` apply the plan that a model's folder carries.
"""

from .cache import SpanCache
from .rules import DENSE, SpanPlan, SpanRule, plan_of
from .runtime import apply_plan, load, remove_plan

__all__ = ["DENSE", "SpanCache", "SpanPlan", "SpanRule", "apply_plan", "load", "plan_of", "remove_plan"]
