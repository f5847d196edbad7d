"""Published ways to a small model, to compare fusion with: each gives a start, and everything behind it is the same."""

import copy
import logging
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...errors import InputError
from ..student import decoder_layers, keep_layers
from .shape import SIZES, FusionShape
from .starts import Built, FusionStart, important_layers
from .statistics import Rows

log = logging.getLogger(__name__)


class _DepthStart(FusionStart):
    """A start that makes fewer layers and leaves them as wide as they are."""

    def stages(self, config: Any, shape: FusionShape) -> list:
        """See ``FusionStart``."""
        changed = [name for name in SIZES if name != "num_hidden_layers" and getattr(shape, name) != getattr(config, name)]
        if changed:
            raise InputError(
                f"start={type(self).__name__} only drops layers, but shape.{changed[0]}={getattr(shape, changed[0])} is not the "
                f"model's {getattr(config, changed[0])}. Leave it out, or give shape.{changed[0]} beside shape.parameters."
            )
        return super().stages(config, shape)


class KeepLayers(_DepthStart):
    """Some layers are kept as they are.

    Args:
        by: ``block_influence`` keeps those that change the residual stream most (ShortGPT, arXiv 2403.03853);
            ``first_of_pairs`` keeps the first of neighbours, evenly over the depth.
        calibration_tokens: Tokens of the training data that influence is measured on.

    Raises:
        InputError: If a value is unknown or out of range.
    """

    can_keep_layers = True

    def __init__(
        self, *, by: Literal["block_influence", "first_of_pairs"] = "block_influence", calibration_tokens: int = 32768
    ) -> None:
        super().__init__(calibration_tokens)
        if by not in ("block_influence", "first_of_pairs"):
            raise InputError(f"by={by!r} is unknown. Legal: block_influence, first_of_pairs.")
        self.by = by

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        count = shape.num_hidden_layers or 0
        if self.by == "block_influence":
            kept = important_layers(large, count, rows, shape.kept_layers)
        else:
            first = shape.kept_layers
            behind = _groups(len(decoder_layers(large)) - first, count - first) if count > first else []
            kept = [*range(first), *(first + group[0] for group in behind)]
        keep_layers(large, kept)
        return large, kept


def _groups(layers: int, count: int) -> list[list[int]]:
    """Return neighbouring layers in groups, as even as can be."""
    bounds = [round(place * layers / count) for place in range(count + 1)]
    return [list(range(first, last)) for first, last in zip(bounds, bounds[1:])]


class AverageLayers(_DepthStart):
    """Neighbouring layers become their mean, weight by weight."""

    def __init__(self) -> None:
        super().__init__(1)

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        layers = decoder_layers(large)
        groups = _groups(len(layers), shape.num_hidden_layers or 0)
        for first, *rest in groups:
            for name, weight in layers[first].named_parameters():
                others = [layers[other].get_parameter(name) for other in rest]
                weight.data.copy_(torch.stack([weight.data, *(other.data for other in others)]).mean(dim=0))
        keep_layers(large, [first for first, *_ in groups])
        return large, None


