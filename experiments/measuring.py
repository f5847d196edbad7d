"""Times and memory of functions, for benchmarks that measure what no training shows."""

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track


def pairs(first: Callable[[], None], second: Callable[[], None], rounds: int, what: str) -> tuple[float, float, float]:
    """Time two functions in turns, after one call of each that is not counted.

    Returns:
        Median seconds of the first, of the second, and the median of first / second.
    """
    times: list[list[float]] = [[], []]
    for step in track(range(2 * (rounds + 1)), description=what):
        begin = time.perf_counter()
        (first, second)[step % 2]()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times[step % 2].append(time.perf_counter() - begin)
    one, two = (seconds[1:] for seconds in times)
    return statistics.median(one), statistics.median(two), statistics.median(a / b for a, b in zip(one, two))


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("VmRSS is not reported here")


def extra_memory(function: Callable[[], Any]) -> int:
    """Return by how many bytes memory grew at most while a function ran.

    That is the accelerator's where one was used before; else the process's, sampled every half millisecond.
    """
    if torch.cuda.is_initialized():
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    stop, peak, resident = threading.Event(), [0], _resident()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    stop.set()
    thread.join()
    return max(peak[0] - resident, 0)
