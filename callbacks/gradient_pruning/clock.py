"""What the exchange of a step's gradients takes: messages, bytes, and work of this rank."""

import math
import time

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Messages and bytes of one step on one rank.

    On CUDA a moment is an event on the stream, since the host runs ahead; the figures are then right once the device is through.
    """

    def __init__(self) -> None:
        self.bytes = 0.0  # that this rank sent
        self._work: list[float] = []  # appended to by several threads
        self._messages: list[tuple[Mark, Mark, bool]] = []

    def restart(self) -> None:
        """Forget the step."""
        self.bytes = 0.0
        self._work.clear()
        self._messages.clear()

    def mark(self, device: torch.device) -> Mark:
        """Return this moment."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def worked(self, began: float) -> None:
        """Add work that began then and has just ended."""
        self._work.append(time.perf_counter() - began)

    def arrived(self, posted: Mark, device: torch.device, *, answer: bool = False) -> None:
        """Add a message that was posted then, by the backward pass or as an answer to such ones, and has just arrived."""
        self._messages.append((posted, self.mark(device), answer))

    @property
    def packing(self) -> float:
        """Seconds of selecting, packing, unpacking and summing, on a CPU."""
        return sum(self._work)

    def times(self) -> tuple[float, float]:
        """Return the seconds in which a message was under way, and those of them after the backward pass posted its last one."""
        if not self._messages:
            return 0.0, 0.0
        first = self._messages[0][0]
        spans = sorted((_seconds(first, posted), _seconds(first, arrived)) for posted, arrived, _ in self._messages)
        last = max(_seconds(first, posted) for posted, _, answer in self._messages if not answer)
        busy, exposed, end = 0.0, 0.0, -math.inf
        for posted, arrived in spans:
            begin = max(posted, end)
            busy += max(0.0, arrived - begin)
            exposed += max(0.0, arrived - max(begin, last))
            end = max(end, arrived)
        return busy, exposed


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    return float(begin.elapsed_time(end)) / 1000  # type: ignore[union-attr, arg-type]
