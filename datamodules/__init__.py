"""The data of the methods, one LightningDataModule per kind."""

from .instructions import InstructionDataModule
from .parties import PartyDataModule
from .self_generated import SelfGeneratedCalibration
from .soft_labels import SoftLabelDataModule
from .text import TextDataModule

__all__ = ["InstructionDataModule", "PartyDataModule", "SelfGeneratedCalibration", "SoftLabelDataModule", "TextDataModule"]
