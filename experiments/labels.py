"""``fulgurite labels``: statistics and verification of a soft-label store, and how two vocabularies fit together."""

import json

import numpy as np
from jsonargparse import auto_cli
from rich.progress import track

from ..datamodules.soft_labels import SoftLabelStore
from ..errors import InputError
from ..modules.distillation.alignment import VocabularyAlignment
from ..modules.pretrained import load_tokenizer, token_bytes


def stats(store: str) -> None:
    """Print what a store holds, as JSON: teacher, settings, counts, bytes a token, mass kept.

    Args:
        store: Folder of the store.
    """
    print(json.dumps(SoftLabelStore(store).stats(), indent=2))


def verify(store: str) -> None:
    """Read every block of a store and check it; the exit status is 2 at the first one that is damaged.

    Args:
        store: Folder of the store.
    """
    opened = SoftLabelStore(store)
    checked = sum(1 for _ in track(opened.verify(), total=len(opened), description="Verifying"))
    print(f"{store}: {checked} sequences, all whole")


def align(teacher_tokenizer: str, student_tokenizer: str, *, examples: int = 8) -> None:
    """Print, as JSON, how many of a teacher's tokens a student's tokenizer has too, and what becomes of some others.

    Args:
        teacher_tokenizer: Source of the teacher (see ``model.source``), or of its tokenizer alone.
        student_tokenizer: Source of the student.
        examples: Tokens that are shown: what each spells, and what its first piece does.
    """
    if examples < 0:
        raise InputError(f"examples={examples} is below 0. Legal: 0 or more.")
    teacher, student = (load_tokenizer(source) for source in (teacher_tokenizer, student_tokenizer))
    spelled, own = token_bytes(teacher), token_bytes(student)
    aligned = VocabularyAlignment.of(teacher, student)
    text = aligned.ids >= 0
    pieces = np.flatnonzero(text & ~aligned.exact)
    shown = pieces[:: max(1, len(pieces) // max(examples, 1))][:examples]
    found = {
        "teacher_tokens": len(aligned.ids),
        "student_tokens": len(own),
        "exact": float(aligned.exact.mean()),
        "first_piece": float((text & ~aligned.exact).mean()),
        "none": float((~text).mean()),
        "examples": {_shown(spelled[number]): _shown(own[aligned.ids[number]]) for number in shown},
    }
    print(json.dumps(found, indent=2, ensure_ascii=False))


def _shown(part: bytes | None) -> str:
    return (part or b"").decode("utf-8", errors="backslashreplace")


def main(arguments: list[str]) -> None:
    """Run a command with the words of a command line."""
    auto_cli({"stats": stats, "verify": verify, "align": align}, args=arguments, prog="fulgurite labels", as_positional=True)
