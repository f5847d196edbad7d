"""Prompts with answers as training examples."""

import logging
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationExample:
    """A prompt with its answer.

    Args:
        kind: What was asked, or ``text``.
        length: Length level in tokens; 0 where it has none.
        ids: Tokens of prompt and answer.
        answer_start: Where the answer begins; everything from there on carries loss.
    """

    kind: str
    length: int
    ids: tuple[int, ...]
    answer_start: int

    @property
    def prompt(self) -> list[int]:
        """Tokens of the prompt."""
        return list(self.ids[: self.answer_start])

    @property
    def answer(self) -> list[int]:
        """Tokens of the answer."""
        return list(self.ids[self.answer_start :])


class CalibrationExamples(Dataset):
    """Examples as tensors.

    Args:
        examples: What ``items`` holds.
    """

    def __init__(self, examples: list[CalibrationExample]) -> None:
        self.items = examples

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``labels`` (-100 before the answer), ``position_ids``, int64 [tokens], and ``length``."""
        example = self.items[index]
        ids = torch.tensor(example.ids)
        labels = ids.clone()
        labels[: example.answer_start] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.arange(len(ids)),
            "length": torch.tensor(example.length),
        }


def log_samples(examples: list[CalibrationExample], tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Log how many examples there are, and the beginnings and ends of a few of them."""
    log.info("Calibration: %d examples, %d tokens with loss", len(examples), sum(len(example.answer) for example in examples))
    for example in examples[:: max(len(examples) // count, 1)][:count] if count else []:
        start, end, answer = (tokenizer.decode(part) for part in (example.prompt[:40], example.prompt[-40:], example.answer[:80]))
        log.info("%s, %d tokens: %r ... %r\n  -> %r", example.kind, len(example.prompt), start, end, answer)
