"""The attention function of a model with spans, for ``transformers``: with a cache, without one, and for training."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...errors import InputError
from ..pretrained import CACHE
from .cache import SpanLayer
from .flex import attend_flex
from .rules import SpanRule, full_layers
from .windows import HIDDEN, attend_with_rules

NAME = "fulgurite_spans"
_SUPPORTED = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Gemma3Attention", "MistralAttention")


@dataclass
class SpanMask:
    """What a layer needs to know of the batch, in place of a mask: spans are another matter for each head.

    Args:
        padding: False for padding, bool [batch, tokens]; None where there is none.
        make: Makes the usual mask.
        causal: Whether causality and padding are all that the usual mask says.
    """

    padding: Tensor | None
    make: Callable[[], Tensor | None]
    causal: bool

    @functools.cached_property
    def full(self) -> Tensor | None:
        """The usual mask, bool [batch, 1, queries, keys], made for the first layer that wants it; None where causality is all."""
        return self.make()


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> SpanMask:
    """Return what ``span_attention`` takes for a mask.

    The arguments are those of ``transformers``' mask functions, ``attention_mask`` [batch, keys] among them.
    """
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise InputError(
            f"{CACHE}: a cache of {kv_length} places for {int(q_offset) + q_length} tokens is a static one, which heads "
            f"with spans cannot use. Leave {CACHE} out, or give a SpanCache."
        )
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()

    def make() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)

    return SpanMask(padding, make, mask_function is causal_mask_function)


def span_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | SpanLayer,
    value: Tensor | SpanLayer,
    attention_mask: SpanMask | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the layer's rules say; a layer without any attends as it always did.

    Args:
        module: The layer's attention, with ``span_rules``, ``span_sink`` and ``span_prefill``.
        query: [batch, heads, queries, size].
        key: [batch, key/value heads, keys, size], or the layer's cache.
        value: As the keys.
        attention_mask: What ``span_mask`` returned.
        scaling: Of the scores.
        dropout: Share of the weights that is dropped.
        position_ids: Position of each query in its text [batch or 1, queries].
        kwargs: For layers without rules.

    Returns:
        [batch, queries, heads, size], and no weights.
    """
    if not isinstance(attention_mask, SpanMask | None):
        raise InputError(
            f"attention_mask: a mask of {attention_mask.ndim} dimensions says for all heads alike what they see, and spans do "
            "not. Give a mask [batch, tokens], or none."
        )
    rules: tuple[SpanRule, ...] | None = getattr(module, "span_rules", None)
    if rules is None:
        mask = None if attention_mask is None else attention_mask.full
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[arg-type]
    batch, heads, count, size = query.shape
    grouped = query.view(batch, len(rules), heads // len(rules), count, size)
    padding = None if attention_mask is None else attention_mask.padding
    flex = _is_flex(module, query) and not dropout
    if isinstance(key, SpanLayer):
        out = key.attend(grouped, padding, scaling, flex=flex)
        return out.reshape(batch, heads, count, size).transpose(1, 2).contiguous(), None
    assert isinstance(value, Tensor)
    plain = attention_mask is None or (attention_mask.causal and padding is None)
    if flex and plain and count == key.shape[2] > 1:
        out = attend_flex(grouped, key, value, rules, module.span_sink, scaling)  # type: ignore[arg-type]
    else:
        queries, keys, also = _positions(key.shape[2], count, attention_mask, position_ids, query.device)
        out = attend_with_rules(
            grouped,
            key,
            value,
            rules,
            module.span_sink,  # type: ignore[arg-type]
            scaling,
            queries=queries,
            keys=keys,
            ordered=also is None,
            dropout=dropout,
            also=also,
        )
    return out.reshape(batch, heads, count, size).transpose(1, 2).contiguous(), None


def _is_flex(module: nn.Module, query: Tensor) -> bool:
    wanted = getattr(module, "span_prefill", "auto")
    automatic = wanted == "auto" and query.is_cuda and query.shape[2] >= 2048
    return (wanted == "flex" or automatic) and not query.requires_grad


def _positions(
    total: int, count: int, mask: SpanMask | None, position_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the positions of queries and keys [rows, tokens], and a mask that must allow a key too, for packed texts."""
    places = torch.arange(total, device=device)[None]
    if mask is not None and not mask.causal and position_ids is not None and count == total:
        full = mask.full
        return position_ids, position_ids, None if full is None else full[:, 0]
    if mask is not None and mask.padding is not None:
        places = (mask.padding.long().cumsum(dim=1) - 1).masked_fill(~mask.padding, HIDDEN)
    return places[:, total - count :], places, None


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention modules of a model in the order of its layers.

    Raises:
        InputError: If they are of a kind that spans do not work with.
    """
    if not any(full_layers(model.config)):
        raise InputError(
            f"{type(model).__name__}: every layer has a sliding window of its own, so there is nothing to prune. Use a model "
            "with layers that attend to the whole text."
        )
    found = {module.layer_idx: module for module in model.modules() if type(module).__name__ in _SUPPORTED}
    if sorted(found) != list(range(model.config.num_hidden_layers)):  # type: ignore[type-var]
        raise InputError(
            f"{type(model).__name__} has an attention that cannot be given spans. Legal: models of the kinds "
            f"{', '.join(name.removesuffix('Attention') for name in _SUPPORTED)}."
        )
    return [found[number] for number in range(len(found))]  # type: ignore[index]


AttentionInterface.register(NAME, span_attention)
# Without a mask function of the same name no mask would arrive, and padding would be lost without a word.
AttentionMaskInterface.register(NAME, span_mask)
