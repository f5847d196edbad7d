"""What goes over the network for a vector of gradients: which entries, and in which bytes.

The number of entries depends on sizes and the rate alone, never on values, so that all ranks send messages of the same length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 1 << 16  # entries whose place fits into 16 bits
GROUP = 256  # values of 4 bits that share a scale
_SAMPLE = 16  # of so many entries, one is looked at to find a threshold
_MARGIN = 1.05  # candidates that the threshold lets through, for each that is sent

Form = Literal["ids", "mask", "all"]
ValueBits = Literal[4, 16]


@dataclass(frozen=True)
class Layout:
    """Sizes of a message that carries a share of a vector.

    Args:
        size: Entries of the vector.
        keep: Share of them that is sent, above 0, up to 1.
        value_bits: Bits of a value: 16 for bfloat16; 4 for a sign and the root of its share of the largest of 256, in sevenths.
    """

    size: int
    keep: float
    value_bits: ValueBits = 16

    @property
    def blocks(self) -> int:
        """Blocks of up to 65536 entries; the last may be shorter."""
        return -(-self.size // BLOCK)

    def counts(self) -> list[int]:
        """Return how many entries of each block are sent; at least one."""
        sizes = [min(BLOCK, self.size - start) for start in range(0, self.size, BLOCK)]
        if self.form == "all":
            return sizes
        return [min(size, max(1, math.ceil(self.keep * size))) for size in sizes]

    @property
    def count(self) -> int:
        """Entries that are sent."""
        return sum(self.counts())

    @property
    def form(self) -> Form:
        """The smallest one: 16-bit ids, a bit for every entry, or every entry, where no fewer bytes would leave some out."""
        if sends_all(self.keep, self.value_bits):
            return "all"
        return "ids" if self.keep <= 1 / 16 else "mask"

    @property
    def place_bytes(self) -> int:
        """Bytes that say which entries are sent."""
        return {"ids": 2 * self.count, "mask": -(-self.size // 8), "all": 0}[self.form]

    @property
    def value_bytes(self) -> int:
        """Bytes of the values, scales included."""
        return 2 * self.count if self.value_bits == 16 else -(-self.count // 2) + 2 * -(-self.count // GROUP)

    @property
    def bytes(self) -> int:
        """Bytes of the message: places, then values."""
        return self.place_bytes + self.value_bytes


def entry_bytes(keep: float, value_bits: ValueBits = 16) -> float:
    """Return the bytes of an entry that is sent, its place and its part of a scale included, at a kept share."""
    value = 2.0 if value_bits == 16 else 0.5 + 2 / GROUP
    return min(2.0 + value, 1 / (8 * keep) + value, value / keep)


def sends_all(keep: float, value_bits: ValueBits = 16) -> bool:
    """Whether a message of a kept share carries all entries, since it would be no shorter if it left some out."""
    return keep * entry_bytes(keep, value_bits) >= entry_bytes(1.0, value_bits) - 1e-9


def link_bytes(keep: float, ranks: int, value_bits: ValueBits = 16) -> tuple[float, float]:
    """Return the bytes that an entry of a vector takes through a rank's link where a share of the vector is sent.

    Args:
        keep: Share that is sent.
        ranks: P.
        value_bits: Bits of a value.

    Returns:
        By an all-gather, in which each rank sends its message to ``P - 1`` others; and in two phases, in which each rank gets
        the messages of one P-th of the vector, and sends their sum to the others, of which up to P times the share is not zero.
    """
    both = keep * entry_bytes(keep, value_bits) + sum_share(keep, ranks) * entry_bytes(sum_share(keep, ranks), value_bits)
    return (ranks - 1) * keep * entry_bytes(keep, value_bits), (ranks - 1) / ranks * both


def sum_share(keep: float, ranks: int) -> float:
    """Return the share of a sum that is sent in the second phase: what so many ranks may have selected."""
    return min(1.0, ranks * keep)


def in_two_phases(keep: float, ranks: int, value_bits: ValueBits = 16) -> bool:
    """Whether the exchange in two phases takes fewer bytes than the all-gather; arguments as of ``link_bytes``."""
    gathered, phases = link_bytes(keep, ranks, value_bits)
    return phases < gathered - 1e-9


def sparse_pays(keep: float, ranks: int, dense_bytes: int = 2, value_bits: ValueBits = 16) -> bool:
    """Whether sending a share takes fewer bytes through a rank's link than a ring all-reduce of everything.

    Args:
        keep: Share that is sent.
        ranks: P; one rank sends nothing, and prunes at any rate.
        dense_bytes: b, bytes of an entry in the all-reduce, which sends ``2 (P - 1) / P`` times the vector.
        value_bits: Bits of a value of the share.
    """
    return ranks == 1 or min(link_bytes(keep, ranks, value_bits)) < 2 * (ranks - 1) / ranks * dense_bytes - 1e-9


Places = Tensor | slice  # a slice where all entries are sent


def select(values: Tensor, layout: Layout, turn: int = 0) -> Places:
    """Return the places [count] of large entries, ascending, as many in each block as the layout says.

    A threshold is read off a sample of each block, a little low; of the entries above it so many are taken as are to be sent.
    Which of them are left out goes round with ``turn``; with error feedback, what is left out once is sent later.

    Args:
        values: Vector [size], float32.
        layout: How many of each block.
        turn: Changes from call to call.
    """
    counts = layout.counts()
    if layout.form == "all":
        return slice(None)
    whole = layout.size // BLOCK
    parts = []
    if values.is_cuda and whole:
        parts.append(_select_blocks(values[: whole * BLOCK].view(-1, BLOCK).abs(), counts[0], turn))
    elif whole:
        parts.append(torch.from_numpy(_select_one_by_one(values[: whole * BLOCK].numpy(), counts[0], turn)))
    if whole < layout.blocks:
        rest = values[whole * BLOCK :].abs()
        parts.append(rest.topk(counts[-1], sorted=False).indices.sort().values + whole * BLOCK)
    return torch.cat(parts)


def _select_one_by_one(values: np.ndarray, count: int, turn: int) -> np.ndarray:
    """Return places in a vector of whole blocks, ``count`` of each: on a CPU, a block at a time stays in its cache."""
    magnitudes = np.empty(BLOCK, np.float32)
    pieces = []
    for begin in range(0, len(values), BLOCK):
        np.abs(values[begin : begin + BLOCK], out=magnitudes)
        sample = magnitudes[turn % _SAMPLE :: _SAMPLE]
        lowest = len(sample) - _wanted(len(sample), count)
        places = np.flatnonzero(magnitudes >= np.partition(sample, lowest)[lowest])
        if not count <= len(places) <= _most(count):
            places = np.sort(np.argpartition(magnitudes, BLOCK - count)[BLOCK - count :])
        pieces += [places[run] + begin for run in _runs(len(places), count, turn)]
    return np.concatenate(pieces)


def _wanted(sampled: int, count: int) -> int:
    """Return how many of a block's sample are to lie above the threshold, with a margin."""
    return min(sampled, math.ceil(_MARGIN * count / _SAMPLE) + 8)


