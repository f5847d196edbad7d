"""What goes over the network for a vector of gradients: which entries, and in which bytes.

The number of entries depends on sizes and the rate alone, never on values, so that all ranks send messages of the same length.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 1 << 16  # entries whose place fits into 16 bits
_SAMPLE = 16  # of so many entries, one is looked at to find a threshold
_MARGIN = 1.1  # candidates that the threshold lets through, for each that is sent

Form = Literal["ids", "mask"]


@dataclass(frozen=True)
class Layout:
    """Sizes of a message that carries a share of a vector.

    Args:
        size: Entries of the vector.
        keep: Share of them that is sent, above 0, below 1.
    """

    size: int
    keep: float

    @property
    def blocks(self) -> int:
        """Blocks of up to 65536 entries; the last may be shorter."""
        return -(-self.size // BLOCK)

    def counts(self) -> list[int]:
        """Return how many entries of each block are sent; at least one."""
        sizes = [min(BLOCK, self.size - start) for start in range(0, self.size, BLOCK)]
        return [min(size, max(1, math.ceil(self.keep * size))) for size in sizes]

    @property
    def count(self) -> int:
        """Entries that are sent."""
        return sum(self.counts())

    @property
    def form(self) -> Form:
        """The smaller one: 16-bit ids, or a bit for every entry."""
        return "ids" if 2 * self.count <= -(-self.size // 8) else "mask"

    @property
    def place_bytes(self) -> int:
        """Bytes that say which entries are sent."""
        return 2 * self.count if self.form == "ids" else -(-self.size // 8)

    @property
    def bytes(self) -> int:
        """Bytes of the message: places, and bfloat16 values."""
        return self.place_bytes + 2 * self.count


def entry_bytes(keep: float) -> float:
    """Return the bytes of an entry that is sent, its place included, at a kept share."""
    return 4.0 if keep <= 1 / 16 else 2 + 1 / (8 * keep)


def sparse_pays(keep: float, ranks: int, dense_bytes: int = 2) -> bool:
    """Whether an all-gather of a share takes fewer bytes through a rank's link than an all-reduce of everything.

    A ring all-reduce sends ``2 (P - 1) / P`` times the vector, an all-gather ``P - 1`` messages of ``e`` bytes an entry sent: it
    pays below ``keep = 2 b / (P e)``.

    Args:
        keep: Share that is sent.
        ranks: P.
        dense_bytes: b, bytes of an entry in the all-reduce.
    """
    return keep * entry_bytes(keep) * ranks < 2 * dense_bytes


def select(values: Tensor, layout: Layout, turn: int = 0) -> Tensor:
    """Return the places [count] of large entries, ascending, as many in each block as the layout says.

    A threshold is read off a sample of each block, a little low; of the entries above it so many are taken as are to be sent.
    Which of them are left out goes round with ``turn``; with error feedback, what is left out once is sent later.

    Args:
        values: Vector [size], float32.
        layout: How many of each block.
        turn: Changes from call to call.
    """
    magnitudes = values.abs()
    counts = layout.counts()
    whole = layout.size // BLOCK
    parts = []
    if whole:
        table = magnitudes[: whole * BLOCK].view(whole, BLOCK)
        parts.append(_select_blocks(table, counts[0], turn))
    if whole < layout.blocks:
        rest = magnitudes[whole * BLOCK :]
        parts.append(rest.topk(counts[-1], sorted=False).indices.sort().values + whole * BLOCK)
    return torch.cat(parts)


def _select_blocks(table: Tensor, count: int, turn: int) -> Tensor:
    """Return places in a flattened table [blocks, 65536], ``count`` of each row."""
    blocks, size = table.shape
    if count == size:
        return torch.arange(blocks * size, device=table.device)
    sample = table[:, turn % _SAMPLE :: _SAMPLE]
    wanted = min(sample.shape[1], math.ceil(_MARGIN * count / _SAMPLE) + 8)
    thresholds = sample.topk(wanted, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = table >= thresholds
    found = above.sum(dim=1)
    short = (found < count).nonzero()[:, 0]
    if len(short):
        exact = table[short].topk(count, dim=1, sorted=False).indices
        above[short] = above.new_zeros(len(short), size).scatter_(1, exact, True)
        found[short] = count
    places = above.view(-1).nonzero()[:, 0]
    starts = found.cumsum(0) - found
    row = places // size
    rank = torch.arange(len(places), device=places.device) - starts[row]
    kept = (rank + turn * 7919) % found[row] < count
    return places[kept]


def pack(values: Tensor, places: Tensor, layout: Layout, out: Tensor) -> Tensor:
    """Write the places and the entries at them as bytes.

    Args:
        values: Vector [size], float32.
        places: Places [count], ascending, int64.
        layout: Sizes.
        out: Where to write, [layout.bytes] uint8.

    Returns:
        The entries as they were sent [count], float32, rounded to bfloat16.
    """
    split = layout.place_bytes
    if layout.form == "ids":
        out[:split] = (places % BLOCK).to(torch.int32).to(torch.uint16).view(torch.uint8)
    else:
        bits = torch.zeros(8 * split, dtype=torch.uint8, device=values.device)
        bits[places] = 1
        weights = (1 << torch.arange(8, device=values.device)).to(torch.uint8)
        out[:split] = (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)
    sent = values[places].to(torch.bfloat16)
    out[split:] = sent.view(torch.uint8)
    return sent.float()


def unpack(message: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the places [count], int64, and the entries [count], float32, of a message [layout.bytes]."""
    split = layout.place_bytes
    if layout.form == "ids":
        # A slice of bytes may start at an odd place; a copy does not.
        ids = message[:split].clone().view(torch.uint16).to(torch.int64)
        starts = torch.repeat_interleave(
            torch.arange(layout.blocks, device=message.device) * BLOCK,
            torch.tensor(layout.counts(), device=message.device),
            output_size=layout.count,
        )
        places = ids + starts
    else:
        weights = (1 << torch.arange(8, device=message.device)).to(torch.uint8)
        bits = (message[:split, None] & weights) != 0
        places = bits.view(-1).nonzero()[:, 0]
    return places, message[split:].clone().view(torch.bfloat16).float()
