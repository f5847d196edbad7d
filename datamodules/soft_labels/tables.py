"""What a store's codec has learnt of its labels: which ids are frequent, which occur together, and how often each symbol comes.

Tables are learnt from the labels that a process has written, and stand beside its shards; a block names those that it was written
with.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import zstandard

from ...files import write_atomic
from .codec import StoreError, decompressed

TOPICS = 64  # groups of tokens whose labels are alike, each with an order of the ids of its own
LISTED = 2048  # ids at most in a topic's own order; others follow in the order of all
_SCALE = 1 << 14  # what the frequencies of a table add up to: exact in any arithmetic
_ROUNDS = 5  # of assigning tokens to topics
_SAMPLE = 16384  # tokens that topics are found on
_LABELS_AT_ONCE = 1 << 18  # whose scores exist at the same time, 64 MiB of them
_SMOOTHING = 800.0  # labels' worth of the order of all in each topic
_MAGIC = b"FLGT"
_HEAD = struct.Struct("<4sIII")  # magic, CRC-32 of the rest, ids in the order, topics


@dataclass(frozen=True)
class Symbols:
    """Symbols of one kind, each with the context that its frequency depends on.

    Args:
        contexts: int64 [symbols].
        values: int64 [symbols].
    """

    contexts: np.ndarray
    values: np.ndarray


class Frequencies:
    """How often each symbol of a kind comes in each context.

    Args:
        table: Integers of at least 1 that add up to the scale, uint16 [contexts, symbols].
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @classmethod
    def uniform(cls, shape: tuple[int, int]) -> "Frequencies":
        """Return frequencies that know nothing."""
        return cls.of(np.zeros(shape))

    @classmethod
    def of(cls, counts: np.ndarray) -> "Frequencies":
        """Return frequencies from counts [contexts, symbols]; where few were counted, those of all contexts stand in."""
        contexts, symbols = counts.shape
        overall = counts.sum(axis=0) + 0.05
        mixed = counts + 30 * overall / overall.sum()
        table = 1 + np.floor(mixed / mixed.sum(axis=1, keepdims=True) * (_SCALE - symbols)).astype(np.int64)
        table[np.arange(contexts), table.argmax(axis=1)] += _SCALE - table.sum(axis=1)
        return cls(table.astype(np.uint16))

    @cached_property
    def _models(self) -> dict[int, Any]:
        return {}

    def _model(self, context: int) -> Any:
        if context not in self._models:
            row = self.table[context].astype(np.float64) / _SCALE
            self._models[context] = constriction.stream.model.Categorical(row, perfect=False)
        return self._models[context]

    def bits(self, symbols: Symbols) -> float:
        """Return what symbols cost, in bits."""
        return float(np.log2(_SCALE / self.table[symbols.contexts, symbols.values]).sum())

    def encode(self, coder: Any, symbols: Symbols) -> None:
        """Put symbols onto an ANS coder, which gives back last what was put first."""
        order = _by_context(symbols.contexts)
        values = symbols.values[order].astype(np.int32)
        ends = np.cumsum(np.bincount(symbols.contexts)) if len(values) else np.zeros(0, np.int64)
        start = np.concatenate([[0], ends])
        for context in np.flatnonzero(np.diff(start))[::-1]:
            coder.encode_reverse(values[start[context] : start[context + 1]], self._model(int(context)))

    def decode(self, coder: Any, contexts: np.ndarray) -> np.ndarray:
        """Take the symbols of some contexts [symbols] from a coder, int32 [symbols]."""
        values = np.empty(len(contexts), dtype=np.int32)
        if not len(contexts):
            return values
        if len(self.table) == 1:
            values[:] = coder.decode(self._model(0), len(contexts))
            return values
        counts = np.bincount(contexts)
        present = np.flatnonzero(counts)
        parts = [coder.decode(self._model(own), count) for own, count in zip(present.tolist(), counts[present].tolist())]
        values[_by_context(contexts)] = np.concatenate(parts)
        return values


def _by_context(contexts: np.ndarray) -> np.ndarray:
    """Return the order of symbols by their contexts; of small types it is found without comparing."""
    return np.argsort(contexts.astype(np.uint8 if contexts.max(initial=0) < 256 else np.uint16), kind="stable")