def _most(count: int) -> int:
    """Return up to how many candidates a run of them is good enough.

    Where there are more, such as all the zeros of an embedding's gradient, the sample has missed the large ones, and the block is
    searched exactly.
    """
    return 2 * count + 64 * _SAMPLE


def _runs(found: int, count: int, turn: int) -> tuple[slice, slice]:
    """Return a run of ``count`` of a block's candidates that goes round, in two pieces where it passes the end."""
    start = -turn * 7919 % found
    wrapped = max(0, start + count - found)
    return slice(0, wrapped), slice(start, start + count - wrapped)


def _select_blocks(table: Tensor, count: int, turn: int) -> Tensor:
    """Return places in a flattened table [blocks, 65536], ``count`` of each row."""
    blocks, size = table.shape
    if count == size:
        return torch.arange(blocks * size, device=table.device)
    sample = table[:, turn % _SAMPLE :: _SAMPLE].contiguous()
    wanted = _wanted(sample.shape[1], count)
    thresholds = sample.kthvalue(sample.shape[1] + 1 - wanted, dim=1, keepdim=True).values
    above = table >= thresholds
    found = above.sum(dim=1)
    missed = ((found < count) | (found > _most(count))).nonzero()[:, 0]
    if len(missed):
        exact = table[missed].topk(count, dim=1, sorted=False).indices
        above[missed] = above.new_zeros(len(missed), size).scatter_(1, exact, True)
        found[missed] = count
    places = _nonzero(above.view(-1))
    return torch.cat([part[run] for part in places.split(found.tolist()) for run in _runs(len(part), count, turn)])


def _nonzero(flags: Tensor) -> Tensor:
    """Return the places of what is true; numpy's is several times as fast on the CPU."""
    return flags.nonzero()[:, 0] if flags.is_cuda else torch.from_numpy(np.flatnonzero(flags.numpy()))


