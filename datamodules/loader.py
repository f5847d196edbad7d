"""A data loader whose order depends only on (seed, epoch, rank) and which goes on in the middle of an epoch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError

_WINDOW = 32  # batches among which examples of like length are looked for


class EpochSampler(Sampler[int]):
    """Indices of one rank in one epoch.

    Args:
        size: Number of examples of the data set.
        shuffle: Draw a new order from (seed, epoch); else in order.
        even: Give every rank equally many, leaving the last few out, as training under DDP needs it.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
        lengths: Of the examples: those of a batch, on all ranks, are of like length then, and the batches come in a random order.
        batch_size: With ``lengths``: examples a batch on each rank.
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool,
        even: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.block = batch_size * world_size
        self.settings = {} if lengths is None else {"group_by_length": True}
        self.used = size // world_size * world_size if even else size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (self.epoch if self.shuffle else 0))
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        order = order[: self.used]
        if self.lengths is not None:
            order = self._grouped(order, generator)
        skip, self.skip = self.skip, 0  # for one iteration; a DataLoader without workers asks only at its first batch
        return iter(order[self.rank :: self.world_size].tolist()[skip:])

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Sort within windows of many batches, so that what comes together still depends on the order; then mix the batches."""
        assert self.lengths is not None
        whole = len(order) // self.block * self.block
        windows = order[:whole].split(_WINDOW * self.block)
        near = [window[self.lengths[window].argsort(stable=True)] for window in windows]
        blocks = torch.cat([*near, order[:0]]).view(-1, self.block)
        mixed = blocks[torch.randperm(len(blocks), generator=generator)]
        return torch.cat([mixed.flatten(), order[whole:]])  # an unfilled last batch stays one

    def __len__(self) -> int:
        return len(range(self.rank, self.used, self.world_size))


class ResumableLoader:
    """A ``DataLoader`` with the ``state_dict`` that Lightning stores in checkpoints.

    A plain ``DataLoader`` starts a resumed epoch at its first batch again. It is wrapped and not inherited from, so that
    Lightning leaves the sampler as it is.

    Args:
        dataset: Map-style data set.
        sampler: Which examples come, in which order.
        batch_size: Examples a batch on each rank.
        collate: Makes a batch of examples.
        num_workers: Processes that read ahead; 0 reads in this one.
        drop_last: Leave out an unfilled last batch.
        content: Hash of the data, which a resumed run must find unchanged.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sampler: EpochSampler,
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        num_workers: int = 0,
        drop_last: bool = False,
        content: str = "",
    ) -> None:
        self.dataset, self.sampler, self.batch_size, self.content = dataset, sampler, batch_size, content
        self._loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each beginning would draw from the numbers that dropout has next
        )
        self.batch_sampler = None  # Lightning asks every loader that has a sampler for it
        self._delivered = 0
        self._resume_at = (-1, 0)  # epoch, batches of it that were delivered

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: Lightning asks for an iterator before it sets the epoch, and for a second one later.
        epoch, batches = self._resume_at
        self._resume_at = (-1, 0)
        self._delivered = batches if epoch == self.sampler.epoch else 0
        self.sampler.skip = self._delivered * self.batch_size
        for batch in self._loader:
            self._delivered += 1
            yield batch

    def _identity(self) -> dict[str, int | str]:
        sampler = self.sampler
        return {
            "examples": sampler.size,
            "batch_size": self.batch_size,
            "world_size": sampler.world_size,
            "seed": sampler.seed,
            "content": self.content,
            **sampler.settings,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches that were delivered, and what the order depends on."""
        return {"epoch": self.sampler.epoch, "batches": self._delivered, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last delivered batch.

        Raises:
            InputError: If the data, the batch size, the seed or the number of processes has changed since.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise InputError(
                    f"The checkpoint's data order cannot be continued: {name} was {state.get(name)} and is {value} now. Resume "
                    "with the settings of the run that wrote it."
                )
        complete = state["batches"] >= len(self)
        self.sampler.set_epoch(state["epoch"] + complete)
        self._resume_at = (state["epoch"], 0 if complete else state["batches"])
