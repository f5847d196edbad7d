"""Attention in which each key/value head sees what its rule says: the mask, and its computation in blocks of queries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .rules import SpanRule, groups_of

HIDDEN = -(1 << 40)  # position of padding, and of a slot that holds nothing
BLOCK = 256  # queries whose mask exists at the same time


def span_at(rule: SpanRule, positions: Tensor) -> Tensor:
    """Return ``rule.span`` of int64 positions [any]."""
    return (torch.floor(rule.beta * (positions + 1).double()).long() + rule.alpha).clamp(min=rule.least)


def spans_at(rules: Sequence[SpanRule], positions: Tensor) -> Tensor:
    """Return the spans of several rules at int64 positions [queries], as [queries, rules]."""
    return torch.stack([span_at(rule, positions) for rule in rules], dim=1)


def visible(rule: SpanRule, sink: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Return what each query sees.

    Args:
        rule: Of the head.
        sink: First positions that are always seen.
        queries: Positions of the queries, int64 [rows, queries]; below 0 for padding, which sees padding.
        keys: Positions of the keys, int64 [rows, keys]; below 0 where there is none.

    Returns:
        bool [rows, queries, keys].
    """
    distance = queries[:, :, None] - keys[:, None, :]
    near = distance < span_at(rule, queries)[:, :, None]
    return ((distance >= 0) & (keys >= 0)[:, None, :] & (near | (keys < sink)[:, None, :])) | (distance == 0)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float, dropout: float = 0.0) -> Tensor:
    """Attend with the query heads of a key/value head side by side, so that no key is copied for them.

    Args:
        query: [batch, key/value heads, group, queries, size].
        key: [batch, key/value heads, keys, size].
        value: As the keys.
        allowed: bool [rows, queries, keys], rows 1 or the batch; None allows everything.
        scaling: Of the scores.
        dropout: Share of the weights that is dropped.

    Returns:
        The shape of the query.
    """
    batch, heads, group, count, size = query.shape
    mask = None
    if allowed is not None:
        mask = allowed[:, None, None].expand(-1, 1, group, -1, -1).reshape(len(allowed), 1, group * count, -1)
    out = scaled_dot_product_attention(
        query.reshape(batch, heads, group * count, size), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.view(batch, heads, group, count, size)


def attend_with_rules(
    query: Tensor, key: Tensor, value: Tensor, rules: Sequence[SpanRule], sink: int, scaling: float, **settings: Any
) -> Tensor:
    """Attend as the rules of several heads say, those with the same rule together.

    Args:
        query: [batch, key/value heads, group, queries, size].
        key: [batch, key/value heads, keys, size].
        value: As the keys.
        rules: Of the key/value heads.
        sink: First positions that are always seen.
        scaling: Of the scores.
        settings: For ``attend_in_blocks``.

    Returns:
        The shape of the query.
    """
    groups = groups_of(rules)
    parts = [
        attend_in_blocks(query[:, mine], key[:, mine], value[:, mine], rule, sink, scaling, **settings)
        for rule, mine in groups.items()
    ]
    order = torch.tensor([head for mine in groups.values() for head in mine], device=query.device).argsort()
    return torch.cat(parts, dim=1)[:, order]


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: SpanRule,
    sink: int,
    scaling: float,
    *,
    queries: Tensor,
    keys: Tensor,
    ordered: bool,
    dropout: float = 0.0,
    also: Tensor | None = None,
) -> Tensor:
    """Attend as a rule says, some queries at a time, each with the keys that it may see and few more.

    Args:
        query: [batch, key/value heads, group, queries, size].
        key: [batch, key/value heads, keys, size].
        value: As the keys.
        rule: Of these heads.
        sink: First positions that are always seen.
        scaling: Of the scores.
        queries: Positions of the queries, int64 [rows, queries], rows 1 or the batch; below 0 for padding.
        keys: Positions of the keys, int64 [rows, keys].
        ordered: Whether the keys, but for hidden ones, are a whole text in order whose last ones belong to the queries.
        dropout: Share of the weights that is dropped.
        also: Another mask that must allow a key too, bool [batch or 1, queries, keys].

    Returns:
        The shape of the query.
    """
    total, count = keys.shape[1], query.shape[3]
    parts = []
    for start in range(0, count, BLOCK):
        rows = slice(start, min(count, start + BLOCK))
        columns: Tensor | slice = slice(0, total)
        if ordered:
            columns = _columns(rule, sink, queries[:, rows], keys, total - count + rows.stop)
        allowed = visible(rule, sink, queries[:, rows], keys[:, columns])
        if also is not None:
            allowed = allowed & also[:, rows, columns]
        inputs = (query[:, :, :, rows], key[:, :, columns], value[:, :, columns], allowed, scaling, dropout)
        # The masks that a query head would keep for the backward pass are made again there.
        part = checkpoint(attend, *inputs, use_reentrant=False) if query.requires_grad else attend(*inputs)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _columns(rule: SpanRule, sink: int, queries: Tensor, keys: Tensor, end: int) -> Tensor | slice:
    """Return the columns of the sink and of what lies in the span of any of the queries."""
    # What has fallen out of sight of the first query never comes back.
    first = torch.where(queries < 0, torch.iinfo(torch.int64).max // 2, queries).amin(dim=1, keepdim=True)
    lowest = (first - span_at(rule, first) + 1).clamp(min=0)
    places = keys.cummax(dim=1).values
    start = min(int(torch.searchsorted(places, lowest).min()), end - queries.shape[1])
    sinks = int(torch.searchsorted(places, torch.full_like(lowest, sink)).max())
    if start <= sinks:
        return slice(0, end)
    return torch.cat([torch.arange(sinks, device=keys.device), torch.arange(start, end, device=keys.device)])