def pack(values: Tensor, places: Places, layout: Layout, out: Tensor) -> Tensor:
    """Write the places and the entries at them as bytes.

    Args:
        values: Vector [size], float32.
        places: Places [count], ascending, int64; what ``select`` returned.
        layout: Sizes.
        out: Where to write, [layout.bytes] uint8.

    Returns:
        The entries as they were sent [count], float32, rounded as the layout says.
    """
    split = layout.place_bytes
    if layout.form == "ids":
        assert isinstance(places, Tensor)
        out[:split] = (places % BLOCK).to(torch.int32).to(torch.uint16).view(torch.uint8)
    elif layout.form == "mask":
        bits = torch.zeros(8 * split, dtype=torch.bool, device=values.device)
        bits[places] = True
        out[:split] = _pack_bits(bits)
    chosen = values[places]
    if layout.value_bits == 4:
        _encode(chosen, out[split:])
        return _decode(out[split:], layout.count)
    sent = chosen.to(torch.bfloat16)
    out[split:] = sent.view(torch.uint8)
    return sent.float()


def unpack(message: Tensor, layout: Layout) -> tuple[Places, Tensor]:
    """Return the places [count], as of ``select``, and the entries [count], float32, of a message [layout.bytes]."""
    split = layout.place_bytes
    places: Places = slice(None)
    if layout.form == "ids":
        # A slice of bytes may start at an odd place; a copy does not.
        ids = message[:split].clone().view(torch.uint16).to(torch.int64)
        starts = torch.repeat_interleave(
            torch.arange(layout.blocks, device=message.device) * BLOCK,
            torch.tensor(layout.counts(), device=message.device),
            output_size=layout.count,
        )
        places = ids + starts
    elif layout.form == "mask":
        places = _nonzero(_unpack_bits(message[:split]))
    if layout.value_bits == 4:
        return places, _decode(message[split:], layout.count)
    return places, message[split:].clone().view(torch.bfloat16).float()


def _pack_bits(bits: Tensor) -> Tensor:
    """Return eight flags a byte, the first in its lowest bit."""
    if not bits.is_cuda:
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    weights = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    if not packed.is_cuda:
        return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little").view(np.bool_))
    weights = (1 << torch.arange(8, device=packed.device)).to(torch.uint8)
    return ((packed[:, None] & weights) != 0).view(-1)


# Values of 4 bits: a sign, and in sevenths the root of the share of the largest in a group. Squares lie close together where most
# values are; what the code takes off stays in the residual.


def _encode(values: Tensor, out: Tensor) -> None:
    """Write codes [count / 2], then scales [count / 256] in bfloat16."""
    half = -(-len(values) // 2)
    for rows, halves, groups in _chunks(values):
        part = functional.pad(values[rows], (0, -len(values[rows]) % GROUP)).view(-1, GROUP)
        magnitudes = part.abs()
        scales = magnitudes.amax(dim=1).to(torch.bfloat16)
        magnitudes.div_(scales.float().clamp_(min=1e-38)[:, None])
        codes = magnitudes.sqrt_().mul_(7).round_().clamp_(max=7).add_(part.signbit(), alpha=8).view(-1, 2).to(torch.uint8)
        out[halves] = (codes[:, 0] + (codes[:, 1] << 4))[: len(out[halves])]
        out[half + 2 * groups.start : half + 2 * groups.stop] = scales.view(torch.uint8)


def _decode(message: Tensor, count: int) -> Tensor:
    half = -(-count // 2)
    levels = (torch.arange(8, device=message.device) / 7) ** 2
    levels = torch.cat([levels, -levels])
    table = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)  # both values of a byte
    values = torch.empty(count, device=message.device)
    for rows, halves, groups in _chunks(values):
        scales = message[half + 2 * groups.start : half + 2 * groups.stop].clone().view(torch.bfloat16).float()
        pairs = table.index_select(0, message[halves].int()).view(-1)
        part = functional.pad(pairs, (0, -len(pairs) % GROUP)).view(-1, GROUP).mul_(scales[:, None])
        values[rows] = part.view(-1)[: len(values[rows])]
    return values


def _chunks(values: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield which values, bytes of codes and scales are worked on together: on a CPU, as many as stay in its cache."""
    count = len(values)
    size = BLOCK if not values.is_cuda else max(GROUP, count + -count % GROUP)
    for start in range(0, count, size):
        end = min(count, start + size)
        yield slice(start, end), slice(start // 2, -(-end // 2)), slice(start // GROUP, -(-end // GROUP))
