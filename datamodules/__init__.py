"""The data of the methods, one LightningDataModule per kind."""

from .instructions import InstructionDataModule
from .soft_labels import SoftLabelDataModule
from .text import TextDataModule

__all__ = ["InstructionDataModule", "SoftLabelDataModule", "TextDataModule"]
