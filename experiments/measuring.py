"""Times and memory of functions, and what cells share, for benchmarks that measure what no training shows."""

import ctypes
import fcntl
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ..files import atomic_folder


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


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that several cells need; the first that asks makes it, and others wait for that.

    Args:
        folder: Where it is kept.
        make: Writes its files into the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with atomic_folder(folder) as new:
                make(new)
    return folder


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("VmRSS is not reported here")


def extra_memory(function: Callable[[], Any], interval: float = 0.0005) -> int:
    """Return by how many bytes memory grew at most while a function ran.

    That is the accelerator's where one was used before; else the process's, sampled by another thread.

    Args:
        function: What is run.
        interval: Seconds between two samples of the process.
    """
    if torch.cuda.is_initialized():
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    if sys.platform == "linux":  # what is free would be taken first, and not be seen
        ctypes.CDLL(None).malloc_trim(0)
    stop, peak, resident = threading.Event(), [0], _resident()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _resident())
            time.sleep(interval)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        function()
    finally:
        stop.set()
        thread.join()
    return max(peak[0] - resident, 0)
