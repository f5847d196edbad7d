"""Several tasks as one stream of batches."""

import re
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from ...errors import nearest
from ...modules.multitask.objectives import Objective
from ..base import TokenDataModule
from ..documents import DataError
from ..loader import EpochSampler, ResumableLoader
from .sampling import Key, TaskSampler, shares_of
from .self_supervised import TextTask
from .tasks import Part, Task, collate_parts


class MultiTaskDataModule(TokenDataModule):
    """Tasks from files or the hub, and such that plain text sets by itself.

    A batch has ``views``: for each text and mask ``input_ids``, ``position_ids``, ``lengths``, ``token_type_ids``, and
    ``targets`` by branch. Which examples come when depends on the seed and the batch's number alone.

    Args:
        tasks: The tasks by name; None is ``TextTask`` on the embedded text.
        batches: ``mixed``: every batch has examples of all tasks, which is what combinations compare; ``task``: of one task.
        batch_size: Examples a batch on each device, of all tasks together.
        temperature: A task's share of the examples is its size to the power of 1 / temperature: 1 by size, more is more even.
        shares: Share of each task instead, by name, above 0.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of all that is drawn; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If a number is out of range, a share is missing, a name cannot be one, or data of a task is wrong; the message
            names the task.
    """

    def __init__(
        self,
        tasks: dict[str, Task] | None = None,
        *,
        batches: Literal["mixed", "task"] = "mixed",
        batch_size: int = 16,
        temperature: float = 2.0,
        shares: dict[str, float] | None = None,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, num_workers=num_workers, seed=seed)
        if self.seed < 0:
            raise DataError(f"seed={self.seed} is below 0. Legal: 0 or more, or null.")
        self.tasks: dict[str, Task] = tasks if tasks is not None else {"text": TextTask()}
        if not self.tasks:
            raise DataError("tasks is empty: there is nothing to learn. Give one or more.")
        for name in self.tasks:
            if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
                raise DataError(
                    f"tasks: {name!r} cannot be a name. Legal: letters, digits, '-' and '_', and no word of PyTorch's modules."
                )
        if batches not in ("mixed", "task"):
            raise DataError(f"batches={batches!r} is unknown. Legal: mixed, task.")
        if temperature <= 0:
            raise DataError(f"temperature={temperature}. Legal: above 0; 1 is by size.")
        self.mixed = batches == "mixed"
        if self.mixed and batch_size < len(self.tasks):
            raise DataError(
                f"batch_size={batch_size}: a mixed batch needs an example of each of the {len(self.tasks)} tasks. Give as many, "
                "or batches=task."
            )
        for name in [*(shares or {}), *(self.tasks if shares else [])]:
            if name not in self.tasks or name not in (shares or {}):
                raise DataError(f"shares: give one for each task and no other; {name!r} is wrong.{nearest(name, self.tasks)}")
            if (shares or {})[name] <= 0:
                raise DataError(f"shares.{name}={(shares or {})[name]}. Legal: above 0.")
        self.temperature, self.shares = temperature, shares
        self.schedule: dict[str, int] = {}  # optimizer step of tasks that TaskSchedule adds
        self._opened = False

    @property
    def longest_sequence(self) -> int:
        """See ``TokenDataModule``."""
        return max(task.length for task in self.tasks.values())

    def setup(self, stage: str | None = None) -> None:
        """Read all tasks."""
        if self._opened:
            return
        for name, task in self.tasks.items():
            task.open(name, self.tokenizer, self.seed)
        self.train_set, self.val_set = _Examples(self.tasks), _Examples(self.tasks)
        self.predict_set = self.val_set
        self._opened = True

    @property
    def objectives(self) -> dict[str, Objective]:
        """What each branch predicts, after ``setup``."""
        return {name: own for task in self.tasks.values() for name, own in task.objectives.items()}

    def hashes(self) -> dict[str, str]:
        """Return the hashes of all tasks' data and the tokenizer's fingerprint."""
        return {**super().hashes(), **{name: value for task in self.tasks.values() for name, value in task.content.items()}}

    def _collate(self, examples: list[Any]) -> dict[str, Any]:
        by_task: dict[str, list[list[Part]]] = {}
        for name, parts in examples:
            by_task.setdefault(name, []).append(parts)
        pad = self.tokenizer.pad_token_id or 0
        return {"views": [view for own in by_task.values() for view in collate_parts(own, pad)]}

    def train_dataloader(self) -> ResumableLoader:
        """Return the training examples, in an order that goes on where a checkpoint was written."""
        trainer = self.trainer
        sizes = {name: task.size("train") for name, task in self.tasks.items()}
        sampler = TaskSampler(
            sizes,
            shares=self.shares or shares_of(sizes, self.temperature),
            batch_size=self.batch_size,
            mixed=self.mixed,
            starts=self.schedule,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            limit=None if trainer is None else trainer.limit_train_batches,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )
        # A run that goes on may be tested on other rows, and asked for others.
        content = [value for name, value in sorted(self.hashes().items()) if not name.endswith(("/test", "/predict"))]
        return self._stream(sampler, "-".join(content))

    def _stream(self, sampler: Any, content: str = "") -> ResumableLoader:
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set,
            sampler=sampler,
            batch_size=self.batch_size,
            collate=self._collate,
            num_workers=self.num_workers,
            content=content,
        )

    def val_dataloader(self) -> ResumableLoader:
        """Return all tasks' validation examples, mixed so that the first batches hold the same share of each."""
        return self._stream(_InOrder(self, "val"))

    def test_dataloader(self) -> ResumableLoader:
        """Return all tasks' test examples, mixed as those of validation."""
        return self._stream(_InOrder(self, "test"))

    def predict_dataloader(self) -> ResumableLoader:
        """Return the rows that are to be answered, task by task; where none are given, those of ``test``."""
        return self._stream(_InOrder(self, "predict"))


class _Examples(Dataset):
    def __init__(self, tasks: dict[str, Task]) -> None:
        self.tasks = tasks

    def __getitem__(self, key: Key) -> tuple[str, list[Part]]:
        name, split, index, draw = key
        return name, self.tasks[name].example(split, index, draw)


class _InOrder(EpochSampler):
    """All examples of a split, each on one rank: task by task to predict, else mixed by batches of a task."""

    def __init__(self, data: MultiTaskDataModule, split: str) -> None:
        trainer = data.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        sizes = {name: task.size(split) for name, task in data.tasks.items()}
        self.keys = [(name, split, index, index) for name, size in sizes.items() for index in range(size)]
        if split != "predict":
            width = data.batch_size * world
            self.keys.sort(key=lambda key: key[2] // width * width / sizes[key[0]])  # by how far a task is; ties stay as they are
        super().__init__(len(self.keys), shuffle=False, rank=rank, world_size=world)

    def __iter__(self):
        return (self.keys[place] for place in super().__iter__())
