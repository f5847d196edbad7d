"""Soft labels in few bytes: values in even steps and ids by rank, both written by asymmetric numeral systems.

A token's labels fall in value, so values are told by their differences. Where values are equal the order says nothing: ids of one
value are put in the order of their rank, and told by the gaps between ranks. Ranks are those of a topic, a group of tokens with
like labels (``LabelTables``). Symbols are written with the frequencies of their context, by the ANS coder of ``constriction``.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import constriction
import numpy as np

from ...errors import InputError
from .codec import StoredSequence, StoreError
from .tables import TOPICS, LabelTables, Symbols

Values = Literal["sqrt", "log"]

_NUMBERS = 80  # symbols of the classes of numbers
_COLUMNS = 16  # groups of columns of labels with frequencies of their own
_BUCKETS = 6  # of the first value
_TAIL_STEPS = 255
_NATS = 32  # steps of a nat in the realised log-probability
_COLUMN_GROUP = np.rint(2.5 * np.log2(np.arange(65).clip(min=1))).astype(np.int64)
_MOST_LABELS = 1 << 25  # of a sequence
_MOST_NATS = (1 << 16) / _NATS


@dataclass(frozen=True)
class ValueSteps:
    """How probabilities are rounded.

    Args:
        values: ``sqrt``: even steps of the square root, which spread the error of a KL divergence evenly; ``log``: even steps of
            the logarithm, for uses that raise small probabilities (temperatures above 1, reverse KL); ``even``: of the
            probability itself, which the counts of ``random`` selection are.
        step: Their size.
        floor: Smallest probability that there is (``sampled`` selection), which stays exact; 0 for none. Goes with ``sqrt``.

    Raises:
        InputError: If they are of an unknown kind or of no use.
    """

    values: Literal["sqrt", "log", "even"] = "sqrt"
    step: float = 0.01
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.values not in ("sqrt", "log", "even"):
            raise InputError(f"values={self.values!r} is unknown. Legal: sqrt, log.")
        if self.floor and self.values != "sqrt":
            raise InputError(f"values={self.values!r} would round what 'sampled' selection drew. Legal with it: sqrt.")
        if not 0.001 <= self.step <= 0.5:
            raise InputError(
                f"value_step={self.step} is too fine or too coarse. Legal: 0.001 to 0.5; 0.01 for sqrt, 0.05 for log."
            )

    @property
    def levels(self) -> int:
        """Number of levels; the first stands for the smallest values."""
        return 2 + int(np.ceil((16.6 if self.values == "log" else 1) / self.step))

    def level(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the level of each probability, int64; it never falls with the probability."""
        p = probabilities.astype(np.float64)
        if self.values == "log":
            found = self.levels - 1 - np.rint(-np.log(p.clip(1e-12)) / self.step)
        elif self.values == "even":
            found = np.rint(p / self.step)
        elif self.floor:
            found = np.rint((np.sqrt(p) - np.sqrt(self.floor)) / self.step)
        else:
            found = np.rint(np.sqrt(p) / self.step)
        return found.clip(0, self.levels - 1).astype(np.int64)

    def table(self) -> np.ndarray:
        """Return the probability of each level, float64 [levels]."""
        level = np.arange(self.levels, dtype=np.float64)
        if self.values == "log":
            return np.exp(-(self.levels - 1 - level) * self.step)
        if self.values == "even":
            return (level * self.step).clip(max=1.0)
        if self.floor:
            return ((np.sqrt(self.floor) + level * self.step) ** 2).clip(max=1.0)
        return ((np.maximum(level, 0.35) * self.step) ** 2).clip(max=1.0)  # a value rounded to 0 is not 0


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
    _head = struct.Struct("<6I")  # tables, length, stored tokens, starts, supervised tokens, kept labels

    def __init__(self, vocabulary: int, steps: ValueSteps, tables: Callable[[int], LabelTables]) -> None:
        self.vocabulary, self.steps, self._tables = vocabulary, steps, tables
        self._values = _of_bfloat16(bfloat16_bits(steps.table()))
        self.number = 0
        self.shapes = {
            "counts": (1, _NUMBERS),
            "topic": (1, TOPICS),
            "first": (1, steps.levels),
            "gap": (_COLUMNS * _BUCKETS, steps.levels),
            "delta": (25 * 2 * 4, _NUMBERS),
            "tail": (_BUCKETS, _TAIL_STEPS + 1),
            "realised": (_BUCKETS, _NUMBERS),
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
        levels = self.steps.level(_of_bfloat16(sequence.probabilities))
        order = self._order(counts, levels, ids)
        tail, realised = _of_bfloat16(sequence.tail), _of_bfloat16(sequence.realised)
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

    def symbols(
        self, labels: RoundedLabels, tables: LabelTables
    ) -> "tuple[dict[str, Symbols], dict[str, tuple[np.ndarray, np.ndarray]]]":
        """Return what is written with frequencies, by kind, and the numbers' remaining bits: how many, and which."""
        layout = _Layout(labels.counts)
        first = labels.levels[layout.starts]
        gaps = labels.levels[layout.behind - 1] - labels.levels[layout.behind]
        runs = _Runs(layout, gaps)
        topic = tables.topic_of(labels.ids, layout.starts)
        ranks = tables.rank(labels.ids, topic[layout.row])
        ranks = ranks[np.argsort(runs.number * (1 << 32) + ranks, kind="stable")]
        deltas = ranks.copy()
        within = np.flatnonzero(~runs.new)
        deltas[within] -= ranks[within - 1] + 1
        if len(deltas) and deltas.min() < 0:
            raise StoreError("a token has the same id twice among its labels")
        bucket = self._buckets(layout, first)
        rest: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def number(name: str, contexts: np.ndarray, values: np.ndarray) -> Symbols:
            symbols, bits, low = _split(values)
            rest[name] = bits, low
            return Symbols(contexts, symbols)

        nothing = np.zeros(len(labels.counts), np.int64)
        return {
            "counts": number("counts", nothing, labels.counts),
            "topic": Symbols(nothing[: len(topic)], topic),
            "first": Symbols(nothing[: len(first)], first),
            "gap": Symbols(self._gap_contexts(layout, first), gaps),
            "delta": number("delta", runs.contexts(layout), deltas),
            "tail": Symbols(bucket, labels.tail),
            "realised": number("realised", bucket, labels.realised),
        }, rest

    def _buckets(self, layout: "_Layout", first: np.ndarray) -> np.ndarray:
        bucket = np.zeros(len(layout.counts), np.int64)
        bucket[layout.counts > 0] = first * _BUCKETS // self.steps.levels
        return bucket

    def _gap_contexts(self, layout: "_Layout", first: np.ndarray) -> np.ndarray:
        return (
            _COLUMN_GROUP[np.minimum(layout.column[layout.behind], len(_COLUMN_GROUP) - 1)] * _BUCKETS
            + (first * _BUCKETS // self.steps.levels)[layout.row[layout.behind]]
        )

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
            if name in rest:
                _put_bits(coder, *rest[name])
            tables.frequencies[name].encode(coder, symbols[name])
        sizes = (len(sequence.supervised), len(sequence.tokens), len(sequence.starts), len(sequence.counts), len(sequence.ids))
        columns = (
            sequence.tokens.astype("<u4"),
            sequence.starts.astype("<u4"),
            np.packbits(sequence.supervised, bitorder="little"),
            np.asarray(coder.get_compressed(), dtype="<u4"),
        )
        return self._head.pack(self.number, *sizes) + b"".join(column.tobytes() for column in columns)

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
        ids, values = size.pop("topic") + size.pop("delta"), size.pop("first") + size.pop("gap")
        return {**size, "ids": ids, "values": values}

    def error_bound(self, sequence: StoredSequence) -> np.ndarray:
        """Return twice the squared distance that the square roots of values and tail can have moved [supervised tokens], nats."""
        tail = 2 * (0.5 / _TAIL_STEPS) ** 2
        if self.steps.values == "even":
            return np.zeros(len(sequence.counts))
        if self.steps.values == "sqrt":
            return sequence.counts * self.steps.step**2 / 2 + tail * (self.steps.floor == 0)
        owner = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
        mass = np.bincount(owner, _of_bfloat16(sequence.probabilities), minlength=len(sequence.counts))
        return mass * self.steps.step**2 / 8 + tail

    def _columns(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, RoundedLabels]:
        if len(data) < self._head.size:
            raise StoreError("a record is shorter than its head")
        number, length, tokens, starts, supervised, kept = self._head.unpack_from(data)
        mask_bytes = -(-length // 8)
        words = self._head.size + 4 * tokens + 4 * starts + mask_bytes
        if words > len(data) or (len(data) - words) % 4 or supervised > length or kept > _MOST_LABELS:
            raise StoreError("a record's columns do not fit its head")

        def column(count: int, dtype: str, offset: int) -> np.ndarray:
            return np.frombuffer(data, dtype=dtype, count=count, offset=offset)

        flags = np.unpackbits(column(mask_bytes, "u1", words - mask_bytes), count=length, bitorder="little").astype(bool)
        try:
            coder = constriction.stream.stack.AnsCoder(column((len(data) - words) // 4, "<u4", words).astype(np.uint32))
        except ValueError as error:
            raise StoreError("a record's labels end in nothing") from error
        labels = self._take(coder, self.tables(number), supervised, kept)
        if int(flags.sum()) != supervised or not coder.is_empty():
            raise StoreError("a record's columns do not fit its head")
        after_tokens = self._head.size + 4 * tokens
        return column(tokens, "<u4", self._head.size), column(starts, "<u4", after_tokens), flags, labels

    def _probabilities(self, labels: RoundedLabels) -> tuple[np.ndarray, np.ndarray]:
        """Return what labels and tails stand for, bfloat16 as uint16; a token's add up to at most 1, unless they are samples."""
        values = self._values[labels.levels]
        tail = _of_bfloat16(bfloat16_bits((labels.tail / _TAIL_STEPS) ** 2))
        if self.steps.floor or self.steps.values == "even":
            return _cut(values), _cut(tail)
        mass = np.bincount(np.repeat(np.arange(len(labels.counts)), labels.counts), values, minlength=len(labels.counts)) + tail
        smaller = (1 / np.maximum(mass, 1)).astype(np.float32)
        return _cut(values * np.repeat(smaller, labels.counts)), _cut(tail * smaller)

    def _take(self, coder: Any, tables: LabelTables, tokens: int, kept: int) -> RoundedLabels:
        """Take from a coder what ``encode`` put there, in the same order."""
        frequencies = tables.frequencies

        def number(name: str, contexts: np.ndarray) -> np.ndarray:
            symbols = frequencies[name].decode(coder, contexts)
            return _joined(symbols, _take_bits(coder, _bits_of(symbols)))

        nothing = np.zeros(tokens, np.int64)
        counts = number("counts", nothing)
        if int(counts.sum()) != kept:
            raise StoreError("a record's counts do not fit its head")
        layout = _Layout(counts)
        filled = nothing[: len(layout.starts)]
        topic = frequencies["topic"].decode(coder, filled)
        first = frequencies["first"].decode(coder, filled)
        gaps = frequencies["gap"].decode(coder, self._gap_contexts(layout, first))
        runs = _Runs(layout, gaps)
        deltas = number("delta", runs.contexts(layout))
        bucket = self._buckets(layout, first)
        tail = frequencies["tail"].decode(coder, bucket)
        realised = number("realised", bucket)
        fallen = np.zeros(kept, np.int64)
        fallen[layout.behind] = gaps
        levels = first[layout.row] - _within(fallen, layout.starts, layout.row)
        ranks = deltas + 1
        ranks[runs.new] -= 1
        ranks = _within(ranks, runs.starts, runs.number)
        if kept and (levels.min() < 0 or ranks.max() >= (1 << 31)):
            raise StoreError("a record's labels are none")
        if len(topic) and topic.max() >= len(tables.topics):
            raise StoreError("a record's topics are none")
        ids = tables.ids(ranks, topic[layout.row])
        if kept and ids.min() < 0:
            raise StoreError("a record's ids are none of the vocabulary")
        return RoundedLabels(counts, levels, ids, tail, realised)


def _counted(symbols: Symbols, shape: tuple[int, int]) -> np.ndarray:
    """Return how often each symbol came in each context [contexts, symbols]."""
    flat = np.bincount(symbols.contexts * shape[1] + symbols.values, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


class _Layout:
    """Where the labels of tokens stand.

    Args:
        counts: Labels of each token [tokens].
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        filled = counts[counts > 0]
        self.starts = np.cumsum(filled) - filled  # of the tokens that have labels
        self.row = np.repeat(np.arange(len(filled)), filled)  # number of a label's token among them
        self.column = np.arange(len(self.row)) - self.starts[self.row]
        self.behind = np.flatnonzero(self.column)  # labels that are not their token's first


class _Runs:
    """Neighbours of one token with the same level.

    Args:
        layout: Of the labels.
        gaps: By how much each label behind a token's first falls.
    """

    def __init__(self, layout: _Layout, gaps: np.ndarray) -> None:
        self.new = layout.column == 0
        self.new[layout.behind] = gaps > 0
        self.starts = np.flatnonzero(self.new)
        self.number = np.cumsum(self.new) - 1

    def contexts(self, layout: _Layout) -> np.ndarray:
        """Return the contexts of the gaps between ranks: how many of the run are left, if it begins, how far down the list."""
        left = np.append(self.starts[1:], len(self.new))[self.number] - np.arange(len(self.new))
        return (np.minimum(left, 24) * 2 + self.new) * 4 + np.minimum(layout.column // 8, 3)


def _within(values: np.ndarray, starts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the sums of values up to each one within its group, the groups beginning at ``starts``."""
    sums = np.cumsum(values)
    return sums - (sums[starts] - values[starts])[group]


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers of 0 or more as symbols, which say where the highest bit stands and the two below it, and the bits left."""
    more = values + 1
    bits = np.maximum(np.frexp(more.astype(np.float64))[1] - 3, 0).astype(np.int64)
    symbols = np.where(more < 4, more, (bits << 2) + (more >> bits))
    return symbols - 1, bits, more & ((1 << bits) - 1)


def _bits_of(symbols: np.ndarray) -> np.ndarray:
    return np.maximum((symbols + 1) // 4 - 1, 0)


def _joined(symbols: np.ndarray, low: np.ndarray) -> np.ndarray:
    bits = _bits_of(symbols)
    return ((symbols + 1 - (bits << 2)) << bits) + low - 1


def _put_bits(coder: Any, bits: np.ndarray, low: np.ndarray) -> None:
    order = np.argsort(bits.astype(np.int8), kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(bits))])
    values = low[order].astype(np.int32)
    for count in range(len(start) - 2, 0, -1):
        if start[count] < start[count + 1]:
            coder.encode_reverse(values[start[count] : start[count + 1]], _even(count))


def _take_bits(coder: Any, bits: np.ndarray) -> np.ndarray:
    low = np.zeros(len(bits), dtype=np.int64)
    counts = np.bincount(bits)
    parts = [np.zeros(counts[0] if len(counts) else 0, np.int64)]
    parts += [coder.decode(_even(count), int(counts[count])) for count in range(1, len(counts)) if counts[count]]
    low[np.argsort(bits.astype(np.int8), kind="stable")] = np.concatenate(parts)
    return low


_EVEN: dict[int, Any] = {}


def _even(bits: int) -> Any:
    if bits not in _EVEN:
        _EVEN[bits] = constriction.stream.model.Uniform(1 << bits)
    return _EVEN[bits]


def _of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cut(values: np.ndarray) -> np.ndarray:
    """Return float32 of 0 or more as the bfloat16 at or below it."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Return numbers as the nearest bfloat16, in uint16."""
    whole = values.astype(np.float32).view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)
