"""Attention spans: each key/value head sees the first positions and as many of the last ones as its rule says.

Importing this makes ``from_pretrained`` apply the plan that a model's folder carries.
"""

from .cache import SpanCache
from .module import SpanPruning
from .planners import Ablation, HeadGates, InductionHeads, Influence, Shuffled, SpanPlanner, UniformWindow
from .profiler import CandidateRules, SpanProfile, SpanProfiler
from .rules import DENSE, SpanPlan, SpanRule, plan_of
from .runtime import apply_plan, load, remove_plan
from .solver import Budget

__all__ = [
    "DENSE",
    "Ablation",
    "Budget",
    "CandidateRules",
    "HeadGates",
    "InductionHeads",
    "Influence",
    "Shuffled",
    "SpanCache",
    "SpanPlan",
    "SpanPlanner",
    "SpanProfile",
    "SpanProfiler",
    "SpanPruning",
    "SpanRule",
    "UniformWindow",
    "apply_plan",
    "load",
    "plan_of",
    "remove_plan",
]
