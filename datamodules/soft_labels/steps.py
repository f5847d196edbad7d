"""How probabilities are rounded."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import InputError

Values = Literal["sqrt", "log"]


@dataclass(frozen=True)
class ValueSteps:
    """How probabilities are rounded.

    Args:
        values: ``sqrt``: even steps of the square root, which spread the error of a KL divergence evenly; ``log``: even steps of
            the logarithm, for uses that raise small probabilities (temperatures above 1, reverse KL); ``even``: of the
            probability itself, which the counts of ``random`` selection are.
        step: Their size.
        floor: Smallest probability that there is (``sampled`` selection), which stays exact; 0 for none. Goes with ``sqrt``.

    Raises:
        InputError: If they are of an unknown kind or of no use.
    """

    values: Literal["sqrt", "log", "even"] = "sqrt"
    step: float = 0.01
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.values not in ("sqrt", "log", "even"):
            raise InputError(f"values={self.values!r} is unknown. Legal: sqrt, log.")
        if self.floor and self.values != "sqrt":
            raise InputError(f"values={self.values!r} would round what 'sampled' selection drew. Legal with it: sqrt.")
        least = 0.005 if self.values == "log" else 0.001
        if not least <= self.step <= 0.5:
            raise InputError(
                f"value_step={self.step} is too fine or too coarse. Legal: {least} to 0.5; 0.011 suits sqrt, 0.05 suits log."
            )

    @property
    def levels(self) -> int:
        """Number of levels; the first stands for the smallest values."""
        return 2 + int(np.ceil((16.6 if self.values == "log" else 1) / self.step))

    def level(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the level of each probability, int64; it never falls with the probability."""
        p = probabilities.astype(np.float64)
        if self.values == "log":
            found = self.levels - 1 - np.rint(-np.log(p.clip(1e-12)) / self.step)
        elif self.values == "even":
            found = np.rint(p / self.step)
        elif self.floor:
            found = np.rint((np.sqrt(p) - np.sqrt(self.floor)) / self.step)
        else:
            found = np.rint(np.sqrt(p) / self.step)
        return found.clip(0, self.levels - 1).astype(np.int64)

    def table(self) -> np.ndarray:
        """Return the probability of each level, float64 [levels]."""
        level = np.arange(self.levels, dtype=np.float64)
        if self.values == "log":
            return np.exp(-(self.levels - 1 - level) * self.step)
        if self.values == "even":
            return (level * self.step).clip(max=1.0)
        if self.floor:
            return ((np.sqrt(self.floor) + level * self.step) ** 2).clip(max=1.0)
        return ((np.maximum(level, 0.35) * self.step) ** 2).clip(max=1.0)  # a value rounded to 0 is not 0
