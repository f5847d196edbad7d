"""Texts with answers, and what is measured on them: once each, kept in the cache, shared out among processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ...errors import InputError
from ...files import cache_folder, digest, write_atomic
from ..pretrained import model_identity

Loss = Literal["margin", "cross_entropy"]

Made = TypeVar("Made")


@cache
def _code() -> str:
    """Return a hash of what measures: with other code, what is in the cache is measured again."""
    own = Path(__file__).parent
    sources = [file.read_bytes() for folder in (own, own.parent / "span_attention") for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


@dataclass(frozen=True)
class Answered:
    """A text with its answer.

    Args:
        ids: Tokens of both, int64 [tokens].
        answer_start: Where the answer begins, 1 or more.
        length: Length level that the text was made for, in tokens; 0 where it has none.
    """

    ids: Tensor
    answer_start: int
    length: int


def answered(examples: Dataset) -> list[Answered]:
    """Return a data module's examples as texts with answers: the answer begins at the first label.

    Args:
        examples: ``input_ids`` and ``labels`` (-100 before the answer), and ``length`` where the data has length levels.

    Raises:
        InputError: If an example has no answer, or loss on some tokens between others that have none.
    """
    texts = []
    for number in range(len(examples)):  # type: ignore[arg-type]
        example = examples[number]
        labels = example["labels"]
        start = int((labels != -100).int().argmax())
        if start < 1 or bool((labels[start:] == -100).any()):
            raise InputError(
                f"Example {number} of the data has no prompt with one answer behind it, as spans are profiled on. Use "
                "SelfGeneratedCalibration."
            )
        texts.append(Answered(example["input_ids"], start, int(example.get("length", 0))))
    return texts


@dataclass(frozen=True)
class Processes:
    """The processes that measure together.

    Args:
        rank: Number of this one.
        size: How many there are.
        barrier: Waits for all of them.
        broadcast: Returns the first one's value to all.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], Any] = lambda: None
    broadcast: Callable[[Any], Any] = lambda value: value

    def of_first(self, make: Callable[[], Made]) -> Made:
        """Let the first process make something, and return it to all."""
        return self.broadcast(make() if self.rank == 0 else None)


ALONE = Processes()


def measure(
    model: PreTrainedModel,
    what: str,
    settings: Any,
    texts: Sequence[Answered],
    compute: Callable[[Answered], np.ndarray],
    processes: Processes = ALONE,
) -> np.ndarray:
    """Return an array for each text, measured once and kept in the cache under everything that it depends on.

    Args:
        model: That is measured.
        what: Name of the measurement.
        settings: What else it depends on; plain JSON.
        texts: To measure on.
        compute: Measures a text.
        processes: Each takes its share of the texts.

    Returns:
        The arrays of all texts, stacked.

    Raises:
        InputError: If a file of the cache is damaged.
    """
    folder = cache_folder("spans", f"{what}-{digest([_code(), model_identity(model), settings])}")
    files = [folder / f"{digest([text.ids.tolist(), text.answer_start])}.safetensors" for text in texts]
    mine = list(zip(texts, files))[processes.rank :: processes.size]
    missing = [(text, file) for text, file in mine if not file.is_file()]
    for text, file in track(missing, description=what.capitalize(), disable=processes.rank > 0 or not missing):
        write_atomic(file, save({"values": compute(text)}))
    processes.barrier()
    arrays = []
    for file in files:
        try:
            arrays.append(load_file(file)["values"])
        except (SafetensorError, KeyError, OSError) as error:
            raise InputError(
                f"{file} is damaged or missing ({error}). Delete it and run again; several machines need one cache folder for "
                "all (FULGURITE_CACHE)."
            ) from error
    return np.stack(arrays)


def loss_of(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Return the loss of each token [tokens]: cross-entropy, or ``logsumexp`` of the others' logits minus the own.

    Args:
        logits: float32 [tokens, vocabulary].
        targets: int64 [tokens].
        loss: Which.
    """
    own = logits.gather(-1, targets[:, None])[:, 0]
    if loss == "margin":
        logits = logits.scatter(-1, targets[:, None], float("-inf"))
    return logits.logsumexp(dim=-1) - own
