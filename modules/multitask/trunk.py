"""The shared layers of a multi-task model: any decoder or encoder, with the mask that a branch asks for."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from ...errors import InputError, nearest
from ..precision import Dtype
from ..pretrained import check_sizes, head_weight, load_config, load_encoder, load_model, load_tokenizer
from ..span_attention.rules import refuse_plan
from ..student import fresh_config
from .objectives import Mask

View = dict[str, Any]

_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")


class Trunk(nn.Module):
    """A transformer without its head, whose attention sees one or both directions.

    A decoder's last norm is left to what stands behind it, so that further layers can be put on.

    Args:
        model: Base model, of ``AutoModel``: a decoder as Llama's, or an encoder as BERT's.
        head: Weight that predicts tokens [vocabulary, hidden size], where a decoder has one of its own; None takes the embedding.

    Raises:
        InputError: If it is of an architecture that is not known.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Parameter | None = None) -> None:
        super().__init__()
        check_trunk(model.config)
        self.model, self.head = model, head
        self.is_encoder = model.config.model_type in _ENCODERS
        if not self.is_encoder:
            self.last_norm: list[Any] = [model.norm]  # in a list: branches have copies of it
            model.norm = nn.Identity()

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return int(self.model.config.hidden_size)

    @property
    def table(self) -> nn.Parameter:
        """The embedding of the vocabulary [vocabulary, hidden size]."""
        return self.model.get_input_embeddings().weight  # type: ignore[return-value]

    @property
    def output_table(self) -> nn.Parameter:
        """What tokens are predicted with [vocabulary, hidden size]: the embedding, or a head of its own."""
        return self.table if self.head is None else self.head

    @property
    def most_tokens(self) -> int | None:
        """Length of the longest text that the model has positions for; None where it has no table of them."""
        return most_tokens(self.model.config)

    def forward(self, view: View) -> Tensor:
        """Return the features [rows, length, hidden size] of a view.

        Args:
            view: ``mask``, ``input_ids`` and ``position_ids`` int64 [rows, length], ``lengths`` int64 [rows] where there is
                padding, ``token_type_ids`` int64 [rows, length] where an encoder tells two texts apart.
        """
        arguments: dict[str, Any] = {"input_ids": view["input_ids"], "attention_mask": self.attention(view)}
        if self.is_encoder:
            if self.model.config.type_vocab_size > 1 and "token_type_ids" in view:
                arguments["token_type_ids"] = view["token_type_ids"]
        else:
            arguments |= {"position_ids": view["position_ids"], "use_cache": False}
        return self.model(**arguments).last_hidden_state

    def attention(self, view: View) -> Any:
        """Return which tokens each token sees, as the trunk's and a branch's layers take it [rows, 1, length, length]."""
        seen = visible(view["mask"], view["position_ids"], view.get("lengths"))
        as_taken = self._added if self.model.config._attn_implementation == "eager" else lambda mask: mask
        types = getattr(self.model.config, "layer_types", None)
        if not types or "sliding_attention" not in types:
            return as_taken(seen)
        place = torch.arange(seen.shape[-1], device=seen.device)
        near = (place[:, None] - place).abs() < self.model.config.sliding_window
        return {"full_attention": as_taken(seen), "sliding_attention": as_taken(seen & near)}

    def _added(self, seen: Tensor) -> Tensor:
        """Return a mask that is added to the scores, which eager attention takes."""
        least = torch.finfo(self.table.dtype).min
        return torch.zeros(seen.shape, dtype=self.table.dtype, device=seen.device).masked_fill(~seen, least)

    def new_layers(self, count: int) -> nn.Module:
        """Return fresh layers of the trunk's own kind, to go on from its features; see ``through``.

        The first forward changes nothing where the architecture lets it: what a layer adds starts at zero.

        Args:
            count: How many; 0 leaves a decoder's last norm alone.
        """
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers, config.dtype = count, self.table.dtype
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * count)[-count:] if count else []
        if self.is_encoder:
            layers = AutoModel.from_config(config, add_pooling_layer=False).encoder
        else:
            vocabulary = config.vocab_size
            config.vocab_size, config.pad_token_id = 1, None
            layers = AutoModel.from_config(config)
            config.vocab_size = vocabulary
            del layers.embed_tokens
            layers.norm.load_state_dict(self.last_norm[0].state_dict())
            for layer in layers.layers:
                if hasattr(layer, "post_feedforward_layernorm"):
                    continue  # a norm behind it would make of zero what it likes
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    nn.init.zeros_(layer.get_submodule(name).weight)
        return layers.to(self.table.device)

    def through(self, layers: nn.Module, features: Tensor, view: View) -> Tensor:
        """Return what layers of ``new_layers`` make of features [rows, length, hidden size]."""
        if self.is_encoder:
            return layers(features, attention_mask=self.attention(view)).last_hidden_state
        return layers(
            inputs_embeds=features, attention_mask=self.attention(view), position_ids=view["position_ids"], use_cache=False
        ).last_hidden_state


