"""Callbacks that work in any Lightning Trainer."""

from .export_branches import ExportBranches
from .export_prefix import ExportPrefix
from .export_pretrained import ExportPretrained
from .gradient_pruning import Adaptive, FixedRate, GradientPruning, PruningPolicy, PublishedRule
from .loss_rate import LossRateWindow
from .newest_checkpoint import NewestCheckpoint
from .soft_label_writer import SoftLabelWriter
from .task_schedule import TaskSchedule
from .text_writer import TextWriter
from .token_rate import TokenRate
from .train_progress import TrainProgress
from .train_until import TrainUntilCondition

__all__ = [
    "Adaptive",
    "ExportBranches",
    "ExportPrefix",
    "ExportPretrained",
    "FixedRate",
    "GradientPruning",
    "LossRateWindow",
    "NewestCheckpoint",
    "PruningPolicy",
    "PublishedRule",
    "SoftLabelWriter",
    "TaskSchedule",
    "TextWriter",
    "TokenRate",
    "TrainProgress",
    "TrainUntilCondition",
]
