"""The mean of several parties' prefixes, weighted by what each of them trained on (FedAvg, arXiv 1602.05629)."""

from collections.abc import Sequence

import torch

from ...errors import InputError
from .prefix import Prefix


def average_prefixes(prefixes: Sequence[Prefix], examples: Sequence[int]) -> Prefix:
    """Return the mean of prefixes, each weighted by its number of examples; sums are in float64, in the order that is given.

    Args:
        prefixes: Of the parties, alike in kind, length and layers.
        examples: How many each party used in the round.

    Raises:
        InputError: If there is none, numbers are missing or below 0 or all 0, prefixes differ in kind, length or layers, or one
            holds numbers that are not finite.
    """
    if not prefixes or len(prefixes) != len(examples) or min(examples) < 0 or not sum(examples):
        raise InputError(f"examples={list(examples)} for {len(prefixes)} prefixes: each needs its number, 0 or more, not all 0.")
    settings = prefixes[0].settings
    for number, prefix in enumerate(prefixes):
        if prefix.settings != settings or any(one.shape != two.shape for one, two in zip(prefix.rows, prefixes[0].rows)):
            raise InputError(f"Prefix {number} is {prefix.settings}, the first {settings}: they have no mean.")
        if not all(bool(rows.isfinite().all()) for rows in prefix.rows):
            raise InputError(f"Prefix {number} holds numbers that are not finite. Leave this party out of the round.")
    whole = float(sum(examples))
    means = []
    for parts in zip(*(prefix.rows for prefix in prefixes)):
        mean = torch.zeros_like(parts[0], dtype=torch.float64)
        for rows, count in zip(parts, examples):
            mean += rows.detach().double() * (count / whole)
        means.append(mean.float())
    return Prefix(settings, means)
