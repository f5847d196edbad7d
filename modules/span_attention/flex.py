"""Reading a whole text with FlexAttention: one compiled kernel for all heads, which skips the blocks that a head cannot see."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .rules import SpanRule
from .windows import spans_at

_BLOCK = 128
STEP = 1024  # texts are padded to multiples of it: each length is compiled for, and a few are enough


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, rules: Sequence[SpanRule], sink: int, scaling: float) -> Tensor:
    """Attend as rules say, from the first token on and without padding. On a CPU there is no backward pass.

    Args:
        query: [batch, key/value heads, group, tokens, size].
        key: [batch, key/value heads, tokens, size].
        value: As the keys.
        rules: Of the key/value heads.
        sink: First positions that are always seen.
        scaling: Of the scores.

    Returns:
        The shape of the query.
    """
    count, group = query.shape[3], query.shape[2]
    more = -count % STEP
    # Rows that are too many are dropped, and no other row sees columns behind it.
    query, key, value = (torch.nn.functional.pad(part, (0, 0, 0, more)) for part in (query.flatten(1, 2), key, value))
    mask = _block_mask(tuple(rules), sink, group, count + more, query.device)
    with torch._dynamo.config.patch(recompile_limit=64):  # a shape of text has a kernel of its own
        out = _kernel()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=group > 1)
    return out[:, :, :count].unflatten(1, (len(rules), group))


_masks: dict[tuple, BlockMask] = {}  # of one length: those of a long text are large


def _block_mask(rules: tuple[SpanRule, ...], sink: int, group: int, length: int, device: torch.device) -> BlockMask:
    """Return which blocks of 128 x 128 each query head sees; a text's layers with the same rules share one."""
    key = (length, device, rules, sink, group)
    if _masks and next(iter(_masks))[:2] != key[:2]:
        _masks.clear()
    if key not in _masks:
        _masks[key] = _new_block_mask(rules, sink, group, length, device)
    return _masks[key]


def _new_block_mask(rules: tuple[SpanRule, ...], sink: int, group: int, length: int, device: torch.device) -> BlockMask:
    """Return the mask of ``_block_mask``; its blocks are counted from the rules, without the whole mask."""
    places = torch.arange(length, device=device)
    spans = spans_at(rules, places).T.contiguous()  # [key/value heads, tokens]

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & ((row - column < spans[head // group, row]) | (column < sink))

    blocks = -(-length // _BLOCK)
    first = torch.arange(blocks, device=device) * _BLOCK
    last = (first + _BLOCK - 1).clamp(max=length - 1)
    # What has fallen out of sight of a row is out of sight of the next: of a block, the first row sees back furthest.
    furthest, nearest = first - spans[:, first] + 1, last - spans[:, last] + 1  # [key/value heads, blocks of rows]
    causal = first[None] <= last[:, None]  # [blocks of rows, blocks of columns]
    some = causal & ((last >= furthest[..., None]) | (first < sink))
    below = last[None] <= first[:, None]
    whole = below & ((first >= nearest[..., None]) | (last < sink))
    partial, full = (_listed(part.repeat_interleave(group, 0)) for part in (some & ~whole, whole))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of columns each block of rows has [1, heads, rows], and which [1, heads, rows, columns]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None], order.int()[None]
