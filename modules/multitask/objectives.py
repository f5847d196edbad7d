"""What a branch of a multi-task model predicts."""

from dataclasses import dataclass
from typing import Literal

from ...errors import InputError

Kind = Literal["next_token", "masked_token", "sequence", "token", "number"]
Mask = Literal["bidirectional", "causal"]

IGNORED = -100  # a target that carries no loss


@dataclass(frozen=True)
class Objective:
    """What a branch predicts of a text.

    Args:
        kind: ``next_token`` of a vocabulary, causal; ``masked_token``, what stood where the text is masked; ``sequence``, a class
            of the text; ``token``, a class of each token; ``number``, a number for the text.
        classes: Names of the classes, in the order of their ids; empty for the other kinds.

    Raises:
        InputError: If there are too few classes, or one of them twice.
    """

    kind: Kind
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        classifies = self.kind in ("sequence", "token")
        if classifies and len(self.classes) < 2:
            raise InputError(f"classes={list(self.classes)}: there is nothing to choose between. Legal: 2 or more.")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise InputError(f"classes: {twice!r} is given twice.")

    @property
    def mask(self) -> Mask:
        """Which tokens a token sees, in the shared layers and in the branch."""
        return "causal" if self.kind == "next_token" else "bidirectional"

    @property
    def predicts_tokens(self) -> bool:
        """Whether the vocabulary is what is chosen from."""
        return self.kind in ("next_token", "masked_token")