def load_trunk(source: str, dtype: Dtype, fresh: dict[str, Any] | None = None) -> Trunk:
    """Return the trunk of a source, on the CPU.

    Args:
        source: See ``modules.pretrained``.
        dtype: Type of the weights in memory.
        fresh: Fields of its config to change, for random weights; None takes the model's own.

    Raises:
        InputError: If the source cannot be read or be a trunk, or ``fresh`` names a field that its config has not.
    """
    config = load_config(source)
    check_trunk(config, fresh)
    if fresh is not None:
        trunk = trunk_of_config(fresh_config(config, fresh), dtype)
        check_sizes(source, trunk.model, load_tokenizer(source))
        return trunk
    if config.model_type in _ENCODERS:
        return Trunk(load_encoder(source, dtype))
    return _decoder_trunk(load_model(source, dtype))


def trunk_of_config(config: Any, dtype: Dtype) -> Trunk:
    """Return a trunk of random weights.

    Args:
        config: Of ``transformers``.
        dtype: Type of the weights in memory.
    """
    kind = getattr(torch, dtype)
    if config.model_type in _ENCODERS:
        return Trunk(AutoModel.from_config(config, dtype=kind, add_pooling_layer=False))
    return _decoder_trunk(AutoModelForCausalLM.from_config(config, dtype=kind))


def _decoder_trunk(model: PreTrainedModel) -> Trunk:
    base: Any = model.base_model
    head: Any = head_weight(model)
    return Trunk(base, None if head is model.get_input_embeddings().weight else head)


def check_trunk(config: Any, fresh: dict[str, Any] | None = None) -> None:
    """Raise an InputError for a model that cannot be a trunk.

    Args:
        config: Its ``transformers`` config.
        fresh: Fields of it to change.
    """
    if config.model_type not in (*_DECODERS, *_ENCODERS):
        raise InputError(
            f"source: a {config.model_type} model cannot be the shared trunk. Legal: decoders ({', '.join(_DECODERS)}) and "
            f"encoders ({', '.join(_ENCODERS)})."
        )
    refuse_plan(config)
    for name in fresh or {}:
        if not hasattr(config, name):
            raise InputError(f"fresh has {name!r}, which the model's config has not.{nearest(name, config.to_dict())}")


def most_tokens(config: Any) -> int | None:
    """Return the length of the longest text that a trunk has positions for; None where it has no table of them.

    Args:
        config: Of ``transformers``.
    """
    if config.model_type not in _ENCODERS:
        return None
    first = 0 if config.model_type == "bert" else config.pad_token_id + 1  # RoBERTa's kind counts behind the padding's id
    return int(config.max_position_embeddings) - first


def visible(mask: Mask, position_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return which tokens each token sees, bool [rows, 1, length, length].

    Args:
        mask: ``causal`` hides what comes later.
        position_ids: Positions [rows, length], which restart with each document of a packed row.
        lengths: Tokens of each row without its padding [rows]; None where there is none. Padding sees itself.
    """
    length = position_ids.shape[1]
    place = torch.arange(length, device=position_ids.device)
    document = (position_ids == 0).cumsum(dim=1)
    seen = document[:, :, None] == document[:, None, :]
    if mask == "causal":
        seen &= place[:, None] >= place
    if lengths is not None:
        real = place < lengths[:, None]
        seen &= real[:, None, :]
        seen |= (place[:, None] == place) & ~real[:, :, None]
    return seen[:, None]
