"""Where a decoder layer's weights read and write; the same names hold for all supported architectures."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..student import decoder_layers

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
READS_RESIDUAL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
OUTPUT, DOWN = WRITES_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """Return a module's linear layer of a name."""
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def norm_before(layer: nn.Module, projection: str) -> nn.Module:
    """Return the norm whose output a projection reads.

    Args:
        layer: A decoder layer.
        projection: One of ``READS_RESIDUAL``.
    """
    if projection.startswith("self_attn"):
        return layer.get_submodule("input_layernorm")
    own = "pre_feedforward_layernorm" if hasattr(layer, "pre_feedforward_layernorm") else "post_attention_layernorm"
    return layer.get_submodule(own)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a root-mean-square norm with gains."""
    return type(module).__name__.endswith("RMSNorm")


def gain(norm: nn.Module) -> Tensor:
    """Return the factors of a norm [width], float32."""
    return norm.weight.detach().float() + _offset(norm)  # type: ignore[operator]


def set_gain(norm: nn.Module, factors: Tensor) -> None:
    """Set the factors of a norm [width]."""
    with torch.no_grad():
        norm.weight.copy_(factors - _offset(norm))  # type: ignore[operator]


def _offset(norm: nn.Module) -> float:
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma's factor is 1 + weight


def embedding_scale(model: PreTrainedModel) -> float:
    """Return by what a model multiplies its embeddings; Gemma's factor depends on its hidden size."""
    return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))


@torch.no_grad()
def fold_gains(model: PreTrainedModel) -> None:
    """Set the gains of all norms before a projection to 1, and multiply the projection's weight by them.

    Args:
        model: Of a supported architecture; what it computes stays the same.
    """
    for layer in decoder_layers(model):
        for name in READS_RESIDUAL:
            linear_of(layer, name).weight.mul_(gain(norm_before(layer, name)))
        for norm in {norm_before(layer, name) for name in READS_RESIDUAL}:
            _unit(norm)
    if not model.config.tie_word_embeddings:
        norm = model.base_model.get_submodule("norm")
        model.get_output_embeddings().weight.mul_(gain(norm))
        _unit(norm)


def _unit(norm: nn.Module) -> None:
    set_gain(norm, torch.ones_like(gain(norm)))
