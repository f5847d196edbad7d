"""Fusion of a large model into a small one by learned operators."""

from .fused import DepthCoefficients, FusionOperators, fuse, materialise
from .initial import OperatorForms, initial_operators
from .module import FusionCompression
from .operators import BlockLocal, Dense, HeadRotations, Selection
from .refit import refit
from .selection import select_widths
from .shape import FusionShape
from .starts import BestSelection, LearnedFusion
from .statistics import second_moments

__all__ = [
    "BestSelection",
    "BlockLocal",
    "Dense",
    "DepthCoefficients",
    "FusionCompression",
    "FusionOperators",
    "FusionShape",
    "HeadRotations",
    "LearnedFusion",
    "OperatorForms",
    "Selection",
    "fuse",
    "initial_operators",
    "materialise",
    "refit",
    "second_moments",
    "select_widths",
]
