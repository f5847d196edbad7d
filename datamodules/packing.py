"""Documents packed into blocks of equal length, with their boundaries kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..modules.distillation import SoftLabels
from .token_cache import TokenCache


@dataclass(frozen=True)
class Stretch:
    """A part of a document: its tokens from ``start`` to ``stop``."""

    document: int
    start: int
    stop: int


def split_documents(cache: TokenCache, fraction: float) -> tuple[list[Stretch], list[Stretch]]:
    """Split documents, in the order of their hashes, into two parts by tokens; the one at the cut is cut there.

    Args:
        cache: The tokens.
        fraction: Share of the tokens in the second part, in [0, 1).

    Returns:
        The documents of the first part and of the second.
    """
    lengths = np.diff(cache.offsets)[cache.order]
    cut = round((1 - fraction) * int(lengths.sum()))
    first, second, position = [], [], 0
    for document, length in zip(cache.order.tolist(), lengths.tolist()):
        inside = min(max(cut - position, 0), length)
        if inside:
            first.append(Stretch(document, 0, inside))
        if inside < length:
            second.append(Stretch(document, inside, length))
        position += length
    return first, second


class PackedBlocks(Dataset):
    """Blocks of ``block_size`` tokens filled with documents one after another; the last, unfilled one is left out.

    A document that does not fit goes on in the next block. Every piece of a document is a text of its own for the model:
    its positions restart at 0, it begins with BOS where the model needs that, and its first token has no label.

    Args:
        cache: The tokens.
        stretches: Which parts of which documents, in order.
        block_size: Tokens in a block.
        bos: BOS id to put before every piece, or None.
        eos: EOS id to put behind the end of every document, or None.
        limit: Number of blocks to stop at; None takes all.
    """

    def __init__(
        self,
        cache: TokenCache,
        stretches: list[Stretch],
        *,
        block_size: int,
        bos: int | None = None,
        eos: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.cache, self.block_size, self.bos, self.eos = cache, block_size, bos, eos
        extra = int(bos is not None)
        pieces: list[tuple[int, int, int]] = []
        first_pieces = [0]
        room = block_size
        for stretch in stretches:
            position, end = stretch.start, stretch.stop + self._has_end(stretch.document, stretch.stop)
            while position < end and (limit is None or len(first_pieces) <= limit):
                take = min(end - position, room - extra)
                pieces.append((stretch.document, position, position + take))
                position += take
                room -= take + extra
                if room == extra == 1:  # too small for BOS and a token: a BOS without any supervision fills it
                    pieces.append((stretch.document, position, position))
                    room = 0
                if room == 0:
                    first_pieces.append(len(pieces))
                    room = block_size
        self.pieces = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        self.first_pieces = np.array(first_pieces, dtype=np.int64)
        self.tokens_available = sum(stretch.stop - stretch.start for stretch in stretches)

    def _has_end(self, document: int, stop: int) -> int:
        length = int(self.cache.offsets[document + 1] - self.cache.offsets[document])
        return int(self.eos is not None and stop == length)

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels`` (-100 at the head of every piece) and ``position_ids``, int64 [block_size]."""
        ids = np.empty(self.block_size, dtype=np.int64)
        positions = np.empty(self.block_size, dtype=np.int64)
        filled = 0
        for document, start, stop in self.pieces[self.first_pieces[index] : self.first_pieces[index + 1]]:
            begin = filled
            if self.bos is not None:
                ids[filled] = self.bos
                filled += 1
            tokens = self.cache.document(document)[start:stop]
            ids[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            if self.eos is not None and len(tokens) < stop - start:  # the piece holds its document's end
                ids[filled] = self.eos
                filled += 1
            positions[begin:filled] = np.arange(filled - begin)
        labels = np.where(positions == 0, -100, ids)
        block = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(value) for name, value in block.items()}


def collate(examples: list[dict[str, Any]], pad: int = 0) -> dict[str, Any]:
    """Stack examples to a batch, padded on the right to the longest.

    Args:
        examples: ``input_ids``, ``labels`` and ``position_ids`` [length], and optionally ``soft_labels``.
        pad: Token id of the padding; its label is -100 and it comes after everything that attends, so it changes nothing.

    Returns:
        The tensors [batch, longest length], ``lengths`` [batch], and ``soft_labels`` of all supervised tokens in order.
    """
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    longest = int(lengths.max())
    batch: dict[str, Any] = {"lengths": lengths}
    for name, value in (("input_ids", pad), ("labels", -100), ("position_ids", None)):
        rows = []
        for example in examples:
            row = example[name]
            missing = longest - len(row)
            if missing and value is None:  # positions run on: a restart would be a new document
                row = torch.cat([row, torch.arange(missing) + row[-1] + 1])
            elif missing:
                row = torch.nn.functional.pad(row, (0, missing), value=value)
            rows.append(row)
        batch[name] = torch.stack(rows)
    if "soft_labels" in examples[0]:
        batch["soft_labels"] = SoftLabels.concatenate([example["soft_labels"] for example in examples])
    return batch


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, int64 [rows, longest], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row)
        mask[number, longest - len(row) :] = 1
    return ids, mask
