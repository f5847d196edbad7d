"""Answers to choose from, each told from the others by one token."""

import logging
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import InputError

log = logging.getLogger(__name__)


class Choices:
    """The tokens that decide among some answers.

    Args:
        candidates: The answers, as they stand in the rows; behind the tokens with which all begin, if any, each has another one.
        tokenizer: Of the model.

    Raises:
        InputError: If there is nothing to choose, or two answers go on with the same token.
    """

    def __init__(self, candidates: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.candidates, self._tokenizer = candidates, tokenizer
        ids = [list(tokenizer(answer, add_special_tokens=False).input_ids) for answer in candidates]
        self._shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*ids))]
        own = [tuple(one[len(self._shared) :][:1]) for one in ids]
        if len(set(own)) < len(own) or not all(own):
            raise InputError(f"candidates={candidates}: two of them begin with the same token, or with none.")
        self.ids = torch.tensor(own)[:, 0]
        """By candidate the token that decides, int64 [candidates]."""

    def decisive(self, supervised: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the deciding token is predicted.

        Args:
            supervised: Positions whose next token is the answer's, bool [rows, length].

        Returns:
            Row and position, int64 [rows that have one] each.
        """
        found = supervised & (supervised.cumsum(dim=1) == len(self._shared) + 1)
        rows, places = found.nonzero(as_tuple=True)
        return rows, places

    def check(self, answers: Iterable[Tensor]) -> None:
        """Refuse rows whose answer is none of the candidates.

        Args:
            answers: Their tokens, int64 [tokens of an answer] each; a row that is cut before the deciding token passes.

        Raises:
            InputError: If there are some; it has an example.
        """
        shared, answers = self._shared, list(answers)
        whole = [one for one in answers if len(one) > len(shared)]
        if len(whole) < len(answers):
            few = len(answers) - len(whole)
            log.warning("%d of %d answers are cut before the token that decides: raise data.max_length.", few, len(answers))
        other = [one for one in whole if one[: len(shared)].tolist() != shared or one[len(shared)] not in self.ids]
        if other:
            example = str(self._tokenizer.decode(other[0], skip_special_tokens=True)).rstrip()
            raise InputError(
                f"candidates={self.candidates}: {len(other)} of {len(answers)} rows have another answer, such as {example!r}. "
                'Name all (--model.candidates \'["yes","no"]\'), or give null if rows have no fixed ones.'
            )
