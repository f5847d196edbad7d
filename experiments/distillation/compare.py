"""Exact comparison of a student with its teacher on held-out text."""

from dataclasses import dataclass
from pathlib import Path

from ..cli import run


@dataclass
class Comparison:
    """Figures of a student on held-out text.

    Args:
        loss: Cross-entropy in nats per token.
        perplexity: Its exponential.
        bits_per_byte: The same in bits per byte of text.
        kl: KL(teacher, student) over the full vocabulary in nats per token.
        agreement: Share of tokens for which both models' likeliest token is the same.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    kl: float
    agreement: float


def compare(student: str, teacher: str, text: list[str], runs: Path, name: str) -> Comparison:
    """Validate a student against its teacher's full distribution.

    Args:
        student: Source of the student.
        teacher: Source of the teacher.
        text: Options of the command line that name the text.
        runs: Folder for the run.
        name: Name of the run.
    """
    words = ["validate", "-c", "distillation/online", "--model.source", student, "--model.student=null", *text]
    words += ["--model.teacher", teacher, "--trainer.logger=false", "--trainer.callbacks=null"]
    words += ["--runs_folder", str(runs.parent), "--experiment", runs.name, "--run", name]
    figures = run(words).trainer.callback_metrics
    return Comparison(*(float(figures[f"val_{name}"]) for name in ("loss", "perplexity", "bits_per_byte", "kl", "agreement")))
