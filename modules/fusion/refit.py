"""Least squares, layer by layer, with which a small model's layers say what the large one's said, those left out included.

From the first layer to the last, the down projection is fitted so that the residual stream behind it is nearest to the large
model's at the same place, given what the small model's own earlier layers, already fitted, made of the text. So each layer also
makes up for the errors before it, and one before a gap for the layers that are gone (as ReplaceMe, arXiv 2505.02819, does for a
single gap with the large model's own activations).
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..student import decoder_layers
from .layout import DOWN, linear_of
from .operators import Operator
from .statistics import Rows

HELD_OUT = 0.125  # share of the rows, at least one, on which a ridge is chosen
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean square of an input; they pull towards the weight as it is


@torch.no_grad()
def refit(
    small: PreTrainedModel,
    large: PreTrainedModel,
    centres: list[int],
    rows: Rows,
    *,
    residual: Operator | None = None,
    kept: int = 0,
) -> list[float]:
    """Fit the down projections of a small model, in place.

    Args:
        small: Plain model whose layers come from the large one's.
        large: The model that it stands for.
        centres: For each small layer the large one that it comes from, rising.
        rows: Calibration text, of ``rows_of``.
        residual: How the large residual stream is seen from the small one; None as it is.
        kept: First layers that stay as they are.

    Returns:
        For each small layer that is fitted the share of the target's sum of squares that is still missing on the held-out rows.
        Empty where a norm stands behind the down projection (Gemma), so that least squares does not apply; nothing is changed
        then.
    """
    layers, sources = decoder_layers(small), decoder_layers(large)
    if hasattr(layers[0], "post_feedforward_layernorm"):
        return []
    tested = max(1, round(HELD_OUT * len(rows)))
    embedded, arguments = _begin(large, rows)
    far = embedded
    near = [row if residual is None else residual.reduce(row) for row in embedded]
    missing: list[float] = []
    for place, layer in enumerate(track(list(layers), description="Refit")):
        stop = centres[place + 1] if place + 1 < len(centres) else len(sources)
        start = centres[place] if place else 0
        for source in range(start, stop):
            far = [_through(sources[source], states, own[source]) for states, own in zip(far, arguments)]
        targets = far if residual is None else [residual.reduce(states) for states in far]
        own_arguments = [own[centres[place]] for own in arguments]
        if place < kept:
            near = [_through(layer, states, own) for states, own in zip(near, own_arguments)]
            continue
        near, error = _fit(layer, near, targets, own_arguments, tested)
        missing.append(error)
    return missing


def _begin(model: PreTrainedModel, rows: Rows) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Return what enters the first layer, and with which arguments each layer is called, row by row, without running a layer."""
    layers = decoder_layers(model)
    embedded: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = []

    def stand_in(place: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            if place == 0:
                embedded.append(hidden_states)
                arguments.append([])
            arguments[-1].append(kwargs)
            return hidden_states

        return forward

    for place, layer in enumerate(layers):
        layer.forward = stand_in(place)
    try:
        for row in rows:
            model.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return embedded, arguments


def _through(layer: nn.Module, states: Tensor, arguments: dict[str, Any]) -> Tensor:
    found = layer(states, **arguments)
    return found[0] if isinstance(found, tuple) else found


def _fit(
    layer: nn.Module, near: list[Tensor], targets: list[Tensor], arguments: list[dict[str, Any]], tested: int
) -> tuple[list[Tensor], float]:
    """Fit a layer's down projection; return what the layer then says, and what is missing."""
    down = linear_of(layer, DOWN)
    inputs: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        outputs = [_through(layer, states, own) for states, own in zip(near, arguments)]
    finally:
        handle.remove()
    # What the projection should have said: the rest of the layer stays as it is.
    wanted = [target - output + down(own) for target, output, own in zip(targets, outputs, inputs)]
    if down.bias is not None:
        wanted = [rows - down.bias for rows in wanted]
    now = down.weight.double().T  # [inputs, outputs]
    seen, other = (_products(inputs[rows] or inputs, wanted[rows] or wanted) for rows in (slice(tested, None), slice(tested)))
    scale, unit = seen[0].diagonal().mean(), torch.eye(len(now), dtype=now.dtype, device=now.device)
    candidates = [torch.linalg.solve(seen[0] + ridge * scale * unit, seen[1] + ridge * scale * now) for ridge in _RIDGES]
    errors = [_error(weight, *other) for weight in (now, *candidates)]
    best = min(range(len(errors)), key=errors.__getitem__)
    if best:
        down.weight.copy_(candidates[best - 1].T)
        outputs = [target - rows + own @ down.weight.T for target, rows, own in zip(targets, wanted, inputs)]
    energy = sum(float(rows.double().square().sum()) for rows in targets[:tested])
    return outputs, errors[best] / max(energy, 1e-30)


def _products(inputs: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Return the sums of ``x.T @ x``, of ``x.T @ y`` and of y's squares over rows of text, float64."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": inputs[0].device}
    moments, across = (torch.zeros(inputs[0].shape[-1], some[0].shape[-1], **like) for some in (inputs, wanted))
    squares = 0.0
    for some, target in zip(inputs, wanted):
        flat, goal = some.flatten(0, -2).float(), target.flatten(0, -2).float()
        moments.addmm_(flat.T, flat)
        across.addmm_(flat.T, goal)
        squares += float(goal.double().square().sum())
    return moments.double(), across.double(), squares


def _error(weight: Tensor, moments: Tensor, across: Tensor, squares: float) -> float:
    return squares - 2 * float((weight * across).sum()) + float((weight * (moments @ weight)).sum())
