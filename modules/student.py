"""Small models made from large ones: some layers kept, or a fresh model of a smaller config."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import InputError, nearest

log = logging.getLogger(__name__)


@dataclass
class LayerChoice:
    """How many layers to keep, and which.

    Args:
        count: Number of layers that the student keeps.
        by: ``even`` spreads them over the depth, first and last included; ``block_influence`` drops the layers that
            change their input least (ShortGPT, arXiv 2403.03853), measured on the first tokens of the training data.
    """

    count: int
    by: Literal["even", "block_influence"] = "block_influence"


@dataclass
class StudentSpec:
    """The student of a model: exactly one of the two fields is given, or neither to train the model itself.

    Args:
        keep_layers: Indices of the layers to keep, in order, or a rule that finds them.
        fresh: Fields of the model's config to change; the student starts from random weights
            (``{num_hidden_layers: 4, hidden_size: 256}``).
        calibration_tokens: Tokens of the training data on which block influence is measured.
    """

    keep_layers: list[int] | LayerChoice | None = None
    fresh: dict[str, Any] | None = field(default=None)
    calibration_tokens: int = 4096

    def check(self, config: Any) -> None:
        """Raise an InputError for a student that cannot be made of a model.

        Args:
            config: The large model's ``transformers`` config.
        """
        if self.keep_layers is not None and self.fresh is not None:
            raise InputError("student: give keep_layers (a part of the model) or fresh (random weights), not both.")
        layers = config.get_text_config().num_hidden_layers
        if isinstance(self.keep_layers, LayerChoice) and not 1 <= self.keep_layers.count <= layers:
            raise InputError(f"student.keep_layers.count={self.keep_layers.count}: legal are 1 to {layers}, the model's layers.")
        if isinstance(self.keep_layers, list):
            wrong = [index for index in self.keep_layers if not 0 <= index < layers]
            if wrong or not self.keep_layers or sorted(set(self.keep_layers)) != self.keep_layers:
                raise InputError(
                    f"student.keep_layers={self.keep_layers}: legal are rising indices from 0 to {layers - 1}, each once."
                )
        for name in self.fresh or {}:
            if not hasattr(config, name):
                fields = [key for key in config.to_dict() if not key.startswith("_")]
                raise InputError(f"student.fresh has {name!r}, which the model's config has not.{nearest(name, fields)}")

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`build_student` needs tokens to choose layers by."""
        return isinstance(self.keep_layers, LayerChoice) and self.keep_layers.by == "block_influence"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of a causal model's transformer layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} keeps its {count} layers in no ModuleList: keep_layers cannot be used on it.")


def shared_parts(model: PreTrainedModel, layers: int) -> list[nn.Module]:
    """Return what an emulator has in common with its model: embedding, last norm, head and the first layers."""
    base: Any = model.base_model
    return [model.get_input_embeddings(), base.norm, model.get_output_embeddings(), *decoder_layers(model)[:layers]]


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what stands behind each layer, [batch, length, hidden size], while a model reads."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_influence(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Measure how much each layer changes the residual stream (ShortGPT, arXiv 2403.03853, equation 1).

    Args:
        model: Causal language model.
        batch: Token ids ``input_ids`` [batch, length], and where they are known ``position_ids`` [batch, length], which restart
            with each packed document, and ``lengths`` [batch], behind which there is padding.

    Returns:
        1 - mean cosine similarity of each layer's input and output [layers], float32.
    """
    layers = decoder_layers(model)
    influence, weights = torch.zeros(2, len(layers), device="cpu")

    def record(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similarity = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            influence[index] += (1 - similarity).sum().cpu()
            weights[index] += similarity.numel()

        return hook

    handles = [layer.register_forward_hook(record(index), with_kwargs=True) for index, layer in enumerate(layers)]
    training = model.training
    try:
        model.eval()
        for row in range(len(batch["input_ids"])):
            tokens = int(batch["lengths"][row]) if "lengths" in batch else None
            ids, positions = (
                batch[name][row : row + 1, :tokens].to(model.device) if name in batch else None
                for name in ("input_ids", "position_ids")
            )
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return influence / weights


def choose_layers(model: PreTrainedModel, choice: LayerChoice, influence: Tensor | None = None) -> list[int]:
    """Return the indices of the layers that a rule keeps, in order.

    Args:
        model: The large model.
        choice: The rule.
        influence: Block influence of each layer [layers], for ``by: block_influence``.
    """
    layers = len(decoder_layers(model))
    if choice.by == "even":
        last = layers - 1
        return [int(step * last / max(choice.count - 1, 1) + 0.5) for step in range(choice.count)]
    assert influence is not None
    return sorted(influence.argsort(descending=True, stable=True)[: choice.count].tolist())


def fresh_config(config: Any, fresh: dict[str, Any]) -> Any:
    """Return a config with some fields changed, for a model of random weights.

    Args:
        config: Of ``transformers``.
        fresh: The fields.
    """
    fields = {**config.to_dict(), **fresh}
    fields.pop("span_plan", None)  # of other heads
    if "layer_types" not in fresh:
        fields.pop("layer_types", None)  # the config class makes it anew for the changed depth
    return type(config).from_dict(fields)


def build_student(model: PreTrainedModel, spec: StudentSpec, calibration: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """Make the student of a model; the model itself is used up where layers are kept.

    Args:
        model: The large model.
        spec: The student.
        calibration: Batch for ``block_influence``, of ``input_ids`` [batch, length].

    Returns:
        A model of the same class with fewer layers, or a random one of the changed config.

    Raises:
        InputError: If the spec does not fit the model, or calibration tokens are missing.
    """
    spec.check(model.config)
    if spec.fresh is not None:
        return AutoModelForCausalLM.from_config(
            fresh_config(model.config, spec.fresh), dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    keep = spec.keep_layers
    if isinstance(keep, LayerChoice):
        influence = None
        if spec.needs_calibration:
            if calibration is None:
                raise InputError(
                    "student.keep_layers.by='block_influence' needs tokens of the training data: fit with a datamodule of "
                    "this suite, or pass calibration={'input_ids': ...}, or give by='even' or a list."
                )
            influence = block_influence(model, calibration)
        keep = choose_layers(model, keep, influence)
        log.info("The student keeps the layers %s", keep)
    if keep is not None:
        keep_layers(model, keep)
    return model


def keep_layers(model: PreTrainedModel, keep: list[int]) -> None:
    """Drop all layers of a model but those with the given indices, in place, its config included."""
    layers = decoder_layers(model)
    kept = [layers[index] for index in keep]
    del layers[:]
    layers.extend(kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]  # caches are addressed by it
    config = model.config.get_text_config()
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in keep]
    if getattr(model.config, "span_plan", None):  # attention spans, a list of rules for each layer
        model.config.span_plan["rules"] = [model.config.span_plan["rules"][index] for index in keep]
    config.num_hidden_layers = len(keep)
