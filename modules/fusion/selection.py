"""What is kept of a width, and how what is kept makes up for the rest: where operators start."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..student import decoder_layers
from .layout import DOWN, OUTPUT, linear_of
from .shape import FusionShape, head_dim
from .statistics import Moments, Rows, Statistics, taylor_scores

Score = Literal["energy", "taylor"]
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass
class WidthSelection:
    """What is kept of one layer's widths.

    Args:
        neurons: Indices of MLP neurons [small intermediate size], rising.
        heads: Indices of query heads [small heads]; those of one key/value head stand together.
        groups: Indices of key/value heads [small key/value heads], rising.
    """

    neurons: Tensor
    heads: Tensor
    groups: Tensor


def width_scores(model: PreTrainedModel, statistics: Statistics) -> tuple[list[Tensor], list[Tensor]]:
    """Return how much the inputs of the down and the output projection of each layer write into the residual stream.

    Args:
        model: The large model.
        statistics: Of calibration text.

    Returns:
        For each layer the mean square of each input times that of its column: [intermediate size], [heads * head size].
    """
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    for place, layer in enumerate(decoder_layers(model)):
        for own, name, moments in zip(scores, (DOWN, OUTPUT), (statistics.activations[place], statistics.attended[place])):
            weight = linear_of(layer, name).weight.detach().float()
            own.append(moments.sum.diagonal() / max(moments.tokens, 1) * weight.square().sum(dim=0))
    return scores


def select_widths(
    model: PreTrainedModel, shape: FusionShape, statistics: Statistics, rows: Rows, score: Score = "energy"
) -> list[WidthSelection]:
    """Choose which neurons and heads of each layer are kept: those that score most.

    Args:
        model: The large model.
        shape: Of the small model, all sizes filled in.
        statistics: Of calibration text.
        rows: The text, for ``taylor``.
        score: ``energy``, what they write into the residual stream; ``taylor``, what dropping them costs to first order.
    """
    config = model.config
    neurons, attended = width_scores(model, statistics) if score == "energy" else taylor_scores(model, rows)
    each = config.num_attention_heads // config.num_key_value_heads
    found = []
    for own, dimensions in zip(neurons, attended):
        heads = dimensions.view(config.num_key_value_heads, each, head_dim(config)).sum(dim=-1)
        groups = _most(heads.sum(dim=1), shape.num_key_value_heads)
        per_group = shape.num_attention_heads // shape.num_key_value_heads  # type: ignore[operator]
        kept = torch.cat([int(group) * each + _most(heads[group], per_group) for group in groups])
        found.append(WidthSelection(_most(own, shape.intermediate_size), kept, groups))
    return found


def _most(scores: Tensor, count: int | None) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def fold(kept: Tensor, weight: Tensor, moments: Moments, held_out: Moments | None = None) -> Tensor:
    """Return the operator on what a projection reads with which the kept inputs say best what all of them said.

    Least squares with a ridge: of ``RIDGES``, times the mean square of an input, the one whose error on held-out text is least,
    and the first where there is none.

    Args:
        kept: Indices of the inputs that are kept [small].
        weight: Of the projection [out, large].
        moments: Of the inputs, on calibration text.
        held_out: The same on other text.

    Returns:
        The operator's matrix [small, large]: the small weight is ``weight @ matrix.T``.
    """
    total = moments.sum.double()
    among, across = total[kept][:, kept], total[kept]
    scale = among.diagonal().mean()
    unit = torch.eye(len(kept), dtype=torch.float64, device=total.device)
    best: tuple[float, Tensor] | None = None
    for ridge in RIDGES if held_out is not None else RIDGES[:1]:
        matrix = torch.linalg.solve(among + ridge * scale * unit, across)
        error = 0.0
        if held_out is not None:
            rest = weight.double().clone()
            rest[:, kept] -= weight.double() @ matrix.T
            error = float(((rest @ held_out.sum.double()) * rest).sum())
        if best is None or error < best[0]:
            best = error, matrix
    assert best is not None
    return best[1].float()
