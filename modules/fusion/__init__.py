"""Fusion of a large model into a small one by learned operators: its parts."""

from .fused import DepthCoefficients, FusionOperators, fuse, materialise
from .initial import OperatorForms, initial_operators
from .operators import BlockLocal, Dense, HeadRotations, Selection
from .refit import refit
from .selection import select_widths
from .shape import FusionShape
from .statistics import second_moments

__all__ = [
    "BlockLocal",
    "Dense",
    "DepthCoefficients",
    "FusionOperators",
    "FusionShape",
    "HeadRotations",
    "OperatorForms",
    "Selection",
    "fuse",
    "initial_operators",
    "materialise",
    "refit",
    "second_moments",
    "select_widths",
]
