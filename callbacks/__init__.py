"""Callbacks that work in any Lightning Trainer."""

from .export_pretrained import ExportPretrained
from .soft_label_writer import SoftLabelWriter

__all__ = ["ExportPretrained", "SoftLabelWriter"]
