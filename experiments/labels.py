"""``fulgurite labels``: what a soft-label store holds, its ways to and from Parquet, and how two vocabularies fit together."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from rich.progress import track

from ..datamodules.soft_labels import SoftLabelStore
from ..datamodules.soft_labels.parquet import export_parquet, import_parquet
from ..datamodules.soft_labels.picture import draw_label_stats
from ..errors import InputError
from ..modules.distillation.alignment import Spelling, VocabularyAlignment
from ..modules.pretrained import load_tokenizer
from ..modules.tokens import token_bytes
from .parsing import Parser


def stats(store: str, *, picture: str | None = None) -> None:
    """Print what a store holds and costs, as JSON: bytes by column, kept labels and mass, and what rounding can cost.

    Args:
        store: Folder of the store.
        picture: PNG file to draw histograms of kept labels, tail mass and error bound into.
    """
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise InputError(f"picture={picture!r} is no PNG file. Give a name that ends in .png.")
    found = SoftLabelStore(store).stats()
    print(json.dumps(found.summary(), indent=2, ensure_ascii=False))
    if picture is not None:
        draw_label_stats(found, Path(picture))


def export(store: str, file: str) -> None:
    """Write a store as a Parquet file, a row a sequence, which datasets and other tools read.

    Args:
        store: Folder of the store.
        file: Parquet file to write.
    """
    print(f"{file}: {export_parquet(SoftLabelStore(store), Path(file))} sequences")


def import_labels(
    file: str, store: str, *, teacher: str, tokenizer: str, vocabulary: int | None = None, temperature: float = 1.0
) -> None:
    """Make a store of top log-probabilities that a teacher said elsewhere, such as an inference server's.

    Args:
        file: Parquet file with the columns input_ids, top_ids and top_log_probabilities; docs/soft-label-format.md describes it.
        store: Folder of the store, made when missing.
        teacher: Name of the teacher.
        tokenizer: Source of the teacher's tokenizer.
        vocabulary: Number of ids of the teacher's head; the tokenizer's when not given.
        temperature: That the log-probabilities were made with.
    """
    count = import_parquet(
        Path(file),
        Path(store),
        teacher=teacher,
        tokenizer=load_tokenizer(tokenizer),
        vocabulary=vocabulary,
        temperature=temperature,
    )
    print(f"{store}: {count} sequences")


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
    spelling, own = Spelling.of(teacher), token_bytes(student)
    spelled, aligned = spelling.tokens, VocabularyAlignment.of(spelling, student)
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


_COMMANDS: dict[str, Any] = {"stats": stats, "verify": verify, "align": align, "export": export, "import": import_labels}


def main(arguments: list[str]) -> None:
    """Run a command with the words of a command line."""
    # --teacher-tokenizer is as good as --teacher_tokenizer
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    by_name = words[:1] in (["align"], ["import"])  # of several things alike, which is which is said
    auto_cli(_COMMANDS, args=words, prog="fulgurite labels", as_positional=not by_name, parser_class=Parser)
