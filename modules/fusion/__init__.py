"""Fusion of a large model into a small one by learned operators."""

from .baselines import AverageLayers, FreshModel, KeepLayers, LayerCollapse, ReplacementLayer
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
    "AverageLayers",
    "BestSelection",
    "BlockLocal",
    "Dense",
    "DepthCoefficients",
    "FreshModel",
    "FusionCompression",
    "FusionOperators",
    "FusionShape",
    "HeadRotations",
    "KeepLayers",
    "LayerCollapse",
    "LearnedFusion",
    "OperatorForms",
    "ReplacementLayer",
    "Selection",
    "fuse",
    "initial_operators",
    "materialise",
    "refit",
    "second_moments",
    "select_widths",
]
