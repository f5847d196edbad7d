"""What operators were learnt, in numbers and as a picture: which layers feed which, and how much of a width is used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..student import decoder_layers
from .operators import HeadRotations, matrix_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def summarise(fused: PreTrainedModel, centres: list[int], layers: int) -> dict[str, Any]:
    """Return what the operators of a stage came to.

    Args:
        fused: As ``fuse`` returns it.
        centres: For each small layer the large one that it started as.
        layers: Of the large model.

    Returns:
        ``depth``, where layers are mixed: for each small layer the coefficients of the large ones. ``singular_values``: by kind
        of operator, falling; of those that each layer has, the mean over the layers.
    """
    found: dict[str, Any] = {}
    mixed = [getattr(layer, "depth_coefficients", None) for layer in decoder_layers(fused)]
    if any(mix is not None for mix in mixed):
        found["depth"] = []
        for mix, centre in zip(mixed, centres):
            row = [0.0] * layers
            for source, share in zip([centre], [1.0]) if mix is None else zip(mix.layers, mix.weight.tolist()):
                row[source] = share
            found["depth"].append(row)
    operators: Any = fused.operators
    by_kind: dict[str, list[Tensor]] = {}
    if operators.residual is not None:
        by_kind["residual"] = [_singular_values(operators.residual)]
    for own in operators.layers:
        for name, operator in own.items():
            by_kind.setdefault(name, []).append(_singular_values(operator))
    if by_kind:
        found["singular_values"] = {name: torch.stack(values).mean(dim=0).tolist() for name, values in by_kind.items()}
    return found


def summary_of_kept(kept: list[int] | None, config: Any) -> dict[str, Any]:
    """Return what ``summarise`` would of a model that has some of a large one's layers.

    Args:
        kept: Their indices; None where its layers are no single ones of those.
        config: Of the large model.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    if kept is None or len(kept) == layers:
        return {}
    return {"depth": [[float(layer == own) for layer in range(layers)] for own in kept]}


def _singular_values(operator: Any) -> Tensor:
    if isinstance(operator, HeadRotations):  # a complex matrix for each pair of dimensions
        return (
            torch.linalg.svdvals(torch.complex(*operator.weight.float().cpu()).movedim(-1, 0)).flatten().sort(descending=True)[0]
        )
    matrix = matrix_of(operator)
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0).sqrt().flip(0).cpu()


def can_draw() -> bool:
    """Return whether what draws pictures is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_operators(summary: dict[str, Any]) -> Figure:
    """Return a picture of what ``summarise`` returned for the stages of a run, one after the other."""
    # Imported here: it comes with an extra, and without pyplot no window system is asked for.
    from matplotlib.figure import Figure

    panels = [name for name in ("depth", "singular_values") if name in summary]
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        if name == "depth":
            limit = max(abs(share) for row in summary["depth"] for share in row)
            image = axes.imshow(summary["depth"], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set(xlabel="layer of the large model", ylabel="layer of the small one", title="share in depth")
            figure.colorbar(image)
        else:
            for kind, values in summary["singular_values"].items():
                axes.plot([place / max(1, len(values) - 1) for place in range(len(values))], values, label=kind)
            axes.set(xlabel="place, of all", ylabel="singular value", title="operators")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
    return figure
