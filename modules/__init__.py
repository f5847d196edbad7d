"""The trainable systems, one LightningModule per method, and what they are made of."""

from .distillation import SoftLabelDistillation, SoftLabelTeacher
from .fusion import FusionCompression
from .language_model import LanguageModel
from .schedules import WarmupCosine
from .spans import SpanPruning

__all__ = ["FusionCompression", "LanguageModel", "SoftLabelDistillation", "SoftLabelTeacher", "SpanPruning", "WarmupCosine"]
