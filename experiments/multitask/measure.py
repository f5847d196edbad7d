"""Training on several tasks together and on each alone, and what a step of each combination costs."""

import hashlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, Trainer, seed_everything
from torchjd.aggregation import CAGrad, NashMTL, PCGrad, UPGrad
from torchjd.scalarization import DWA, UW, Mean, Sum

from ...callbacks import TaskSchedule, TokenRate
from ...datamodules import ClassificationTask, MultiTaskDataModule, TextTask
from ...datamodules.multitask import TableRows, Task
from ...errors import InputError, nearest
from ...files import cache_folder, digest, write_json
from ...modules import FeatureWeighting, MultiTask, WarmupCosine
from ...modules.multitask import LeastSquaresProjector
from ...modules.precision import compute_device
from ..benchmarks.fingerprints import code_version
from ..measuring import extra_memory, made_once, pairs

COMBINATIONS: dict[str, Callable[[int], Any]] = {
    "sum": lambda tasks: Sum(),
    "mean": lambda tasks: Mean(),
    "uncertainty": lambda tasks: UW(tasks),
    "dwa": lambda tasks: DWA(),
    "pcgrad": lambda tasks: PCGrad(),
    "cagrad": lambda tasks: CAGrad(c=0.4),
    "nash": lambda tasks: NashMTL(n_tasks=tasks, max_norm=1.0, update_weights_every=1, optim_niter=20),
    "upgrad": lambda tasks: UPGrad(projector=LeastSquaresProjector()),
    "features": lambda tasks: FeatureWeighting(),
}
_TABLES: dict[str, tuple[tuple[str, str, list[str] | None], dict[str, Any]]] = {  # files and their columns' names; which is what
    "sst2": (("sst2/train_a.tsv", "sst2/validation.tsv", None), {"text": "sentence"}),
    "rte": (("rte/train.tsv", "rte/validation.tsv", None), {"text": "sentence1", "pair": "sentence2"}),
    "ag_news": (("ag_news/train_10k_desc.tsv", "ag_news/test_desc.tsv", ["text", "label"]), {}),
    "banking77": (("banking77/train.csv", "banking77/test.csv", None), {"label": "category"}),
    "sms_spam": (("sms_spam/train.csv", "sms_spam/test.csv", None), {"text": "v2", "label": "v1"}),
}
_WORDS = ("wikitext2/valid.raw.txt", "wikitext2/test.raw.txt")