class LabelTables:
    """Orders of the ids, and frequencies of all kinds of symbols.

    Args:
        vocabulary: Number of ids.
        order: Ids by falling frequency, int32 [vocabulary].
        topics: The first ids of each topic, int32 [topics, listed]; -1 behind the last.
        frequencies: By kind of symbol.
    """

    def __init__(self, vocabulary: int, order: np.ndarray, topics: np.ndarray, frequencies: Mapping[str, Frequencies]) -> None:
        self.vocabulary, self.order, self.topics, self.frequencies = vocabulary, order, topics, dict(frequencies)

    @classmethod
    def unlearnt(cls, vocabulary: int, shapes: Mapping[str, tuple[int, int]]) -> "LabelTables":
        """Return the tables of a process that has seen nothing yet: ids by their number, as tokenizers' merges are ordered."""
        nothing = np.full((1, 0), -1, dtype=np.int32)
        uniform = {name: Frequencies.uniform(shape) for name, shape in shapes.items()}
        return cls(vocabulary, np.arange(vocabulary, dtype=np.int32), nothing, uniform)

    @cached_property
    def _rank(self) -> np.ndarray:
        rank = np.empty(self.vocabulary, dtype=np.int32)
        rank[self.order] = np.arange(self.vocabulary, dtype=np.int32)
        return rank

    @cached_property
    def _listed(self) -> tuple[np.ndarray, np.ndarray]:
        """Column of each id that a topic lists [vocabulary], 0 for others, and its places [topics, columns], -1 for none."""
        known = np.unique(self.topics[self.topics >= 0])
        column = np.zeros(self.vocabulary, dtype=np.int32)
        column[known] = np.arange(1, len(known) + 1)
        places = np.full((len(self.topics), len(known) + 1), -1, dtype=np.int32)
        topic, place = np.nonzero(self.topics >= 0)
        places[topic, column[self.topics[topic, place]]] = place
        return column, places

    @cached_property
    def _scores(self) -> np.ndarray:
        """About how many bits an id costs in each topic, float32 [columns of ``_listed``, topics]."""
        places = self._listed[1].T
        ranks = np.where(places >= 0, places, 4 * self.topics.shape[1])
        return np.log2(ranks + 8.0).astype(np.float32)

    def topic_of(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the topic that suits each token's labels best, int64 [tokens].

        Args:
            ids: Kept ids, token after token [labels].
            starts: Where each token's begin [tokens]; no token is without.
        """
        if len(self.topics) == 1 or not len(ids):
            return np.zeros(len(starts), dtype=np.int64)
        columns, scores = self._listed[0][ids], self._scores
        found = np.empty(len(starts), dtype=np.int64)
        stops = np.append(starts[1:], len(ids))
        first = 0
        while first < len(starts):  # a score for each label and topic is too much for all tokens at once
            last = max(first + 1, int(np.searchsorted(stops, starts[first] + _LABELS_AT_ONCE, side="right")))
            some = slice(int(starts[first]), int(stops[last - 1]))
            sums = np.add.reduceat(scores[columns[some]], starts[first:last] - starts[first], axis=0)
            found[first:last] = sums.argmin(axis=1)
            first = last
        return found

    def rank(self, ids: np.ndarray, topics: np.ndarray) -> np.ndarray:
        """Return the rank of each id in the order of its topic, int64 [labels]."""
        column, places = self._listed
        place = places[topics, column[ids]]
        return np.where(place >= 0, place, self.topics.shape[1] + self._rank[ids]).astype(np.int64)

    def ids(self, ranks: np.ndarray, topics: np.ndarray) -> np.ndarray:
        """Return the ids of ranks, int32 [labels]; -1 for a rank that nothing has."""
        listed = self.topics.shape[1]
        if not listed:
            found = self.order[ranks.clip(max=self.vocabulary - 1)]
            found[ranks >= self.vocabulary] = -1
            return found
        found = self.topics.reshape(-1)[topics * listed + np.minimum(ranks, listed - 1)]
        far = np.flatnonzero(ranks >= listed)
        place = ranks[far] - listed
        found[far] = np.where(place < self.vocabulary, self.order[place.clip(max=self.vocabulary - 1)], -1)
        return found

    @classmethod
    def learn(
        cls, vocabulary: int, ids: np.ndarray, counts: np.ndarray, count: "Callable[[LabelTables], dict[str, np.ndarray]]"
    ) -> "LabelTables":
        """Learn tables from labels.

        Args:
            vocabulary: Number of ids.
            ids: Kept ids, token after token [labels].
            counts: Labels of each token [tokens], 1 or more.
            count: Given tables of orders alone, returns by kind how often each symbol comes with them [contexts, symbols].
        """
        frequency = np.bincount(ids, minlength=vocabulary)
        order = np.argsort(-frequency, kind="stable").astype(np.int32)
        ordered = cls(vocabulary, order, _topics(ids, counts, frequency), {})
        return cls(vocabulary, order, ordered.topics, {name: Frequencies.of(table) for name, table in count(ordered).items()})

    def save(self, path: Path) -> None:
        """Write the tables, atomically; ids that never came are left out of the order, and follow by their number."""
        seen = len(self.order)
        while seen and self.order[seen - 1] > (self.order[seen - 2] if seen > 1 else -1):
            seen -= 1
        parts = [
            self.order[:seen].astype("<i4").tobytes(),
            struct.pack("<I", self.topics.shape[1]),
            self.topics.astype("<i4").tobytes(),
        ]
        for name in sorted(self.frequencies):
            table = self.frequencies[name].table
            parts += [struct.pack("<II", *table.shape), table.astype("<u2").tobytes()]
        body = b"".join(parts)
        packed = zstandard.ZstdCompressor(level=12).compress(body)
        head = _HEAD.pack(_MAGIC, 0, seen, len(self.topics))[8:]
        write_atomic(path, _MAGIC + struct.pack("<I", zlib.crc32(packed, zlib.crc32(head))) + head + packed)

    @classmethod
    def load(cls, path: Path, vocabulary: int, shapes: Mapping[str, tuple[int, int]]) -> "LabelTables":
        """Read tables.

        Args:
            path: Their file.
            vocabulary: Number of ids.
            shapes: Contexts and alphabet of each kind of symbol.

        Raises:
            StoreError: If the file is missing or damaged.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}); the blocks that were written with it are lost."
            ) from error
        damaged = StoreError(f"{path} is damaged. Restore the file, or delete the store and capture again.")
        if len(data) < _HEAD.size:
            raise damaged
        magic, checksum, seen, topics = _HEAD.unpack_from(data)
        if magic != _MAGIC or checksum != zlib.crc32(data[8:]) or seen > vocabulary or not 1 <= topics <= TOPICS:
            raise damaged
        try:
            body = memoryview(decompressed(data[_HEAD.size :]))
        except StoreError:
            raise damaged from None
        position = 0

        def take(count: int, dtype: str) -> np.ndarray:
            nonlocal position
            size = count * np.dtype(dtype).itemsize
            if position + size > len(body):
                raise damaged
            values = np.frombuffer(body, dtype=dtype, count=count, offset=position)
            position += size
            return values

        first = take(seen, "<i4").astype(np.int32)
        rest = np.setdiff1d(np.arange(vocabulary, dtype=np.int32), first)
        listed = int(take(1, "<u4")[0])
        lists = take(topics * listed, "<i4").astype(np.int32).reshape(topics, listed)
        frequencies = {}
        for name in sorted(shapes):
            contexts, symbols = (int(size) for size in take(2, "<u4"))
            if (contexts, symbols) != shapes[name]:
                raise damaged
            table = take(contexts * symbols, "<u2").reshape(contexts, symbols)
            if table.min() < 1 or (table.sum(axis=1, dtype=np.int64) != _SCALE).any():
                raise damaged
            frequencies[name] = Frequencies(table)
        outside = any(len(part) and (part.min() < least or part.max() >= vocabulary) for part, least in ((first, 0), (lists, -1)))
        if position != len(body) or len(first) + len(rest) != vocabulary or outside:
            raise damaged
        return cls(vocabulary, np.concatenate([first, rest]), lists, frequencies)


