"""Multi-task training with branch networks."""

from .branches import Answer, Branch, TransformerBranch
from .combination import FeatureWeighting, LeastSquaresProjector
from .module import MultiTask
from .objectives import Objective
from .trunk import Trunk

__all__ = [
    "Answer",
    "Branch",
    "FeatureWeighting",
    "LeastSquaresProjector",
    "MultiTask",
    "Objective",
    "TransformerBranch",
    "Trunk",
]
