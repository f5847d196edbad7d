"""One sequence's soft labels, and the plain way to write them; ``ranked`` has the small one. A store's header names its codec."""

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zstandard

from ...errors import InputError

LARGEST = 1 << 28  # bytes that anything in a store may unpack to


class StoreError(InputError):
    """A soft-label store that is missing, damaged, of another format or made for something else."""


def decompressed(data: bytes) -> bytes:
    """Return what zstd packed.

    Raises:
        StoreError: If it is damaged, or says that it is larger than anything in a store.
    """
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if not 0 <= size <= LARGEST:
            raise StoreError("a packed part does not say its size, or is larger than a store has")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise StoreError(f"a packed part is damaged: {error}") from error


def of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16, held as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Return numbers as the nearest bfloat16, held as uint16."""
    whole = values.astype(np.float32).view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass
class StoredSequence:
    """One sequence with its labels, as numpy arrays.

    Args:
        tokens: Token ids [length], uint32; empty in a store with ``tokens: external``.
        starts: Positions at which a document's piece begins, rising from 0, uint32.
        supervised: Whether a token has a successor to predict [length], bool; N of them are True.
        counts: Labels kept for each supervised token [N], uint32.
        ids: Kept token ids, token after token [sum of counts], uint32; of equal probabilities the order means nothing.
        probabilities: Their probabilities, bfloat16 as uint16 [sum of counts].
        tail: Probability of what was not kept, bfloat16 as uint16 [N].
        realised: Log-probability of the text's own next token in nats, bfloat16 as uint16 [N].
    """

    tokens: np.ndarray
    starts: np.ndarray
    supervised: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    tail: np.ndarray
    realised: np.ndarray

    def check(self) -> None:
        """Raise a StoreError if a probability or a log-probability is none, as of a teacher whose numbers overflow."""
        for name, most in (("probabilities", 1.01), ("tail", 1.01), ("realised", 0.01)):
            values = of_bfloat16(getattr(self, name))
            wrong = ~(np.isfinite(values) & (values <= most))
            if wrong.any():
                raise StoreError(f"{name}: the teacher says {values[wrong][0]}, which is none. Use weights=float32.")


class Codec(Protocol):
    """Turns a sequence into bytes and back, before compression."""

    name: str

    def encode(self, sequence: StoredSequence) -> bytes:
        """Return the bytes of a sequence."""
        ...

    def decode(self, data: bytes) -> StoredSequence:
        """Return the sequence of some bytes; raise a StoreError if they are none."""
        ...

    def column_bytes(self, data: bytes) -> dict[str, float]:
        """Return how many of a record's bytes each column takes: counts, ids, values, tail, realised."""
        ...

    def error_bound(self, sequence: StoredSequence) -> np.ndarray:
        """Return, for each supervised token, what rounding can cost: KL(what was kept and the tail || what is read) in nats.

        Second order in the size of the steps; bfloat16, in which labels come, counts as exact.
        """
        ...

    def mass_error(self, sequence: StoredSequence) -> np.ndarray:
        """Return, for each supervised token, by how much what is read may fail to add up to 1."""
        ...

    def length(self, data: bytes) -> int:
        """Return the number of tokens of a record, from its head."""
        ...


class PlainCodec:
    """bfloat16 values as they are and ids packed to the bits that the vocabulary needs; no loss beyond bfloat16.

    Args:
        vocabulary: Size of the teacher's vocabulary.
    """

    name = "plain-1"
    _head = struct.Struct("<5I")  # length, stored tokens, starts, supervised tokens, kept labels

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.bits = max(1, (vocabulary - 1).bit_length())
        self._shifts = np.arange(self.bits, dtype=np.uint32)

    def encode(self, sequence: StoredSequence) -> bytes:
        """Return the columns one after another behind their five sizes; see docs/soft-label-format.md."""
        sizes = (
            len(sequence.supervised),
            len(sequence.tokens),
            len(sequence.starts),
            len(sequence.counts),
            len(sequence.ids),
        )
        columns = (
            sequence.tokens.astype("<u4"),
            sequence.starts.astype("<u4"),
            np.packbits(sequence.supervised, bitorder="little"),
            sequence.counts.astype("<u4"),
            sequence.probabilities.astype("<u2"),
            self.pack(sequence.ids),
            sequence.tail.astype("<u2"),
            sequence.realised.astype("<u2"),
        )
        return self._head.pack(*sizes) + b"".join(column.tobytes() for column in columns)

    def decode(self, data: bytes) -> StoredSequence:
        """Return the sequence of some bytes."""
        if len(data) < self._head.size:
            raise StoreError("a record is shorter than its head")
        length, tokens, starts, supervised, kept = self._head.unpack_from(data)
        position = self._head.size

        def column(count: int, dtype: str) -> np.ndarray:
            nonlocal position
            size = count * np.dtype(dtype).itemsize
            if position + size > len(data):
                raise StoreError("a record ends within a column")
            values = np.frombuffer(data, dtype=dtype, count=count, offset=position)
            position += size
            return values

        sequence = StoredSequence(
            tokens=column(tokens, "<u4"),
            starts=column(starts, "<u4"),
            supervised=np.unpackbits(column(-(-length // 8), "u1"), count=length, bitorder="little").astype(bool),
            counts=column(supervised, "<u4"),
            probabilities=column(kept, "<u2"),
            ids=self.unpack(column(-(-kept * self.bits // 8), "u1"), kept),
            tail=column(supervised, "<u2"),
            realised=column(supervised, "<u2"),
        )
        if position != len(data) or int(sequence.counts.sum()) != kept or int(sequence.supervised.sum()) != supervised:
            raise StoreError("a record's columns do not fit its head")
        return sequence

    def column_bytes(self, data: bytes) -> dict[str, float]:
        """Return how many of a record's bytes each column takes, before zstd."""
        *_, supervised, kept = self._head.unpack_from(data)
        ids = -(-kept * self.bits // 8)
        return {"counts": 4 * supervised, "ids": ids, "values": 2 * kept, "tail": 2 * supervised, "realised": 2 * supervised}

    def error_bound(self, sequence: StoredSequence) -> np.ndarray:
        """Return zeros: nothing is rounded."""
        return np.zeros(len(sequence.counts))

    def mass_error(self, sequence: StoredSequence) -> np.ndarray:
        """Return what rounding to bfloat16 can add up to."""
        return np.full(len(sequence.counts), 0.02)

    def length(self, data: bytes) -> int:
        """Return the number of tokens of a record, from its head."""
        return int(self._head.unpack_from(data)[0])

    def pack(self, ids: np.ndarray) -> np.ndarray:
        """Return ids in as many bits as the vocabulary needs, the lowest first, uint8."""
        bits = (ids.astype(np.uint32)[:, None] >> self._shifts) & 1
        return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")

    def unpack(self, packed: np.ndarray, count: int) -> np.ndarray:
        """Return packed ids, uint32 [count]."""
        bits = np.unpackbits(packed, count=count * self.bits, bitorder="little").reshape(count, self.bits)
        # Whole bytes of each id are put together again, which is far cheaper than summing bit by bit.
        padded = np.zeros((count, 32), dtype=np.uint8)
        padded[:, : self.bits] = bits
        return np.packbits(padded, axis=1, bitorder="little").view("<u4")[:, 0]
