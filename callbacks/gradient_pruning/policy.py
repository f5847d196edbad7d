"""Who decides how much is pruned: pure functions of numbers that are the same on all ranks.

A *rate* is the share of a gradient's entries that is not sent: 0 sends everything, 0.99 one entry in a hundred.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import InputError
from ..loss_rate import LossWindow, PerformanceForm
from .wire import ValueBits, in_two_phases, link_bytes, sends_all, sparse_pays

LADDER = (0.0, 0.2, 0.5, 0.75, 0.9, 0.96, 0.99, 0.996)


@dataclass(frozen=True)
class Measurement:
    """What all ranks know of the step before; with several ranks, which tell each other a step later, of the one before that.

    Args:
        step: Optimizer steps so far.
        loss: Mean loss over ranks and accumulated batches.
        step_seconds: Time of the step on the slowest rank, the sum over its accumulated batches; without what lies between
            batches: loading of data, validation, writing of checkpoints.
        exposed_seconds: Of it, the time that the slowest rank only waited for the network.
        busy_seconds: Time in which any message was under way, the mean over ranks; it overlaps with the backward pass.
        bytes: Bytes that a rank sent.
        rate: Rate of the step.
        ranks: Number of ranks.
        packing_seconds: Of the step, the time that the slowest rank took to select, pack and sum; 0 where it cannot be told.
        progress: Share of the run that is done; 0 where its end is not known.
    """

    step: int
    loss: float
    step_seconds: float
    exposed_seconds: float
    busy_seconds: float
    bytes: float
    rate: float
    ranks: int
    packing_seconds: float = 0.0
    progress: float = 0.0

    @classmethod
    def of_ranks(cls, parts: list[Tensor], step: int, total_steps: int) -> "Measurement":
        """Return what all ranks agree on: mean loss and traffic, the slowest rank's times.

        Args:
            parts: Of each rank, float64 [7]: loss, step, exposed and busy seconds, bytes, rate, packing seconds.
            step: Optimizer steps so far.
            total_steps: Of the run; 0 where it is not known.
        """
        table = torch.stack(parts).cpu()
        loss, _, _, busy, sent, rate, _ = table.mean(dim=0).tolist()
        slowest = int(table[:, 1].argmax())
        return cls(
            step=step,
            loss=loss,
            step_seconds=float(table[slowest, 1]),
            exposed_seconds=float(table[slowest, 2]),
            busy_seconds=busy,
            bytes=sent,
            rate=rate,
            ranks=len(parts),
            packing_seconds=float(table[slowest, 6]),
            progress=step / total_steps if total_steps else 0.0,
        )

    @property
    def compute_seconds(self) -> float:
        """Time of the step without waiting."""
        return max(self.step_seconds - self.exposed_seconds, 1e-6)

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while messages were under way; None for a step that sent nothing."""
        return self.bytes / self.busy_seconds if self.bytes and self.busy_seconds > 0 else None


