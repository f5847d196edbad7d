"""The spans of a plan as a picture: layers by heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..span_attention.rules import SpanPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_spans(plan: SpanPlan, length: int) -> Figure:
    """Return a heat map of how many tokens each key/value head keeps at a length; layers with their own window are grey.

    Args:
        plan: The plan.
        length: In tokens.
    """
    # Imported here: it comes with an extra, and without pyplot no window system is asked for.
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    heads = max(len(rules) for rules in plan.rules if rules is not None)
    kept = np.full((len(plan.rules), heads), np.nan)
    for layer, rules in enumerate(plan.rules):
        if rules is not None:
            kept[layer] = [rule.kept(length, plan.sink) for rule in rules]
    figure = Figure(figsize=(max(2.6, 0.45 * heads + 1.6), 0.16 * len(plan.rules) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(kept, aspect="auto", cmap="viridis", norm=LogNorm(max(1, np.nanmin(kept)), max(length, 2)))
    axes.set(xlabel="key/value head", ylabel="layer", xticks=range(heads))
    axes.set_title(f"{100 * plan.density(length):.0f} % of the cache", fontsize=9)
    figure.colorbar(image, label=f"tokens kept of {length}")
    return figure
