"""Learns a codec's tables while labels are written, so that a capture needs no pass over the text beforehand."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .codec import StoredSequence, StoreError
from .ranked import RankedCodec, RoundedLabels
from .tables import tables_path

# Tokens of a process after which tables are learnt (again): early ones help soon, late ones know more.
_MOMENTS = (4096, 16384, 65536, 524288)
_KEPT = 65536  # tokens that are learnt from: the last ones


class TableLearner:
    """Keeps a process's last labels, and makes its codec learn from them now and then.

    A table's file is written before any block that uses it, so a process killed at any moment leaves blocks that can be read.

    Args:
        codec: That writes.
        folder: Of the store.
        rank: The process.
        before: Labels that it wrote when it was last here, the last one first; read as far as they are wanted.
        seen: Tokens that it wrote then.
    """

    def __init__(self, codec: RankedCodec, folder: Path, rank: int, before: Iterable[RoundedLabels], seen: int) -> None:
        self._codec, self._folder, self._rank, self._seen = codec, folder, rank, seen
        there = sorted(int(path.stem.rsplit("-", 1)[1]) for path in folder.glob(f"tables-{rank:05d}-*.flt"))
        codec.number = len(there)
        if there != list(range(1, len(there) + 1)):
            raise StoreError(
                f"{folder} has the tables {there} of process {rank}: one before the last is missing, and blocks need it. Restore "
                "it, or delete the store and capture again."
            )
        self._recent: list[RoundedLabels] = []
        self._held = 0
        if codec.number < len(_MOMENTS):
            for labels in before:
                if self._held >= _KEPT:
                    break
                self._recent.insert(0, labels)
                self._held += len(labels.counts)

    def add(self, sequence: StoredSequence) -> None:
        """Learn from one more sequence."""
        if self._codec.number >= len(_MOMENTS):
            self._recent.clear()
            return
        self._recent.append(self._codec.rounded(sequence))
        self._seen += len(sequence.supervised)
        self._held += len(sequence.counts)
        while self._held - len(self._recent[0].counts) >= _KEPT:
            self._held -= len(self._recent.pop(0).counts)
        if self._seen >= _MOMENTS[self._codec.number]:
            self._learn()

    def _learn(self) -> None:
        names = ("counts", "levels", "ids", "tail", "realised")
        labels = RoundedLabels(**{name: np.concatenate([getattr(part, name) for part in self._recent]) for name in names})
        if not len(labels.ids):
            return
        number = self._codec.number + 1
        self._codec.learn(labels).save(tables_path(self._folder, self._rank, number))
        self._codec.number = number
