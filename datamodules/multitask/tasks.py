"""What a task is: a source of examples, each of them one or two texts with targets by branch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...modules.multitask.objectives import IGNORED, Kind, Mask, Objective
from ..documents import DataError

SPLITS = ("train", "val", "test", "predict")


@dataclass
class Part:
    """One text of an example, as it goes through the trunk.

    Args:
        mask: Which tokens a token sees.
        input_ids: Token ids [length].
        token_type_ids: Which of two texts a token belongs to [length].
        targets: By branch: an int or a float for the text, or an int of each token [length]; -100 or NaN where there is none.
    """

    mask: Mask
    input_ids: list[int]
    token_type_ids: list[int]
    targets: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """What all tasks have.

    Args:
        length: Tokens of a text at most; longer ones are cut.

    Raises:
        InputError: If that is out of range.
    """

    def __init__(self, length: int) -> None:
        if length < 4:
            raise DataError(f"length={length} holds no text. Legal: 4 or more tokens.")
        self.length = length
        self.name = ""
        self.content: dict[str, str] = {}

    @abstractmethod
    def open(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read the data.

        Args:
            name: The task's name, which begins that of its branches.
            tokenizer: Of the model.
            seed: Of what is drawn.
        """

    @property
    @abstractmethod
    def objectives(self) -> dict[str, Objective]:
        """What each of its branches predicts."""

    @property
    def kinds(self) -> list[Kind]:
        """What each branch predicts, before anything is read."""
        return ["sequence"]

    @abstractmethod
    def size(self, split: str) -> int:
        """Return the number of examples of ``train``, ``val``, ``test`` or ``predict``."""

    @abstractmethod
    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """Return an example.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.
            index: Which.
            draw: What is random depends on it; the count of examples drawn so far in training, else the index.
        """


def collate_parts(examples: list[list[Part]], pad: int) -> list[dict[str, Any]]:
    """Return the views of a task's examples: each part of all of them, padded on the right to the longest.

    Args:
        examples: Of one task.
        pad: Token id of the padding.
    """
    views = []
    for parts in zip(*examples):
        lengths = torch.tensor([len(part.input_ids) for part in parts])
        longest = int(lengths.max())

        def rows(lists: list[list[int]], value: int, longest: int = longest) -> torch.Tensor:
            return torch.tensor([[*one, *[value] * (longest - len(one))] for one in lists])

        targets: dict[str, torch.Tensor] = {}
        for name, example in parts[0].targets.items():
            own = [part.targets[name] for part in parts]
            targets[name] = rows(own, IGNORED) if isinstance(example, list) else torch.tensor(own)
        views.append(
            {
                "mask": parts[0].mask,
                "input_ids": rows([part.input_ids for part in parts], pad),
                "token_type_ids": rows([part.token_type_ids for part in parts], 0),
                "position_ids": torch.arange(longest).expand(len(parts), -1).contiguous(),
                "lengths": lengths,
                "targets": targets,
            }
        )
    return views
