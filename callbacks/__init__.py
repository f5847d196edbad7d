"""Callbacks that work in any Lightning Trainer."""

from .export_pretrained import ExportPretrained
from .soft_label_writer import SoftLabelWriter
from .text_writer import TextWriter
from .token_rate import TokenRate

__all__ = ["ExportPretrained", "SoftLabelWriter", "TextWriter", "TokenRate"]