class LayerCollapse(_DepthStart):
    """Rear layers are folded into earlier ones by the sum of their differences (LaCo, arXiv 2402.11187, algorithm 1).

    ``W_l + sum over k of (W_(l+k) - W_l)``, wherever the last hidden state stays similar; where no merge is similar enough any
    more while there are too many layers, the threshold is lowered.

    Args:
        merged: Layers that are merged at once (C of the paper).
        interval: Layers between two merges (I).
        threshold: Least cosine between the last hidden states before and behind a merge (T), to start with.
        calibration_tokens: Tokens of the training data that similarity is measured on.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(self, *, merged: int = 2, interval: int = 1, threshold: float = 0.95, calibration_tokens: int = 1024) -> None:
        super().__init__(calibration_tokens)
        if merged < 2:
            raise InputError(f"merged={merged} merges nothing. Legal: 2 or more layers.")
        if interval < 1:
            raise InputError(f"interval={interval} does not move on. Legal: 1 or more layers.")
        if not 0 < threshold <= 1:
            raise InputError(f"threshold={threshold} is no cosine to ask for. Legal: above 0, up to 1.")
        self.merged, self.interval, self.threshold = merged, interval, threshold

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        count, threshold = shape.num_hidden_layers or 0, self.threshold
        goal = _last_states(large, rows)
        model = large
        while (layers := len(decoder_layers(model))) > count:
            place = max(0, layers - self.merged)
            while place >= 0 and layers > count:
                merges = min(self.merged - 1, layers - 1 - place, layers - count)
                tried = _collapsed(model, place, merges)
                similarity = torch.cosine_similarity(_last_states(tried, rows), goal, dim=-1).mean()
                if similarity > threshold:
                    model, layers = tried, layers - merges
                    place = min(place - self.interval, max(0, layers - self.merged))
                else:
                    place -= 1
            threshold -= 0.05
            if threshold < -1.1:
                raise InputError("start=LayerCollapse: hidden states are not finite, so no merge is similar. Check the model.")
            log.info("%d layers; the threshold is now %.2f", layers, threshold)
        return model, None


def _collapsed(model: PreTrainedModel, place: int, merges: int) -> PreTrainedModel:
    """Return a copy in which the layers behind one are folded into it."""
    found = copy.deepcopy(model)
    layers = decoder_layers(found)
    for name, weight in layers[place].named_parameters():
        own = weight.data.clone()
        for behind in range(place + 1, place + merges + 1):
            weight.data += layers[behind].get_parameter(name).data - own
    keep_layers(found, [layer for layer in range(len(layers)) if not place < layer <= place + merges])
    return found


@torch.no_grad()
def _last_states(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Return the last hidden states of a text [tokens, hidden size]."""
    found = [
        model.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).last_hidden_state[0]
        for row in rows
    ]
    return torch.cat(found)


class ReplacementLayer(_DepthStart):
    """The neighbouring layers that change the residual stream least become a single one, trained to say what they said.

    LLM-Streamline, arXiv 2403.19135, with a transformer layer that starts as the first of those that go.

    Args:
        steps: Training steps of the new layer, a row of text each.
        learning_rate: Of AdamW.
        calibration_tokens: Tokens of the training data that it is trained on.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(self, *, steps: int = 100, learning_rate: float = 2e-4, calibration_tokens: int = 32768) -> None:
        super().__init__(calibration_tokens)
        if steps < 0:
            raise InputError(f"steps={steps} is below 0. Legal: 0 or more.")
        if learning_rate <= 0:
            raise InputError(f"learning_rate={learning_rate} moves nothing. Legal: above 0.")
        self.steps, self.learning_rate = steps, learning_rate

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        layers = decoder_layers(large)
        gone = len(layers) - (shape.num_hidden_layers or 0) + 1  # one of them is trained again
        streams = [_streams(large, row) for row in track(rows, description="Hidden states")]
        similar = [
            sum(float(torch.cosine_similarity(one[first], one[first + gone], dim=-1).sum()) for one in streams)
            for first in range(len(layers) - gone + 1)
        ]
        first = max(range(len(similar)), key=similar.__getitem__)
        log.info("The layers %d to %d become one", first, first + gone - 1)
        new = layers[first]
        keep_layers(large, [layer for layer in range(len(layers)) if not first < layer < first + gone])
        large.requires_grad_(False)
        optimizer = torch.optim.AdamW(new.requires_grad_(True).parameters(), lr=self.learning_rate, weight_decay=0.0)
        for step in track(range(self.steps), description="Replacement layer"):
            place = step % len(rows)
            found = _behind(large, new, rows[place])
            loss = torch.nn.functional.mse_loss(found, streams[place][first + gone])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return large.requires_grad_(True), None


def _behind(model: PreTrainedModel, layer: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """Return the residual stream behind a layer [length, hidden size]."""
    found: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        model.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    finally:
        handle.remove()
    return found[0][0][0] if isinstance(found[0], tuple) else found[0][0]


@torch.no_grad()
def _streams(model: PreTrainedModel, row: dict[str, Tensor]) -> list[Tensor]:
    """Return the residual stream before each layer and behind the last one, each [length, hidden size]."""
    found: list[Tensor] = []
    places = [*decoder_layers(model), model.base_model.get_submodule("norm")]
    handles = [module.register_forward_pre_hook(lambda module, args: found.append(args[0][0])) for module in places]
    try:
        model.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


class FreshModel(FusionStart):
    """A random model of the shape."""

    def __init__(self) -> None:
        super().__init__(1)

    def build(self, large: PreTrainedModel, shape: FusionShape, rows: Rows) -> Built:
        """See ``FusionStart``."""
        attention = large.config._attn_implementation
        config = shape.config(large.config)
        return AutoModelForCausalLM.from_config(config, dtype=large.dtype, attn_implementation=attention), None
