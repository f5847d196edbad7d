"""The data of the methods, one LightningDataModule per kind."""

from .instructions import InstructionDataModule
from .multitask import (
    ClassificationTask,
    GenerationTask,
    MultiTaskDataModule,
    RegressionTask,
    TaggingTask,
    TextTask,
)
from .parties import PartyDataModule
from .self_generated import SelfGeneratedCalibration
from .soft_labels import SoftLabelDataModule
from .text import TextDataModule

__all__ = [
    "ClassificationTask",
    "GenerationTask",
    "InstructionDataModule",
    "MultiTaskDataModule",
    "PartyDataModule",
    "RegressionTask",
    "SelfGeneratedCalibration",
    "SoftLabelDataModule",
    "TaggingTask",
    "TextDataModule",
    "TextTask",
]
