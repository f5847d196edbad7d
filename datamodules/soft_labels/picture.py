"""What a soft-label store holds, as a picture."""

from pathlib import Path

import numpy as np

from ...errors import InputError
from ...files import atomic_file
from .store import StoreStats


def draw_label_stats(stats: StoreStats, path: Path) -> None:
    """Draw histograms over tokens, into a PNG file: kept labels, probability of the rest, and what rounding can cost.

    Args:
        stats: Of the store.
        path: File to write.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot no window system is asked for
    except ImportError as error:
        raise InputError("A picture needs the package matplotlib: pip install 'fulgurite[report]'.") from error
    figure = Figure(figsize=(10, 3), layout="constrained")
    kept, tail, bound = figure.subplots(1, 3)
    counts = stats.counts.astype(np.int64)
    kept.bar(*np.unique(counts, return_counts=True), width=1.0)
    kept.set(xlabel="labels kept", ylabel="tokens")
    rest = "sampled" if stats.header.settings.unbiased else "not kept"
    tail.hist(stats.tail, bins=np.linspace(0, 1, 51))
    tail.set(xlabel=f"probability {rest}", yscale="log")
    bound.hist(stats.error_bound, bins=50)
    bound.set(xlabel="error bound of rounding (nats)", yscale="log")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
