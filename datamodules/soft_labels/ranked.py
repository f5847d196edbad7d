"""Soft labels in few bytes: values in even steps and ids by rank, both written by asymmetric numeral systems.

A token's labels fall in value, and many neighbours are of one value: these runs are told by their lengths and by the steps
between them. Within a run the order says nothing: its ids are put in the order of their rank, and told by the gaps between ranks.
Ranks are those of a topic, a group of tokens with like labels (``LabelTables``). Symbols are written with the frequencies of
their context, by the ANS coder of ``constriction``.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import constriction
import numpy as np

from .codec import StoredSequence, StoreError, bfloat16_bits, of_bfloat16
from .numbers import SYMBOLS, BitReader, pack, split
from .steps import ValueSteps
from .tables import TOPICS, LabelTables, Symbols

Packed = tuple[np.ndarray, np.ndarray]  # how many bits, and which

_BUCKETS = 6  # of the first value
_FEW = np.array([0, 0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6], dtype=np.int64)  # contexts of runs before or left
_FEWS = int(_FEW.max()) + 1
_PLACE = np.array([0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 8], dtype=np.int32)  # contexts of labels left in a run
_PLACES = int(_PLACE.max()) + 1
_TAIL_STEPS = 255
_NATS = 32  # steps of a nat in the realised log-probability
_MOST_LABELS = 1 << 25  # of a sequence
_MOST_NATS = (1 << 16) / _NATS


@dataclass
class RoundedLabels:
    """Labels of some tokens, as they are written.

    Args:
        counts: Labels of each token, int64 [tokens].
        levels: Of the values, falling within a token, int64 [labels].
        ids: int64 [labels].
        tail: Steps of the tail's square root, int64 [tokens].
        realised: Steps of the realised token's negative log-probability, int64 [tokens].
    """

    counts: np.ndarray
    levels: np.ndarray
    ids: np.ndarray
    tail: np.ndarray
    realised: np.ndarray


class RankedCodec:
    """Rounded values and ranked ids, by what was learnt of the labels written before.

    Args:
        vocabulary: Size of the teacher's vocabulary.
        steps: How values are rounded.
        tables: Returns the tables of a number, from 1 on.
    """

    name = "ranked-2"
    _head = struct.Struct("<7I")  # tables, length, stored tokens, starts, supervised tokens, kept labels, bytes of bits

    def __init__(self, vocabulary: int, steps: ValueSteps, tables: Callable[[int], LabelTables]) -> None:
        self.vocabulary, self.steps, self._tables = vocabulary, steps, tables
        self._values = of_bfloat16(bfloat16_bits(steps.table()))
        self.number = 0
        self.shapes = {
            "counts": (1, SYMBOLS),
            "topic": (1, TOPICS),
            "first": (1, steps.levels),
            "runs": (_BUCKETS, SYMBOLS),
            "length": (_FEWS * _BUCKETS, SYMBOLS),
            "drop": (_FEWS * _BUCKETS, steps.levels),
            "gap": (_PLACES * 8, SYMBOLS),
            "tail": (_BUCKETS, _TAIL_STEPS + 1),
            "realised": (_BUCKETS, SYMBOLS),
        }
        self._unlearnt = LabelTables.unlearnt(vocabulary, self.shapes)

    def tables(self, number: int) -> LabelTables:
        """Return the tables of a number; 0 are those that know nothing."""
        return self._tables(number) if number else self._unlearnt

    def learn(self, labels: RoundedLabels) -> LabelTables:
        """Return tables learnt from some labels, of tokens one after another."""

        def count(tables: LabelTables) -> dict[str, np.ndarray]:
            symbols, _ = self.symbols(labels, tables)
            return {name: _counted(symbols[name], shape) for name, shape in self.shapes.items()}

        filled = labels.counts[labels.counts > 0]
        return LabelTables.learn(self.vocabulary, labels.ids, filled, count)

    def rounded(self, sequence: StoredSequence) -> RoundedLabels:
        """Return the labels of a sequence as they are written."""
        counts, ids = sequence.counts.astype(np.int64), sequence.ids.astype(np.int64)
        levels = self.steps.level(of_bfloat16(sequence.probabilities))
        order = self._order(counts, levels, ids)
        tail, realised = of_bfloat16(sequence.tail), of_bfloat16(sequence.realised)
        return RoundedLabels(
            counts,
            levels[order],
            ids[order],
            np.rint(np.sqrt(tail.clip(0, 1)) * _TAIL_STEPS).astype(np.int64),
            np.rint(-realised.clip(-_MOST_NATS, 0) * _NATS).astype(np.int64),
        )

    def _order(self, counts: np.ndarray, levels: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the order of labels in which tables are learnt: falling in level; of one level by number."""
        falling = np.repeat(np.arange(len(counts)), counts) * self.steps.levels + self.steps.levels - 1 - levels
        return np.argsort((falling << 32) + ids, kind="stable")

    def symbols(self, labels: RoundedLabels, tables: LabelTables) -> tuple[dict[str, Symbols], dict[str, Packed]]:
        """Return what is written with frequencies, by kind, and what is left of numbers: how many bits, and which."""
        filled = labels.counts[labels.counts > 0]
        starts = np.cumsum(filled) - filled
        first = labels.levels[starts]
        new = np.append(True, labels.levels[1:] != labels.levels[:-1])[: len(labels.levels)]
        new[starts] = True
        begins = np.flatnonzero(new)
        runs = _Runs(np.bincount(np.searchsorted(starts, begins, side="right") - 1, minlength=len(filled)))
        length = np.diff(np.append(begins, len(new)))
        level = labels.levels[begins]
        topic = tables.topic_of(labels.ids, starts)
        ranks = tables.rank(labels.ids, np.repeat(topic, filled))
        ranks = ranks[np.argsort((np.cumsum(new) << 32) + ranks, kind="stable")]
        gaps = np.diff(ranks, prepend=0) - 1
        gaps[begins] = ranks[begins]
        if len(gaps) and gaps.min() < 0:
            raise StoreError("a token has the same id twice among its labels")
        bucket = self._buckets(first)
        later, within = np.flatnonzero(runs.index), np.flatnonzero(runs.left > 1)
        everywhere = np.zeros(len(labels.counts), np.int64)
        everywhere[labels.counts > 0] = bucket
        rest: dict[str, Packed] = {}

        def number(name: str, contexts: np.ndarray, values: np.ndarray) -> Symbols:
            symbols, bits, low = split(values)
            rest[name] = bits, low
            return Symbols(contexts, symbols)

        none = np.zeros(len(labels.counts), np.int64)
        return {
            "counts": number("counts", none, labels.counts),
            "topic": Symbols(none[: len(topic)], topic),
            "first": Symbols(none[: len(first)], first),
            "runs": number("runs", bucket, runs.number - 1),
            "length": number("length", runs.length_contexts(bucket)[within], length[within] - 1),
            "drop": Symbols(runs.drop_contexts(bucket)[later], level[later - 1] - level[later]),
            "gap": number("gap", _gap_contexts(length, filled), gaps),
            "tail": Symbols(everywhere, labels.tail),
            "realised": number("realised", everywhere, labels.realised),
        }, rest

    def _buckets(self, first: np.ndarray) -> np.ndarray:
        return first * _BUCKETS // self.steps.levels

    def encode(self, sequence: StoredSequence) -> bytes:
        """Return the bytes of a sequence, by the newest tables; see docs/soft-label-format.md.

        Raises:
            StoreError: If it has more labels than a reader takes.
        """
        if len(sequence.ids) > _MOST_LABELS:
            raise StoreError(f"{len(sequence.ids)} labels in one sequence are more than {_MOST_LABELS}. Use shorter sequences.")
        tables = self.tables(self.number)
        symbols, rest = self.symbols(self.rounded(sequence), tables)
        coder = constriction.stream.stack.AnsCoder()
        for name in reversed(symbols):  # the coder gives back last what it got first
            tables.frequencies[name].encode(coder, symbols[name])
        bits = pack(list(rest.values()))
        sizes = (len(sequence.supervised), len(sequence.tokens), len(sequence.starts), len(sequence.counts), len(sequence.ids))
        columns = (
            sequence.tokens.astype("<u4"),
            sequence.starts.astype("<u4"),
            np.packbits(sequence.supervised, bitorder="little"),
            np.frombuffer(bits, np.uint8),
            np.asarray(coder.get_compressed(), dtype="<u4"),
        )
        return self._head.pack(self.number, *sizes, len(bits)) + b"".join(column.tobytes() for column in columns)

    def decode(self, data: bytes) -> StoredSequence:
        """Return the sequence of some bytes."""
        tokens, starts, supervised, labels = self._columns(data)
        probabilities, tail = self._probabilities(labels)
        return StoredSequence(
            tokens=tokens,
            starts=starts,
            supervised=supervised,
            counts=labels.counts.astype(np.uint32),
            ids=labels.ids.astype(np.uint32),
            probabilities=probabilities,
            tail=tail,
            realised=bfloat16_bits(-labels.realised / _NATS),
        )

    def decode_rounded(self, data: bytes) -> RoundedLabels:
        """Return the labels of some bytes as ``rounded`` gave them."""
        labels = self._columns(data)[-1]
        order = self._order(labels.counts, labels.levels, labels.ids)
        return replace(labels, levels=labels.levels[order], ids=labels.ids[order])

    def column_bytes(self, data: bytes) -> dict[str, float]:
        """Return how many of a record's bytes each column takes, by the frequencies that its symbols have."""
        tables = self.tables(self._head.unpack_from(data)[0])
        symbols, rest = self.symbols(self.decode_rounded(data), tables)
        size = {name: tables.frequencies[name].bits(own) / 8 for name, own in symbols.items()}
        for name, (bits, _) in rest.items():
            size[name] += float(bits.sum()) / 8
        parts = {"ids": ("topic", "gap"), "values": ("first", "runs", "length", "drop")}
        return {**{name: sum(map(size.pop, own)) for name, own in parts.items()}, **size}

    def error_bound(self, sequence: StoredSequence) -> np.ndarray:
        """Return twice the squared distance that the square roots of values and tail can have moved [supervised tokens], nats."""
        tail = 2 * (0.5 / _TAIL_STEPS) ** 2
        if self.steps.values == "even":
            return np.zeros(len(sequence.counts))
        if self.steps.values == "sqrt":
            return sequence.counts * self.steps.step**2 / 2 + tail * (self.steps.floor == 0)
        owner = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
        mass = np.bincount(owner, of_bfloat16(sequence.probabilities), minlength=len(sequence.counts))
        return mass * self.steps.step**2 / 8 + tail

    def mass_error(self, sequence: StoredSequence) -> np.ndarray:
        """Return how far a token's rounded values and tail can lie from 1 in all."""
        tail = 2 / _TAIL_STEPS
        if self.steps.values == "even":
            return np.full(len(sequence.counts), 0.02)
        if self.steps.values == "log":
            return np.full(len(sequence.counts), np.expm1(self.steps.step / 2) + tail + 0.02)
        # By half a step each, of square roots whose squares add up to 1 at most.
        half = self.steps.step / 2
        return 2 * half * np.sqrt(sequence.counts) + sequence.counts * half**2 + tail + 0.02

    def length(self, data: bytes) -> int:
        """Return the number of tokens of a record, from its head."""
        return int(self._head.unpack_from(data)[1])

    def _columns(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, RoundedLabels]:
        if len(data) < self._head.size:
            raise StoreError("a record is shorter than its head")
        number, length, tokens, starts, supervised, kept, bits = self._head.unpack_from(data)
        mask_bytes = -(-length // 8)
        mask = self._head.size + 4 * tokens + 4 * starts
        words = mask + mask_bytes + bits
        if words > len(data) or (len(data) - words) % 4 or supervised > length or kept > _MOST_LABELS:
            raise StoreError("a record's columns do not fit its head")

        def column(count: int, dtype: str, offset: int) -> np.ndarray:
            return np.frombuffer(data, dtype=dtype, count=count, offset=offset)

        flags = np.unpackbits(column(mask_bytes, "u1", mask), count=length, bitorder="little").astype(bool)
        try:
            coder = constriction.stream.stack.AnsCoder(column((len(data) - words) // 4, "<u4", words).astype(np.uint32))
        except ValueError as error:
            raise StoreError("a record's labels end in nothing") from error
        reader = BitReader(column(bits, "u1", mask + mask_bytes))
        labels = self._take(coder, reader, self.tables(number), supervised, kept)
        if int(flags.sum()) != supervised or not coder.is_empty() or not reader.is_empty():
            raise StoreError("a record's columns do not fit its head")
        after_tokens = self._head.size + 4 * tokens
        return column(tokens, "<u4", self._head.size), column(starts, "<u4", after_tokens), flags, labels

    def _probabilities(self, labels: RoundedLabels) -> tuple[np.ndarray, np.ndarray]:
        """Return what labels and tails stand for, bfloat16 as uint16; a token's add up to at most 1, unless they are samples."""
        values = self._values[labels.levels]
        tail = of_bfloat16(bfloat16_bits((labels.tail / _TAIL_STEPS) ** 2))
        if self.steps.floor or self.steps.values == "even":
            return _cut(values), _cut(tail)
        filled = np.flatnonzero(labels.counts)
        mass = tail.copy()
        if len(filled):
            mass[filled] += np.add.reduceat(values, np.cumsum(labels.counts[filled]) - labels.counts[filled])
        over = np.flatnonzero(mass > 1)
        if len(over):
            smaller = np.ones_like(tail)
            smaller[over] = (1 - 1e-6) / mass[over]  # float32 sums are that exact
            tail = tail * smaller
            values = values * np.repeat(smaller, labels.counts)
        return _cut(values), _cut(tail)

    def _take(self, coder: Any, reader: BitReader, tables: LabelTables, tokens: int, kept: int) -> RoundedLabels:
        """Take from a coder and a reader what ``encode`` put there, in the same order."""
        frequencies = tables.frequencies

        def number(name: str, contexts: np.ndarray) -> np.ndarray:
            return reader.join(frequencies[name].decode(coder, contexts))

        none = np.zeros(tokens, np.int64)
        counts = number("counts", none)
        filled = counts[counts > 0]
        if int(filled.sum()) != kept:
            raise StoreError("a record's counts do not fit its head")
        topic = frequencies["topic"].decode(coder, none[: len(filled)])
        first = frequencies["first"].decode(coder, none[: len(filled)])
        if len(topic) and topic.max() >= len(tables.topics):
            raise StoreError("a record's topics are none")
        bucket = self._buckets(first)
        many = number("runs", bucket) + 1
        if (many > filled).any():
            raise StoreError("a record's labels fall in more steps than there are labels")
        runs = _Runs(many)
        length = np.zeros(len(runs.left), np.int64)
        within, last, later = np.flatnonzero(runs.left > 1), np.flatnonzero(runs.left == 1), np.flatnonzero(runs.index)
        length[within] = number("length", runs.length_contexts(bucket)[within]) + 1
        length[last] = filled - np.add.reduceat(length, runs.starts) if len(last) else 0
        if len(length) and (length.min() < 1 or length.max() > kept):
            raise StoreError("a record's runs of labels do not fit their counts")
        level = np.zeros(len(runs.left), np.int64)
        level[later] = -frequencies["drop"].decode(coder, runs.drop_contexts(bucket)[later])
        level[runs.starts] = first
        level = _sums_within(level, runs.starts, runs.number)
        if len(level) and level.min() < 0:
            raise StoreError("a record's labels fall below nothing")
        ranks = number("gap", _gap_contexts(length, filled)) + 1
        begins = np.cumsum(length) - length
        ranks[begins] -= 1
        ranks = _sums_within(ranks, begins, length)
        ids = tables.ids(ranks, np.repeat(topic, filled))
        if kept and ids.min() < 0:
            raise StoreError("a record's ids are none of the vocabulary")
        everywhere = none.copy()
        everywhere[counts > 0] = bucket
        tail = frequencies["tail"].decode(coder, everywhere)
        return RoundedLabels(counts, np.repeat(level, length), ids, tail, number("realised", everywhere))


def _counted(symbols: Symbols, shape: tuple[int, int]) -> np.ndarray:
    """Return how often each symbol came in each context [contexts, symbols]."""
    flat = np.bincount(symbols.contexts * shape[1] + symbols.values, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


class _Runs:
    """Neighbours of one token with the same level.

    Args:
        number: How many each token has, 1 or more [tokens with labels].
    """

    def __init__(self, number: np.ndarray) -> None:
        self.number = number
        self.starts = np.cumsum(number) - number
        self.index = np.arange(int(number.sum())) - np.repeat(self.starts, number)  # within the token
        self.left = np.repeat(number, number) - self.index  # runs of the token, this one included

    def length_contexts(self, bucket: np.ndarray) -> np.ndarray:
        """Return the contexts of lengths: how many runs are left, and the bucket of the token's first level."""
        return _FEW[np.minimum(self.left, len(_FEW) - 1)] * _BUCKETS + np.repeat(bucket, self.number)

    def drop_contexts(self, bucket: np.ndarray) -> np.ndarray:
        """Return the contexts of steps between levels: how many runs came before, and the bucket."""
        return _FEW[np.minimum(self.index, len(_FEW) - 1)] * _BUCKETS + np.repeat(bucket, self.number)


def _gap_contexts(length: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Return the contexts of the gaps between ranks: how many of the run are left, if it begins, how far down the list.

    Args:
        length: Labels of each run.
        filled: Labels of each token that has any.
    """
    ends = np.cumsum(length)
    count = int(ends[-1]) if len(ends) else 0
    place = np.arange(count, dtype=np.int32)
    left = np.minimum(np.repeat(ends.astype(np.int32), length) - place, len(_PLACE) - 1)
    column = place - np.repeat((np.cumsum(filled) - filled).astype(np.int32), filled)
    contexts = _PLACE[left] * 8 + np.minimum(column >> 3, 3)
    contexts[ends - length] += 4
    return contexts


def _sums_within(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sums of values up to each one within its group; groups have a start and a length."""
    sums = np.cumsum(values)
    return sums - np.repeat(sums[starts] - values[starts], lengths)


def _cut(values: np.ndarray) -> np.ndarray:
    """Return float32 of 0 or more as the bfloat16 at or below it."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
