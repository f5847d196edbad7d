"""Attention spans chosen on a model's own answers: profiles, plans, and the system that makes them; and what runs them."""

from ..span_attention import DENSE, SpanCache, SpanPlan, SpanRule, apply_plan, load, plan_of, remove_plan
from .module import SpanPruning
from .planners import Ablation, HeadGates, InductionHeads, Influence, Shuffled, SpanPlanner, UniformWindow
from .profiler import CandidateRules, SpanProfile, SpanProfiler
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
