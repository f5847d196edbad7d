"""The shape that a model is fused to."""

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from ...errors import InputError
from ..span_attention.rules import refuse_plan
from .layout import SUPPORTED

_STEP = 64  # of intermediate sizes that a budget picks


@dataclass(frozen=True)
class FusionShape:
    """Sizes of the small model; what is None stays as it is in the large one.

    Args:
        num_hidden_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Neurons of an MLP.
        num_attention_heads: Query heads; each key/value head keeps the same number of them.
        num_key_value_heads: Key/value heads.
        parameters: Instead of the sizes: the most parameters that the small model may have, embeddings included. Layers and
            neurons are then cut by the same share, as far as the sizes that are given leave them free.
        kept_layers: First layers that stay as they are in the large model, and embedding, last norm and head with them: what an
            emulator for offsite tuning needs. Only layers behind them may be left out then.
    """

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    parameters: int | None = None
    kept_layers: int = 0

    def resolve(self, config: Any) -> "FusionShape":
        """Return the shape with every size filled in.

        Args:
            config: The large model's ``transformers`` config.

        Raises:
            InputError: If the model is of an unknown architecture or has attention spans, a size is larger than the model's,
                heads do not divide, or nothing becomes smaller; if layers are to be kept, and there are not so many or a width
                changes.
        """
        if config.model_type not in SUPPORTED:
            raise InputError(
                f"Models of the type {config.model_type!r} cannot be fused: where their weights read and write is not known. "
                f"Legal: {', '.join(SUPPORTED)}."
            )
        refuse_plan(config)
        sizes = {name: getattr(config, name) for name in SIZES}
        for name, size in sizes.items():
            wanted = getattr(self, name)
            if wanted is not None and not 1 <= wanted <= size:
                raise InputError(f"shape.{name}={wanted}: the model has {size}. Legal: 1 to {size}.")
        if self.kept_layers:
            self._check_kept(sizes)
        shape = self if self.parameters is None else self._wanted(config)._within(config)
        shape = replace(shape, **{name: size for name, size in sizes.items() if getattr(shape, name) is None}, parameters=None)
        shape._check_heads(config)
        shape._check_config(config)
        if all(getattr(shape, name) == size for name, size in sizes.items()):
            own = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise InputError(f"shape: every size is the model's own ({own}). Make one smaller, or give shape.parameters.")
        return shape

    def _check_kept(self, sizes: dict[str, int]) -> None:
        """Refuse what would change the layers that stay."""
        layers = self.num_hidden_layers or sizes["num_hidden_layers"]
        if not 0 <= self.kept_layers < layers:
            raise InputError(
                f"shape.kept_layers={self.kept_layers}: the small model has {layers} layers, and one at least is to be fused. "
                f"Legal: 0 to {layers - 1}."
            )
        for name, size in sizes.items():
            if name != "num_hidden_layers" and getattr(self, name) not in (None, size):
                raise InputError(
                    f"shape.kept_layers={self.kept_layers} keeps layers as wide as they are, but shape.{name}="
                    f"{getattr(self, name)} is not the model's {size}. Leave shape.{name} out, or kept_layers."
                )

    def _wanted(self, config: Any) -> "FusionShape":
        """Return the shape whose layers alone a budget may cut where some of them stay."""
        return replace(self, intermediate_size=config.intermediate_size) if self.kept_layers else self

    def _check_heads(self, config: Any) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        assert heads is not None
        assert groups is not None
        most = config.num_attention_heads // config.num_key_value_heads
        if heads % groups:
            raise InputError(
                f"shape.num_attention_heads={heads} cannot be divided among shape.num_key_value_heads={groups}. Make "
                "it a multiple."
            )
        if heads // groups > most:
            raise InputError(
                f"shape.num_attention_heads={heads} with shape.num_key_value_heads={groups} is {heads // groups} query heads for "
                f"each key/value head, but the model has {most}. Legal: up to {most * groups} query heads."
            )

    def _check_config(self, config: Any) -> None:
        """Refuse what ``transformers`` would not save, as a Llama whose width its heads do not divide."""
        try:
            self.config(config).validate()
        except StrictDataclassError as error:
            raise InputError(
                f"shape: transformers saves no {config.model_type} model of these sizes: {error.__cause__ or error} Choose "
                f"another hidden_size (here {self.hidden_size}) or num_attention_heads (here {self.num_attention_heads})."
            ) from None

    def _within(self, config: Any) -> "FusionShape":
        """Return the shape with layers and neurons that the budget allows."""
        assert self.parameters is not None
        budget, layers, neurons = self.parameters, config.num_hidden_layers, config.intermediate_size
        base = replace(self, parameters=None)
        depths = [self.num_hidden_layers] if self.num_hidden_layers else range(layers, self.kept_layers, -1)
        # A model has fixed + depth * (layer + neuron * width) parameters.
        one, two, wide = (
            count_parameters(config, replace(base, num_hidden_layers=depth, intermediate_size=width))
            for depth, width in ((1, _STEP), (2, _STEP), (1, 2 * _STEP))
        )
        neuron = (wide - one) // _STEP
        layer, fixed = two - one - neuron * _STEP, 2 * one - two
        found: tuple[float, FusionShape] | None = None
        for depth in depths:
            room = (budget - fixed - depth * layer) // (depth * neuron)
            width = self.intermediate_size or (neurons if room >= neurons else room - room % _STEP)
            if not 0 < width <= room:
                continue
            # Of those that fit: the one whose two shares are most alike.
            apart = abs(depth / layers - width / neurons)
            if found is None or apart < found[0]:
                found = apart, replace(base, num_hidden_layers=depth, intermediate_size=width)
        if found is None:
            least = fixed + depths[-1] * (layer + neuron * (self.intermediate_size or min(_STEP, neurons)))
            raise InputError(
                f"shape.parameters={budget:,} is too few: with the other sizes of the shape the least is {least:,}. Give more, "
                "or a smaller hidden_size."
            )
        return found[1]

    def config(self, config: Any, centres: list[int] | None = None) -> Any:
        """Return the small model's config.

        Args:
            config: The large model's.
            centres: The large layer whose kind of attention each small layer has; None for the first ones.
        """
        small = copy.deepcopy(config)
        small.head_dim = head_dim(config)  # not hidden_size / heads any more
        for name in SIZES:
            size = getattr(self, name)
            setattr(small, name, getattr(config, name) if size is None else size)
        if getattr(small, "layer_types", None):
            small.layer_types = [config.layer_types[layer] for layer in centres or range(small.num_hidden_layers)]
        return small


SIZES = tuple(field.name for field in fields(FusionShape) if field.name not in ("parameters", "kept_layers"))


def head_dim(config: Any) -> int:
    """Return the dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count_parameters(config: Any, shape: FusionShape) -> int:
    """Return how many parameters a model of a shape has, tied embeddings once.

    Args:
        config: The large model's config.
        shape: Of the small model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(config))
    return sum(parameter.numel() for parameter in model.parameters())