class Course:
    """How a model is trained and measured, whatever its tasks.

    Args:
        source: The trunk.
        data: Folder of the data sets.
        tasks: Names of the tasks, with commas; ``words`` is language modelling.
        rows: Examples of each task in a batch.
        steps: Optimizer steps.
        rate: Learning rate.
        length: Tokens of a text.
        layers: Of each branch.
        limit: Rows to validate on, and to test on.
        seed: Of everything.
        precision: Of the Trainer.
        alone_rate: Learning rate of a task by itself, whose batches are smaller; None takes ``rate``.
        branch_rate: Learning rate of the branches; None takes that of the trunk.
        pooling: What of a text its branch reads; see ``TransformerBranch``.
        loss_weights: Factors of the tasks' losses, where they are trained together; see ``MultiTask``.
    """

    def __init__(
        self,
        source: str,
        data: str,
        tasks: str,
        *,
        rows: int,
        steps: int,
        rate: float,
        length: int,
        layers: int,
        limit: int,
        seed: int,
        precision: Literal["32-true", "bf16-mixed"],
        alone_rate: float | None = None,
        branch_rate: float | None = None,
        pooling: Literal["first", "mean"] | None = None,
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        self.names = tasks.split(",")
        for name in self.names:
            if name not in (*_TABLES, "words"):
                raise InputError(f"tasks has {name!r}.{nearest(name, [*_TABLES, 'words'])}")
        self.source, self.data, self.rows, self.steps, self.rate = source, Path(data), rows, steps, rate
        self.length, self.limit, self.seed = length, limit, seed
        self.precision: Literal["32-true", "bf16-mixed"] = precision
        self.alone_rate = rate if alone_rate is None else alone_rate
        self.branches: dict[str, Any] = {"branch_layers": layers, "branch_rate": branch_rate, "branch_pooling": pooling}
        self.loss_weights = loss_weights or {}

    def task(self, name: str) -> Task:
        """Return a task."""
        if name == "words":
            train, val = (str(self.data / place) for place in _WORDS)
            settings: dict[str, Any] = {"length": self.length, "val_rows": self.limit, "train_tokens": None}
            return TextTask(train, val=val, aims=["next_words"], **settings)
        (train, test, names), columns = _TABLES[name]
        rows = TableRows(str(self.data / train), test=str(self.data / test), columns=names, val_rows=self.limit)
        return ClassificationTask(rows, **columns, length=self.length)

    def run(self, names: list[str], combination: str, *, schedule: bool = False, rate: float | None = None) -> dict[str, float]:
        """Train on tasks, and return ``val_<task>`` and ``test_<task>``: accuracies, of words the loss; and ``tokens``."""
        if combination not in COMBINATIONS:
            raise InputError(f"combination={combination!r} is unknown.{nearest(combination, COMBINATIONS)}")
        seed_everything(self.seed, verbose=False)
        # With a schedule in the order given; all are there for the last half.
        starts = {name: place * self.steps // (2 * len(names)) if schedule else 0 for place, name in enumerate(names)}
        data = MultiTaskDataModule(
            {name: self.task(name) for name in names},
            batch_size=self.rows * len(names),
            shares=even_shares(starts, self.steps),
            seed=self.seed,
        )
        module = MultiTask(
            self.source,
            combination=COMBINATIONS[combination](len(names)),
            **self.branches,
            loss_weights=self.loss_weights if len(names) > 1 else None,
            period=max(1, self.steps // 20),
            optimizer=partial(torch.optim.AdamW, lr=self.rate if rate is None else rate, weight_decay=0.01, fused=True),
            lr_scheduler=WarmupCosine,
        )
        pace = TokenRate()
        callbacks: list[Any] = [pace, TaskSchedule(starts)] if schedule else [pace]
        trainer = Trainer(
            max_steps=self.steps,
            max_epochs=-1,
            precision=self.precision,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        found: dict[str, float] = {"tokens": float(pace.tokens)}
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        reader = Trainer(precision=self.precision, **quiet)
        for split, read in (("val", reader.validate), ("test", reader.test)):
            figures = read(module, datamodule=data, verbose=False)[0]
            for name in names:
                key = f"{split}_loss/words/next_words" if name == "words" else f"{split}_accuracy/{name}"
                found[f"{split}_{name}"] = figures[key]
        return found

    def alone(self) -> dict[str, float]:
        """Train a model for each task by itself; what they came to is kept, since every combination is compared with it."""
        key = [self.source, sorted(self.names), self.rows, self.steps, self.alone_rate, self.branches, self.length]
        key += [self.limit, self.precision]
        files = [place for name in self.names for place in (_TABLES[name][0][:2] if name in _TABLES else _WORDS)]
        contents = [hashlib.sha256((self.data / place).read_bytes()).hexdigest() for place in files]

        def make(folder: Path) -> None:
            found: dict[str, float] = {"tokens": 0.0}
            for name in self.names:
                figures = self.run([name], "sum", rate=self.alone_rate)
                found["tokens"] += figures.pop("tokens")
                found |= figures
            write_json(folder / "alone.json", found)

        folder = made_once(cache_folder("multitask", digest([key, self.seed, contents, code_version()])), make)
        return json.loads((folder / "alone.json").read_text("utf-8"))


def even_shares(starts: dict[str, int], steps: int) -> dict[str, float]:
    """Return the shares with which tasks come to equally many examples in a run, whenever each joins.

    Args:
        starts: Optimizer step at which each task joins.
        steps: Of the run.
    """
    shares = dict.fromkeys(starts, 1.0)
    for _ in range(100 if any(starts.values()) else 0):  # by fixed-point iteration
        there = [sum(share for name, share in shares.items() if starts[name] <= step) for step in range(steps)]
        drawn = {name: sum(share / there[step] for step in range(starts[name], steps)) for name, share in shares.items()}
        shares = {name: share / drawn[name] for name, share in shares.items()}
        shares = {name: share / max(shares.values()) for name, share in shares.items()}
    return shares


def training(*, combination: str, schedule: bool = False, **course: Any) -> dict[str, float]:
    """Train on all tasks together, or on each alone, for equally many steps with equally many examples of each.

    Args:
        combination: ``alone``, or how losses are combined: a key of ``COMBINATIONS``.
        schedule: Add the tasks one after another.
        course: See ``Course``.

    Returns:
        ``val_<task>`` and ``test_<task>``: accuracies, of words the loss; ``gain_<task>``: by what share of the accuracy
        of training alone it is higher on the test rows; ``gain`` and ``val_gain``: the means over the tasks; ``tokens``.
    """
    own = Course(**course)
    bases = own.alone()
    found = bases if combination == "alone" else own.run(own.names, combination, schedule=schedule)
    accuracies = [name for name in own.names if name != "words"]
    gains = {
        split: {name: found[f"{split}_{name}"] / max(bases[f"{split}_{name}"], 1e-9) - 1 for name in accuracies}
        for split in ("val", "test")
    }
    means = {split: sum(each.values()) / max(1, len(each)) for split, each in gains.items()}
    each = {f"gain_{name}": value for name, value in gains["test"].items()}
    return {**found, **each, "gain": means["test"], "val_gain": means["val"]}


def _what_is_missing(arguments: dict[str, Any]) -> str | None:
    """Return which extra the combination of ``training`` needs, where it is not installed, or None."""
    combination = arguments["combination"]
    try:
        COMBINATIONS.get(combination, lambda tasks: None)(2)
    except ImportError:
        return f"needs the extra multitask for combination={combination!r}: pip install 'fulgurite[multitask]'"
    return None


training.what_is_missing = _what_is_missing  # type: ignore[attr-defined]


def step(*, combination: str, rounds: int, **course: Any) -> dict[str, float]:
    """Time a training step with a combination, and one with a plain sum, on the same batch.

    Args:
        combination: A key of ``COMBINATIONS``.
        rounds: Turns that are counted.
        course: See ``Course``; its steps are not used.

    Returns:
        ``seconds``, ``sum_seconds``, ``times_as_long``, and ``bytes``, by how much the step makes the process grow.
    """
    own = Course(**course)
    combined, summed = (_stepper(own, name, own.names) for name in (combination, "sum"))
    seconds, base, ratio = pairs(combined, summed, rounds, combination)
    return {"seconds": seconds, "sum_seconds": base, "times_as_long": ratio, "bytes": float(extra_memory(combined))}


def one_task_memory(*, tasks_held: int, **course: Any) -> dict[str, float]:
    """Measure a step on a batch of one task, in a model that has some.

    Args:
        tasks_held: Tasks of the model, of those given.
        course: See ``Course``.

    Returns:
        ``bytes``, by how much the step makes the process grow, gradients in place.
    """
    own = Course(**course)
    stepper = _stepper(own, "sum", own.names[:tasks_held], one_task=True)
    stepper()
    return {"bytes": float(min(extra_memory(stepper) for _ in range(3)))}


def _stepper(course: Course, combination: str, names: list[str], *, one_task: bool = False) -> Callable[[], None]:
    """Return a training step without its optimizer, on one batch."""
    seed_everything(course.seed, verbose=False)
    data = MultiTaskDataModule(
        {name: course.task(name) for name in names},
        batches="task" if one_task else "mixed",
        batch_size=course.rows if one_task else course.rows * len(names),
        shares=dict.fromkeys(names, 1.0),
        tokenizer=course.source,
        seed=course.seed,
    )
    module = MultiTask(course.source, combination=COMBINATIONS[combination](len(names)), **course.branches)
    taken: list[Any] = []

    class Take(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            taken.append(batch)

    trainer = Trainer(
        max_steps=1,
        precision=course.precision,
        callbacks=[Take()],
        limit_val_batches=0,
        log_every_n_steps=1000,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    device = torch.device(compute_device())
    optimizer = torch.optim.SGD(module.to(device).parameters(), lr=0.0)
    module.log = lambda *args, **settings: None  # type: ignore[method-assign]
    # The first name's task in both, so that memory differs by the tasks held alone.
    stream = itertools.chain(taken, data.train_dataloader())
    found = next(one for one in stream if not one_task or names[0] in one["views"][0]["targets"])
    batch = move_data_to_device(found, device)

    def take_step() -> None:
        module.train()
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        module.backward(loss)
        module.on_before_optimizer_step(optimizer)
        optimizer.zero_grad(set_to_none=False)

    return take_step
