"""Distillation from compressed soft labels: the teacher, the student's system, the losses."""

from .labels import LabelSettings, SoftLabels
from .module import SoftLabelDistillation
from .teacher import SoftLabelTeacher

__all__ = ["LabelSettings", "SoftLabelDistillation", "SoftLabelTeacher", "SoftLabels"]
