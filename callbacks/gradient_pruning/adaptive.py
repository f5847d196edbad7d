"""The policy that predicts what a step takes at each rate."""

import math
import statistics
from collections import defaultdict, deque
from typing import Any

from ...errors import InputError
from ..loss_rate import LossWindow, PerformanceForm
from .policy import LADDER, BytesAt, Measurement, PruningPolicy, check_rates, nearest_rung

_PRICE = 0.05  # of a step that an entry waits, as a share of a step, about as measured
_PACKING = 0.15  # of a step's computation that selecting and packing take, before that was measured


class Adaptive(PruningPolicy):
    """Ours: the rate at which a run is through soonest, within a budget for stale gradients, guarded by the loss.

    The time of a step is predicted for each rung of the ladder: what it computes and packs, as measured, and what it waits, from
    the time that a byte takes and the seconds of transfer that the backward pass hides, as medians over the last steps, so that
    an outage of a step or two says nothing. An entry that is sent every n-th time waits n - 1 steps; each step of waiting has a
    price, a share of the step, which rises as the average over entries and steps nears the budget. So a link is used at the least
    pruning that it needs, and of one that changes, the slow minutes are pruned most. At the end of the run, where what is late
    does not come any more, every entry is sent. The guard looks at the loss-rate window: while the loss rises, the rate goes a
    rung down; when it rises fast, to dense, until it falls.

    Args:
        delay_budget: Steps that an entry may wait until it is sent, on average over entries and the last 50 steps.
        cooldown: Share of the run, at its end, in which every entry is sent.
        ladder: Rates to choose from.
        window: Steps of the loss window.
        form: Formula of the performance.
        smoothing: Of the losses in the window; see ``LossRateWindow``.
        wary: Performance below which the rate goes a rung down.
        alarmed: Performance below which everything is sent.
        memory: Steps that the medians are taken over.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        delay_budget: float = 1.0,
        cooldown: float = 0.15,
        ladder: list[float] = list(LADDER),  # noqa: B006  (never changed)
        window: int = 50,
        form: PerformanceForm = "deviation",
        smoothing: float = 0.1,
        wary: float = -1.0,
        alarmed: float = -2.0,
        memory: int = 3,
    ) -> None:
        check_rates("ladder", ladder)
        if delay_budget < 0:
            raise InputError(f"delay_budget={delay_budget}: no entry is sent before it is known. Legal: 0 steps or more.")
        if not 0 <= cooldown <= 1:
            raise InputError(f"cooldown={cooldown} is no share of the run. Legal: 0 to 1.")
        if alarmed > wary:
            raise InputError(f"alarmed={alarmed} is above wary={wary}: a worse performance cannot be the milder one.")
        if memory < 1:
            raise InputError(f"memory={memory} remembers no step. Legal: 1 or more.")
        self.delay_budget, self.cooldown = delay_budget, cooldown
        self.ladder, self.wary, self.alarmed = list(ladder), wary, alarmed
        self.losses = LossWindow(window, form, smoothing)
        self.byte_seconds: deque[float] = deque(maxlen=memory)
        self.hidden_seconds: deque[float] = deque(maxlen=memory)
        self.compute_seconds: deque[float] = deque(maxlen=memory)
        self.packing_seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=memory))  # by rung
        self.delay, self.rung = 0.0, 0

    def decide(self, measurement: Measurement, bytes_at: BytesAt) -> float:
        """Return the next rate; see the class."""
        self.losses.push(measurement.loss)
        if measurement.progress >= 1 - self.cooldown:
            return self.warm_up(measurement, bytes_at)
        self.learn(measurement)
        if not self.byte_seconds:
            return self.ladder[self.rung]
        self.delay += 0.02 * (bytes_at.delay(measurement.rate) - self.delay)
        self.rung = self.guarded(self.choose(bytes_at, list(range(len(self.ladder)))), self.losses.performance())
        return self.ladder[self.rung]

    def warm_up(self, measurement: Measurement, bytes_at: BytesAt) -> float:
        """Return the cheapest of the rates at which every entry is sent."""
        self.learn(measurement)
        whole = [rung for rung, rate in enumerate(self.ladder) if bytes_at.delay(rate) == 0]
        if not whole:
            return 0.0
        if self.byte_seconds:
            self.rung = self.choose(bytes_at, whole)
        return self.ladder[self.rung]

    def start(self) -> float:
        """Return the last rate of the warm-up."""
        return self.ladder[self.rung]

    def learn(self, measurement: Measurement) -> None:
        """Remember what a step took."""
        self.packing_seconds[nearest_rung(self.ladder, measurement.rate)].append(measurement.packing_seconds)
        self.compute_seconds.append(max(0.0, measurement.compute_seconds - measurement.packing_seconds))
        if measurement.bytes:
            self.byte_seconds.append(measurement.busy_seconds / measurement.bytes)
            hidden = measurement.busy_seconds - measurement.exposed_seconds
            if hidden > 0.9 * measurement.busy_seconds:  # more could have been hidden: half of the step is the backward pass
                hidden = max(hidden, measurement.compute_seconds / 2)
            self.hidden_seconds.append(max(0.0, hidden))

    def choose(self, bytes_at: BytesAt, rungs: list[int]) -> int:
        """Return the first of some rungs that costs at most a tenth more than the cheapest: pruning has to pay."""
        near = max(0.0, self.delay / self.delay_budget - 0.5) if self.delay_budget else math.inf
        price = _PRICE * 2 ** min(6 * near, 10.0)
        costs = {
            rung: self.seconds(rung, bytes_at(self.ladder[rung])) * (1 + price * bytes_at.delay(self.ladder[rung]))
            for rung in rungs
        }
        return next(rung for rung, cost in costs.items() if cost <= 1.1 * min(costs.values()))

    def seconds(self, rung: int, size: float) -> float:
        """Return the predicted time of a step on a rung whose messages have so many bytes."""
        compute = statistics.median(self.compute_seconds)
        tried = self.packing_seconds.get(rung)
        packing = statistics.median(tried) if tried else _PACKING * compute * (self.ladder[rung] > 0)
        waiting = size * statistics.median(self.byte_seconds) - statistics.median(self.hidden_seconds)
        return compute + packing + max(0.0, waiting)

    def guarded(self, place: int, performance: float | None) -> int:
        """Return the rung after a look at the loss."""
        if performance is None or performance >= self.wary:
            return place
        return 0 if performance < self.alarmed else max(0, place - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the windows and the average delay."""
        return {
            "losses": list(self.losses.losses),
            "byte_seconds": list(self.byte_seconds),
            "hidden_seconds": list(self.hidden_seconds),
            "compute_seconds": list(self.compute_seconds),
            "packing_seconds": {rung: list(seconds) for rung, seconds in self.packing_seconds.items()},
            "delay": self.delay,
            "rung": self.rung,
            "ladder": self.ladder,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the windows and the average delay."""
        self.losses.losses.extend(state["losses"])
        self.byte_seconds.extend(state["byte_seconds"])
        self.hidden_seconds.extend(state["hidden_seconds"])
        self.compute_seconds.extend(state["compute_seconds"])
        ladder = state.get("ladder", self.ladder)
        for rung, seconds in state["packing_seconds"].items():
            if ladder[rung] in self.ladder:
                self.packing_seconds[self.ladder.index(ladder[rung])].extend(seconds)
        self.delay, self.rung = state["delay"], nearest_rung(self.ladder, ladder[state["rung"]])
