"""The trainable systems, one LightningModule per method, and what they are made of."""

from .distillation import SoftLabelDistillation, SoftLabelTeacher
from .fusion import FusionCompression
from .language_model import LanguageModel
from .multitask import FeatureWeighting, MultiTask, TransformerBranch
from .offsite import EmulatorDistillation, OffsitePrefixTuning
from .optimizers import MuonAdamW
from .schedules import WarmupCosine
from .spans import SpanPruning

__all__ = [
    "EmulatorDistillation",
    "FeatureWeighting",
    "FusionCompression",
    "LanguageModel",
    "MultiTask",
    "MuonAdamW",
    "OffsitePrefixTuning",
    "SoftLabelDistillation",
    "SoftLabelTeacher",
    "SpanPruning",
    "TransformerBranch",
    "WarmupCosine",
]
