"""A model in parts: its first layers at a party, the others at the owner, and the same numbers as in one piece."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ...errors import InputError
from ..pretrained import CACHE, head_weight
from ..student import decoder_layers


class ModelPart(nn.Module):
    """Some neighbouring layers of a model.

    The first part reads token ids through the embedding, others the states that the part before wrote. Every part computes what
    its layers compute in the whole model, operation by operation.

    Args:
        model: The whole model; it is used up.
        start: Its first layer in this part.
        stop: The layer behind its last.

    Raises:
        InputError: If there are no such layers, or the model is not laid out as Llama is.
    """

    def __init__(self, model: PreTrainedModel, start: int, stop: int) -> None:
        super().__init__()
        layers = decoder_layers(model)
        if not 0 <= start < stop <= len(layers):
            raise InputError(f"Layers {start} to {stop - 1} are no part of a model of {len(layers)} layers.")
        head_weight(model)  # a head that is no plain product cannot stand apart
        self.start, self.stop, self.layers = start, stop, len(layers)
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = stop - start
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[start:stop]
        base: Any = model.base_model
        if not (hasattr(base, "norm") and hasattr(base, "embed_tokens") and hasattr(layers[0], "self_attn")):
            raise InputError(
                f"{type(model).__name__} cannot be split: its parts are not called as Llama's are (embed_tokens, layers with "
                "self_attn, norm). Take a model of the kind of Llama, Mistral, Qwen or Gemma."
            )
        self.norm: nn.Module | None = base.norm if self.is_last else None
        self.head: nn.Module | None = model.get_output_embeddings() if self.is_last else None
        base.norm = nn.Identity()
        if not self.is_first:
            base.embed_tokens = None
        base.layers = layers[start:stop]
        for place, layer in enumerate(base.layers):
            layer.self_attn.layer_idx = place  # of the part's own cache
        for module in base.modules():
            if getattr(module, "config", None) is model.config:
                module.config = config
        self.body: PreTrainedModel = base

    @property
    def is_first(self) -> bool:
        """Whether it reads token ids."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.stop == self.layers

    def new_cache(self) -> Cache:
        """Return an empty cache of keys and values for this part's layers."""
        return DynamicCache(config=self.body.config)

    def forward(
        self, given: Tensor, *, position_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the states behind the part's last layer [batch, tokens, hidden size], before the final norm.

        Args:
            given: Token ids [batch, tokens] for the first part, states [batch, tokens, hidden size] for others.
            position_ids: Positions [batch, tokens].
            attention_mask: 1 for tokens, 0 for padding [batch, tokens in the cache and given].
            cache: Of ``new_cache``; it is added to.
        """
        inputs = {"input_ids": given} if self.is_first else {"inputs_embeds": given}
        return self.body(
            **inputs,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state

    def logits(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the head's logits [..., vocabulary] of states [..., hidden size] behind the last layer.

        Args:
            states: Behind the last layer.
            ids: Tokens whose logits are wanted [n], for [..., n]; None for the whole vocabulary.

        Raises:
            InputError: If this is not the last part.
        """
        if self.norm is None or self.head is None:
            raise InputError(f"Layers {self.start} to {self.stop - 1} of {self.layers} are not the last part: it has no head.")
        states = self.norm(states)
        return self.head(states) if ids is None else states @ self.head.weight[ids].T  # type: ignore[index]


def without_virtual(states: Tensor, length: int) -> Tensor:
    """Return states [batch, tokens, ...] without a prefix's virtual positions."""
    return states[:, length:]


def with_noise(states: Tensor, noise: float) -> Tensor:
    """Return states [batch, tokens, hidden size] with Gaussian noise, its deviation a share of each token's root mean square."""
    if not noise:
        return states
    deviation = states.detach().float().square().mean(-1, keepdim=True).sqrt() * noise
    return states + (torch.randn_like(states, dtype=torch.float32) * deviation).to(states.dtype)


def with_virtual(states: Tensor, length: int) -> Tensor:
    """Return states [batch, tokens, hidden size] with room for a prefix's rows, which replace what stands there."""
    return torch.cat([states.new_zeros(len(states), length, states.shape[-1]), states], dim=1)
