"""Watching or changing the attention of a dense model while it reads one text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..span_attention.attention import attentions
from ..span_attention.rules import full_layers

_NAME = "fulgurite_span_probe"

# Takes the layer's number, query [1, heads, tokens, size], key and value [1, key/value heads, tokens, size], the scale of the
# scores, and what computes the dense output [1, tokens, heads, size]; returns the output to go on with.
Probe = Callable[[int, Tensor, Tensor, Tensor, float, Callable[[], Tensor]], Tensor]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    def dense() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]

    probe: Probe | None = module.__dict__.get("span_probe")
    if probe is None:
        return dense(), None
    layer: int = module.layer_idx  # type: ignore[assignment]
    return probe(layer, query, key, value, scaling, dense), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def probed(model: PreTrainedModel, probe: Probe) -> Iterator[None]:
    """Let a function see, and change, what every layer that attends to everything gives.

    Args:
        model: Dense.
        probe: The function.
    """
    layers = [layer for layer, full in zip(attentions(model), full_layers(model.config)) if full]
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    for layer in layers:
        layer.__dict__["span_probe"] = probe  # no part of the model's state
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("span_probe", None)
        model.set_attn_implementation(before)


@contextmanager
def frozen(model: PreTrainedModel, *, checkpointed: bool) -> Iterator[None]:
    """Let gradients reach activations and no weight.

    Args:
        model: In evaluation mode; of training mode nothing but what asks for checkpointing is turned on.
        checkpointed: Compute each layer's activations again in the backward pass.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers: list[nn.Module] = list(model.base_model.layers)  # type: ignore[arg-type]
    training = [layer.training for layer in layers]
    was_on = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    for parameter in trained:
        parameter.requires_grad_(False)
    if checkpointed and not was_on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = checkpointed  # of the layer itself, which asks it before it checkpoints; not of its parts
    try:
        yield
    finally:
        for layer, mode in zip(layers, training):
            layer.training = mode
        if checkpointed and not was_on:
            model.activation_checkpointing_disable()
        for parameter in trained:
            parameter.requires_grad_(True)
