"""Which task, and which of its examples, comes when: a function of the seed and the number of the batch alone."""

import zlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[str, str, int, int]  # task, split, example, number of the draw


class TaskSampler(Sampler[Key]):
    """The training examples of one rank, batch after batch; it stands in for ``EpochSampler`` in a ``ResumableLoader``.

    Every task has its own endless stream: its examples in an order drawn anew each time that all have come.

    Args:
        sizes: Examples of each task.
        shares: Of each task in the batches, above 0; over many batches they hold, as far as each batch has room.
        batch_size: Examples a batch on each rank.
        mixed: Every batch has examples of all active tasks, at least one of each; else of one task.
        starts: Optimizer step of tasks that are added later.
        accumulate: Batches of an optimizer step; the last step of an epoch may have fewer.
        limit: Batches of an epoch at most, or a float, the share of them that the Trainer takes; None takes as many as hold all
            examples.
        seed: Of all that is drawn.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        shares: dict[str, float],
        batch_size: int,
        mixed: bool,
        starts: dict[str, int] | None = None,
        accumulate: int = 1,
        limit: int | float | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sizes, self.shares, self.batch_size, self.mixed = sizes, shares, batch_size, mixed
        self.starts, self.accumulate = starts or {}, accumulate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.size = sum(sizes.values())
        self.batches = max(1, self.size // (batch_size * world_size))  # an epoch
        if isinstance(limit, int):
            self.batches = min(self.batches, limit)
        self.length = self.batches * batch_size
        if isinstance(limit, float):  # of this length the Trainer takes its share itself
            self.batches = max(1, int(self.batches * limit))
        self.epoch = 0
        self.skip = 0
        self._drawn = 0, dict.fromkeys(sizes, 0)  # before an epoch, the examples drawn by all ranks

    @property
    def settings(self) -> dict[str, str]:
        """What the order depends on beside sizes, seed and ranks."""
        shares = ", ".join(f"{task} {share:.6g}" for task, share in self.shares.items())
        found = {"shares": shares, "kind of batches": "mixed" if self.mixed else "task", "batches of an epoch": str(self.batches)}
        return found | ({"schedule": f"{self.starts} by {self.accumulate} batches"} if self.starts else {})

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        orders: dict[str, tuple[int, np.ndarray]] = {}
        first = self.epoch * self.batches
        done, drawn = self._drawn if self._drawn[0] <= first else (0, dict.fromkeys(self.sizes, 0))
        drawn = dict(drawn)
        for batch in range(done, first + self.batches):
            if batch == first:
                self._drawn = batch, dict(drawn)
            rows = self._rows(batch)
            if batch >= first + skip // self.batch_size:
                for task, count in rows.items():
                    for place in range(count):
                        draw = drawn[task] + place * self.world_size + self.rank
                        turn, index = divmod(draw, self.sizes[task])
                        if task not in orders or orders[task][0] != turn:
                            # Turns follow one another, so that one order at a time is kept.
                            orders[task] = turn, self._order(task, turn)
                        yield task, "train", int(orders[task][1][index]), draw
            for task, count in rows.items():
                drawn[task] += count * self.world_size

    def _order(self, task: str, turn: int) -> np.ndarray:
        # By its name, so that a task's examples come in one order, whatever other tasks there are.
        return np.random.default_rng([self.seed, 2, zlib.crc32(task.encode()), turn]).permutation(self.sizes[task])

    def _rows(self, batch: int) -> dict[str, int]:
        """Return how many examples of each task a batch has on each rank."""
        epoch, place = divmod(batch, self.batches)
        step = epoch * -(-self.batches // self.accumulate) + place // self.accumulate
        active = [task for task in self.sizes if step >= self.starts.get(task, 0)]
        shares = np.array([self.shares[task] for task in active])
        shares = shares / shares.sum()
        random = np.random.default_rng([self.seed, 3, batch])
        if not self.mixed:
            return {active[random.choice(len(active), p=shares)]: self.batch_size}
        # Each has one; what their shares say beyond that is rounded by one draw, so that on the average it is exact.
        more = np.maximum(shares * self.batch_size - 1, 0)
        more *= (self.batch_size - len(active)) / max(more.sum(), 1e-12)
        bounds = np.floor(np.round(np.cumsum(more), 9) + random.random()).astype(int)
        return {task: 1 + int(count) for task, count in zip(active, np.diff(bounds, prepend=0))}


def shares_of(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """Return each task's share: its size to the power of 1 / temperature, over the sum (1 is by size, more is more even).

    Args:
        sizes: Examples of each task.
        temperature: Above 0.
    """
    largest = max(sizes.values())
    raw = {task: (size / largest) ** (1 / temperature) for task, size in sizes.items()}
    return {task: value / sum(raw.values()) for task, value in raw.items()}
