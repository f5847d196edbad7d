"""Numbers without a bound, as a symbol that says about how large they are and the bits that are left."""

from collections.abc import Sequence

import numpy as np

from .codec import StoreError

SYMBOLS = 80  # of numbers up to 2.6 million: a store has 2^21 ids at most


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers of 0 or more as symbols, how many bits are left of each, and which, all int64 [numbers].

    A symbol says where the highest bit of the number plus one stands, and the two bits below it.
    """
    more = values.astype(np.int64) + 1
    bits = np.maximum(np.frexp(more.astype(np.float64))[1] - 3, 0).astype(np.int64)
    symbols = np.where(more < 4, more, (bits << 2) + (more >> bits))
    return symbols - 1, bits, more & ((1 << bits) - 1)


_BITS = np.maximum(np.arange(1, SYMBOLS + 1) // 4 - 1, 0).astype(np.int32)  # that are left, by symbol
_BASE = ((np.arange(1, SYMBOLS + 1) - (_BITS << 2)) << _BITS).astype(np.int64) - 1


def pack(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Return the bits that are left, one number after another, the lowest bit first.

    Args:
        parts: How many bits, and which, int64 [numbers] each.
    """
    bits, low = (np.concatenate(part) for part in zip(*parts))
    index = np.arange(int(bits.sum())) - np.repeat(np.cumsum(bits) - bits, bits)
    return np.packbits((np.repeat(low, bits) >> index).astype(np.uint8) & 1, bitorder="little").tobytes()


class BitReader:
    """Reads numbers whose symbols are known, in the order in which they were packed.

    Args:
        data: The packed bits, uint8 [bytes].
    """

    def __init__(self, data: np.ndarray) -> None:
        padded = np.concatenate([data, np.zeros(5, dtype=np.uint8)]).astype(np.int64)
        # The 40 bits that begin at each byte: enough for the longest number at any bit.
        self._windows = sum(padded[place : place + len(data) + 1] << (8 * place) for place in range(5))
        self._size, self._position = 8 * len(data), 0

    def join(self, symbols: np.ndarray) -> np.ndarray:
        """Return the numbers of some symbols, int64 [numbers].

        Raises:
            StoreError: If there are not that many bits.
        """
        bits = _BITS[symbols]
        ends = np.cumsum(bits) + self._position
        if len(ends):
            self._position = int(ends[-1])
        if self._position > self._size:
            raise StoreError("a record ends within a number")
        begins = ends - bits
        low = (self._windows[begins >> 3] >> (begins & 7)) & ((1 << bits) - 1)  # type: ignore[index]
        return _BASE[symbols] + low

    def is_empty(self) -> bool:
        """Whether all has been read, up to the bits that fill the last byte."""
        return self._size - self._position < 8