def _topics(ids: np.ndarray, counts: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return the most frequent ids of each topic, by assigning tokens to the topic whose labels are most like theirs."""
    if len(counts) > _SAMPLE:
        counts = counts[-_SAMPLE:]
        ids = ids[-int(counts.sum()) :]
        frequency = np.bincount(ids, minlength=len(frequency))
    seen = np.flatnonzero(frequency)
    column = np.zeros(len(frequency), dtype=np.int64)
    column[seen] = np.arange(len(seen))
    labels, starts = column[ids], np.concatenate([[0], np.cumsum(counts)[:-1]])
    share = (frequency[seen] + 0.05) / (frequency[seen] + 0.05).sum()
    # A first guess: tokens whose likeliest next token is the same belong together.
    first = np.bincount(labels[starts], minlength=len(seen))
    place = np.empty(len(seen), dtype=np.int64)
    place[np.argsort(-first, kind="stable")] = np.arange(len(seen))
    topic = place[labels[starts]] % TOPICS
    counted = np.zeros((TOPICS, len(seen)))
    for _ in range(_ROUNDS):
        flat = np.bincount(np.repeat(topic, counts) * len(seen) + labels, minlength=TOPICS * len(seen))
        counted = flat.reshape(TOPICS, len(seen)).astype(np.float64)
        likely = (counted + _SMOOTHING * share) / (counted.sum(axis=1, keepdims=True) + _SMOOTHING)
        table = np.ascontiguousarray(np.log2(likely).astype(np.float32).T)
        prior = np.log2((np.bincount(topic, minlength=TOPICS) + 1) / (len(topic) + TOPICS)).astype(np.float32)
        for begin in range(0, len(topic), 512):  # what a cache holds
            rows = slice(begin, min(begin + 512, len(topic)))
            some = labels[starts[rows.start] : starts[rows.stop] if rows.stop < len(starts) else len(labels)]
            scores = np.add.reduceat(table[some], starts[rows] - starts[rows.start], axis=0)
            topic[rows] = (scores + prior).argmax(axis=1)
    mixed = counted + _SMOOTHING * share
    best = np.argsort(-mixed, axis=1, kind="stable")[:, :LISTED]
    return np.where(np.take_along_axis(mixed, best, 1) > 0, seen[best], -1).astype(np.int32)


def tables_path(folder: Path, rank: int, number: int) -> Path:
    """Return where a process's tables of a number, from 1 on, are."""
    return folder / f"tables-{rank:05d}-{number:05d}.flt"