class PruningPolicy:
    """Base of all policies: one pure method on reduced numbers.

    A sub-class overrides ``decide``; where it remembers something, such as the rate that it keeps, ``state_dict`` and
    ``load_state_dict`` too.
    """

    def decide(self, measurement: Measurement, bytes_at: "BytesAt") -> float:
        """Return the rate of the next step; here always that of ``start``.

        Args:
            measurement: A step that is over; the same on all ranks. With several, its rate may be older than the last decision.
            bytes_at: Bytes that a rank sends in a step at a given rate.
        """
        return self.start()

    def warm_up(self, measurement: Measurement, bytes_at: "BytesAt") -> float:
        """Return the rate of the next step of the warm-up, at which every entry is sent; arguments as of ``decide``."""
        return 0.0

    def start(self) -> float:
        """Return the rate of the first step behind the warm-up."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class BytesAt:
    """Bytes that a rank sends in a step, as a function of the rate.

    Args:
        dense: Entries that are always sent.
        sparse: Entries that are pruned.
        ranks: Number of ranks.
        dense_bytes: Bytes of an entry when everything is sent.
        value_bits: Bits of a value when some entries are sent.
    """

    def __init__(self, dense: int, sparse: int, ranks: int, dense_bytes: int, value_bits: ValueBits = 16) -> None:
        self.dense, self.sparse, self.ranks, self.dense_bytes, self.value_bits = dense, sparse, ranks, dense_bytes, value_bits

    def __call__(self, rate: float) -> float:
        """Return the bytes of a step at a rate."""
        ring = 2 * (self.ranks - 1) / self.ranks
        if self._everything(rate):
            return ring * (self.dense + self.sparse) * self.dense_bytes
        keep = 1 - rate
        if in_two_phases(keep, self.ranks, self.value_bits):
            return ring * 2 * self.dense + self.sparse * link_bytes(keep, self.ranks, self.value_bits)[1]
        return (self.ranks - 1) * 2 * self.dense + self.sparse * link_bytes(keep, self.ranks, self.value_bits)[0]

    def delay(self, rate: float) -> float:
        """Return the steps that a pruned entry waits until it is sent, on average over entries."""
        if self._everything(rate) or sends_all(1 - rate, self.value_bits):
            return 0.0
        return rate / (1 - rate)

    def _everything(self, rate: float) -> bool:
        return rate <= 0 or not sparse_pays(1 - rate, self.ranks, self.dense_bytes, self.value_bits)


def check_rates(name: str, rates: tuple[float, ...] | list[float]) -> None:
    """Say whether these can be rates.

    Raises:
        InputError: If they cannot.
    """
    if not rates or any(not 0 <= rate < 1 for rate in rates) or list(rates) != sorted(set(rates)):
        raise InputError(f"{name}={list(rates)}: rates are shares that are not sent, 0 to below 1, rising, each once.")


class FixedRate(PruningPolicy):
    """Always the same rate, reached at once or on a ramp (Deep Gradient Compression, arXiv 1712.01887, ramps for some epochs).

    Args:
        rate: Share of the entries that is not sent, 0 to below 1.
        ramp_steps: Steps over which the kept share falls exponentially from 1/4 to its end.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(self, rate: float = 0.99, *, ramp_steps: int = 0) -> None:
        check_rates("rate", [rate])
        if ramp_steps < 0:
            raise InputError(f"ramp_steps={ramp_steps} is below 0. Legal: 0 or more.")
        self.rate, self.ramp_steps = rate, ramp_steps
        self._first: int | None = None

    def start(self) -> float:
        """Return the ramp's first rate, or the rate itself."""
        return min(0.75, self.rate) if self.ramp_steps else self.rate

    def decide(self, measurement: Measurement, bytes_at: BytesAt) -> float:
        """Return the rate, or where the ramp is."""
        if self._first is None:
            self._first = measurement.step
        done = min(1.0, (measurement.step - self._first) / self.ramp_steps) if self.ramp_steps else 1.0
        if done >= 1 or self.rate <= 0.75:
            return self.rate
        return 1 - 0.25 * ((1 - self.rate) / 0.25) ** done

    def state_dict(self) -> dict[str, Any]:
        """Return where the ramp began."""
        return {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the ramp."""
        self._first = state["first"]


@dataclass
class ChangeDetector:
    """Says that the network has changed: a figure stays off its moving average for some steps.

    Args:
        share: Distance from the average that counts, as a share of it.
        hold: Steps in a row that it has to last.
        weight: Of the newest value in the average.
    """

    share: float = 0.3
    hold: int = 3
    weight: float = 0.1
    average: float | None = field(init=False, default=None)
    off: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.share <= 0 or self.hold < 1 or not 0 < self.weight <= 1:
            raise InputError(
                f"share={self.share}, hold={self.hold}, weight={self.weight}: legal are a share above 0, 1 step or more to hold, "
                "and a weight above 0, up to 1."
            )

    def push(self, value: float) -> bool:
        """Add a value; return whether the change is now established, after which the average starts anew."""
        known = self.average
        if known is not None and abs(value - known) > self.share * known:
            self.off += 1
            if self.off >= self.hold:
                self.average, self.off = value, 0
                return True
            return False
        self.off = 0
        self.average = value if known is None else known + self.weight * (value - known)
        return False


class PublishedRule(PruningPolicy):
    """The published rule: performance not good enough, prune less; else step too slow, prune more; else keep.

    Decisions are taken when the network has changed (the step time or the bandwidth stays off its moving average), and then until
    the rule says to keep the rate; or always.

    Args:
        target_seconds: Step time to reach; None takes ``target_factor``.
        target_factor: Step time to reach, as a multiple of the time that the step computes.
        good: Performance p(t) that is good enough, see ``LossRateWindow``; before the window is full, all is good enough.
        window: Steps of the loss window.
        form: Formula of the performance.
        decide_every: Steps between decisions.
        when: Take decisions on ``network_change``, or ``always``.
        ladder: Rates to go up and down on.
        change_share: How far off its average the step time or bandwidth has to be.
        change_hold: For how many steps.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        target_seconds: float | None = None,
        target_factor: float = 1.5,
        good: float = 0.0,
        window: int = 50,
        form: PerformanceForm = "deviation",
        decide_every: int = 5,
        when: Literal["network_change", "always"] = "network_change",
        ladder: list[float] = list(LADDER),  # noqa: B006  (never changed)
        change_share: float = 0.3,
        change_hold: int = 3,
    ) -> None:
        check_rates("ladder", ladder)
        if target_seconds is not None and target_seconds <= 0:
            raise InputError(f"target_seconds={target_seconds} can't be reached. Legal: above 0, or null.")
        if target_factor < 1:
            raise InputError(f"target_factor={target_factor}: no step is faster than its computation. Legal: 1 or more.")
        if decide_every < 1:
            raise InputError(f"decide_every={decide_every}: legal is 1 step or more.")
        if when not in ("network_change", "always"):
            raise InputError(f"when={when!r} is unknown. Legal: network_change, always.")
        self.target_seconds, self.target_factor, self.good = target_seconds, target_factor, good
        self.losses = LossWindow(window, form)
        self.decide_every, self.when, self.ladder = decide_every, when, list(ladder)
        self.detectors = [ChangeDetector(change_share, change_hold) for _ in range(2)]
        self.adjusting, self.waited = True, 0
        self.rate: float | None = None

    def start(self) -> float:
        """Return the rate of the first step behind the warm-up: the ladder's first."""
        self.rate = self.ladder[0]
        return self.rate

    def decide(self, measurement: Measurement, bytes_at: BytesAt) -> float:
        """Return the next rate; see the class."""
        if self.rate is None:  # of a checkpoint that did not have it
            self.rate = measurement.rate
        self.losses.push(measurement.loss)
        self.waited += 1
        if not math.isclose(measurement.rate, self.rate, abs_tol=1e-9):
            return self.rate  # a step of before the last change says nothing of what that brought
        changed = [
            detector.push(value)
            for detector, value in zip(self.detectors, (measurement.step_seconds, measurement.bandwidth))
            if value is not None
        ]
        self.adjusting |= any(changed) or self.when == "always"
        if not self.adjusting or self.waited < self.decide_every:
            return self.rate
        self.waited = 0
        step = self.direction(self.losses.performance(), measurement)
        place = nearest_rung(self.ladder, self.rate) + step
        if step == 0 or not 0 <= place < len(self.ladder):
            self.adjusting = False
            return self.rate
        self.detectors[0].average = None  # another rate has another step time
        self.rate = self.ladder[place]
        return self.rate

    def direction(self, performance: float | None, measurement: Measurement) -> int:
        """Return -1 to prune less, 1 to prune more, 0 to keep."""
        if performance is not None and performance < self.good:
            return -1
        target = self.target_seconds or self.target_factor * measurement.compute_seconds
        return 1 if measurement.step_seconds > target else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the rate, the window of losses, and what tells a change of the network."""
        return {
            "losses": list(self.losses.losses),
            "adjusting": self.adjusting,
            "waited": self.waited,
            "rate": self.rate,
            "detectors": [(detector.average, detector.off) for detector in self.detectors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them; a checkpoint of an earlier version has the losses alone."""
        self.losses.losses.extend(state["losses"])
        self.adjusting = state["adjusting"]
        self.waited, self.rate = state.get("waited", 0), state.get("rate")
        for detector, (average, off) in zip(self.detectors, state.get("detectors", [])):
            detector.average, detector.off = average, off


def nearest_rung(ladder: list[float], rate: float) -> int:
    """Return the place of the rate that is nearest on a ladder."""
    return min(range(len(ladder)), key=lambda place: abs(ladder[place] - rate))
