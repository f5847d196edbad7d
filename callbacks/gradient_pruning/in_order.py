"""A thread that posts collectives which answer others, and the process group on which it does."""

import atexit
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

# Held here alone, and given up by the main thread at the end: what gives a group up waits for the group's threads. On one of
# these, where callbacks hold what they use until they are done, that would abort the process.
_groups: list[Any] = []
atexit.register(_groups.clear)


class InOrder:
    """Runs jobs in the order in which they were given, on a thread that ends with the process.

    Collectives of one process group have to be posted in the same order on all ranks. Callbacks of gloo's futures run in the
    order in which messages arrive, so what answers a message cannot be posted there.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Future], Future]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], Future]) -> Future[Any]:
        """Return a future of what the future that a job returns will hold; of what it raises, too."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="gradient-exchange")
            self._thread.start()
        result: Future[Any] = Future()
        self._jobs.put((job, result))
        return result


def _work(jobs: "SimpleQueue[tuple[Callable[[], Future], Future]]") -> None:
    while True:
        job, result = jobs.get()
        try:
            job().then(partial(_hand_on, result))
        except Exception as error:
            result.set_exception(error)
        del job, result  # or they would be held until the next ones come


def _hand_on(result: Future, done: Future) -> None:
    try:
        result.set_result(done.value())
    except Exception as error:
        result.set_exception(error)


def group_beside(group: Any) -> Callable[[], Any]:
    """Make a new gloo group of the ranks of another, with its time limit; all of them have to call this.

    Args:
        group: The other; None is the default one.

    Returns:
        A function that returns the new group, and does not hold it.
    """
    whole: Any = group or dist.group.WORLD
    limit: timedelta = whole._get_backend(torch.device("cpu")).options._timeout  # how long a message may take
    _groups.append(dist.new_group(dist.get_process_group_ranks(group), backend="gloo", timeout=limit))
    return partial(_groups.__getitem__, len(_groups) - 1)
