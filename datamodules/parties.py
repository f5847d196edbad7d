"""Rows of one of several parties."""

import hashlib
import json

import numpy as np

from .documents import DataError
from .instructions import InstructionDataModule


class PartyDataModule(InstructionDataModule):
    """A party's prompts and responses: its own file, or, for experiments, its share of a file that is split among parties.

    Args:
        train: The party's rows, or all parties' where ``parties`` is above 1; see ``InstructionDataModule``.
        party: Which of the parties this is, from 0.
        parties: Among how many the training rows are split.
        alpha: Split each response's rows by a draw from the symmetric Dirichlet distribution with this parameter, as
            federated learning is tried on unlike parties (arXiv 1909.06335); None gives all parties alike rows.
        split_seed: Seed of the split; every party has to give the same.
        val: Rows to validate on; None holds some of ``train`` out, of a common file the same ones at all parties.
        val_fraction: Share of the rows that is held out when ``val`` and ``val_rows`` are None, in [0, 1).
        train_rows: Number of rows to train on, of all parties together; the others are left out. None takes all.
        val_rows: Number of rows to validate on, of ``val`` or held out; None takes all of ``val``, or ``val_fraction``.
        prompt_field: Column of the prompt.
        response_field: Column of the response.
        chat: Rows in the model's chat template, or as plain text; see ``InstructionDataModule``.
        group_by_length: Make batches of rows of like length: less padding to compute.
        max_length: Tokens of a row at most; longer rows are cut at the end, rows whose prompt alone is longer left out.
        batch_size: Rows a batch on each device.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the training order; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If a file or column is missing, a number out of range, or the party's share empty.
    """

    def __init__(
        self,
        train: str = "package:docstrings",
        *,
        party: int = 0,
        parties: int = 1,
        alpha: float | None = None,
        split_seed: int = 0,
        val: str | None = None,
        val_fraction: float = 0.1,
        train_rows: int | None = None,
        val_rows: int | None = None,
        prompt_field: str = "prompt",
        response_field: str = "response",
        chat: bool = True,
        group_by_length: bool = True,
        max_length: int = 512,
        batch_size: int = 4,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train,
            val=val,
            val_fraction=val_fraction,
            prompt_field=prompt_field,
            response_field=response_field,
            chat=chat,
            group_by_length=group_by_length,
            max_length=max_length,
            batch_size=batch_size,
            tokenizer=tokenizer,
            num_workers=num_workers,
            seed=seed,
        )
        if not 0 <= party < parties:
            raise DataError(f"party={party}, parties={parties}: legal are parties from 0 to {max(parties, 1) - 1}.")
        if alpha is not None and alpha <= 0:
            raise DataError(f"alpha={alpha} is no parameter of a Dirichlet distribution. Legal: above 0, or null.")
        if alpha is not None and parties == 1:
            raise DataError(f"alpha={alpha} splits rows among parties, but parties=1. Give two or more, or leave it out.")
        for name, value in (("train_rows", train_rows), ("val_rows", val_rows)):
            if value is not None and value < 1:
                raise DataError(f"{name}={value} leaves no row. Legal: 1 or more, or null.")
        self.party, self.parties, self.alpha, self.split_seed = party, parties, alpha, split_seed
        self.train_rows, self.val_rows = train_rows, val_rows

    def _rows(self, source: str, name: str) -> list[tuple[str, str]]:
        limit = self.train_rows if name == "train" else self.val_rows
        rows = super()._rows(source, name)
        if name == "train" and limit is not None and self.val_source is None:
            wanted = limit
            while limit < len(rows) and limit - (self.val_rows or super()._held_out(limit)) < wanted:
                limit += 1
        return rows[:limit]

    def _held_out(self, rows: int) -> int:
        if self.val_rows is None:
            return super()._held_out(rows)
        if self.val_rows >= rows:
            raise DataError(f"val_rows={self.val_rows}: train={self.train_source!r} has {rows} rows. Leave some to train on.")
        return self.val_rows

    def _own(self, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if self.parties > 1:
            rows = share_of(rows, self.party, self.parties, self.alpha, self.split_seed)
            if not rows:
                raise DataError(
                    f"party={self.party} of {self.parties} gets no row with alpha={self.alpha}, split_seed={self.split_seed}. "
                    "Give another split_seed, a larger alpha, or fewer parties."
                )
        self._content["train"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
        return rows


def share_of(rows: list[tuple[str, str]], party: int, parties: int, alpha: float | None, seed: int) -> list[tuple[str, str]]:
    """Return a party's share of rows of prompts and responses; the shares of all parties have each row once.

    Args:
        rows: Of all parties.
        party: From 0.
        parties: How many there are.
        alpha: See ``PartyDataModule``.
        seed: Of the split.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    if alpha is None:
        return [rows[number] for number in sorted(order[party::parties])]
    mine: list[int] = []
    for response in sorted({response for _, response in rows}):
        own = [number for number in order if rows[number][1] == response]
        ends = np.rint(np.cumsum(generator.dirichlet([alpha] * parties)) * len(own)).astype(int)
        mine += own[ends[party - 1] if party else 0 : ends[party]]
    return [rows[number] for number in sorted(mine)]
