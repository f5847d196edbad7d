"""What a multi-task training refuses before any weight is loaded."""

import copy
import logging
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Aggregator
from torchjd.scalarization import FAMO, Mean, Scalarizer, Sum

from ...errors import InputError, nearest
from ..pretrained import load_config
from ..student import fresh_config
from .branches import Branch, TransformerBranch
from .combination import Combination, FeatureWeighting, common_seed
from .objectives import Objective
from .trunk import most_tokens

log = logging.getLogger(__name__)


def check_tasks(
    data: Any,
    source: str,
    fresh: dict[str, Any] | None,
    branches: dict[str, Branch] | None,
    loss_weights: dict[str, float],
) -> None:
    """Raise an InputError for tasks that do not go with what is given by task, or with the trunk's positions.

    Args:
        data: A ``MultiTaskDataModule``, set up.
        source: Where the trunk comes from.
        fresh: Fields of its config to change.
        branches: Branch by task; None leaves them to the model.
        loss_weights: Factor of a task's loss, by task.
    """
    for parameter, named in (("branches", branches or {}), ("loss_weights", loss_weights)):
        for name in named:
            if name in data.tasks and name not in data.objectives:
                aims = ", ".join(one for one in data.objectives if one.startswith(f"{name}/"))
                raise InputError(f"{parameter} has {name!r}, which has a branch for each aim. Give theirs: {aims}.")
            if name not in data.objectives:
                raise InputError(f"{parameter} has {name!r}, which is no task of the data.{nearest(name, data.objectives)}")
    missing = [name for name in data.objectives if branches is not None and name not in branches]
    if missing:
        raise InputError(
            f"branches has none for task {missing[0]!r}. Give one for each task of the data ({', '.join(data.objectives)}), or "
            "leave branches out."
        )
    most = most_tokens(fresh_config(load_config(source), fresh or {}))
    for name, task in data.tasks.items():
        if most is not None and task.length > most:
            raise InputError(
                f"tasks.{name}.length={task.length}: source={source!r} has positions for {most} tokens. Give at most so many."
            )


def check_same_tasks(own: dict[str, Objective], there: dict[str, Objective], whose: str, *, all_of_them: bool) -> None:
    """Raise an InputError if tasks are not those of a model, whose classes are known by their place.

    Args:
        own: Of the model.
        there: The others.
        whose: What has the others.
        all_of_them: Whether each of the model's must be there.
    """
    for name, objective in there.items():
        if name not in own:
            raise InputError(f"{whose} is of task {name!r}, which the model has not: it has {', '.join(own)}.")
        if objective != own[name]:
            raise InputError(
                f"Task {name!r} of {whose} is {objective.kind} {list(objective.classes)}, but the model learns {own[name].kind} "
                f"{list(own[name].classes)}. Give the task's classes in the model's order."
            )
    if all_of_them and len(there) < len(own):
        raise InputError(f"{whose} is of the tasks {', '.join(there)} alone; the model has {', '.join(own)}.")


def check_saved_branches(saved: dict[str, str], given: dict[str, Branch] | None) -> None:
    """Raise an InputError if a checkpoint has branches of other kinds than the model that is to take it.

    Args:
        saved: Class of each task's branch in the checkpoint.
        given: Branch by task, for all of them; None makes ``TransformerBranch`` of each.
    """
    for name, kind in saved.items():
        here = TransformerBranch if given is None else type(given.get(name))
        if here.__name__ != kind:
            raise InputError(f"branches: {name!r} was a {kind}. Give load_from_checkpoint the branches of the run.")


def check_combination(combination: Combination, data: Any, strategy: Strategy, precision: str) -> None:
    """Raise an InputError for a combination that the tasks, the batches, the strategy or the precision cannot serve.

    Args:
        combination: How losses are combined.
        data: A ``MultiTaskDataModule``, set up.
        strategy: Of the Trainer.
        precision: Of the Trainer.
    """
    name, jacobian = type(combination).__name__, isinstance(combination, Aggregator)
    needs_all = not isinstance(combination, Sum | Mean)
    if needs_all and not data.mixed:
        raise InputError(
            f"combination={name} compares tasks, but data.batches='task' brings one at a time. Legal: data.batches=mixed, or "
            "combination Sum or Mean."
        )
    if needs_all and data.schedule and not isinstance(combination, FeatureWeighting | Aggregator):
        raise InputError(f"combination={name} needs all tasks from the start, but TaskSchedule adds some later. Leave one out.")
    waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters", False)
    if (data.schedule or not data.mixed) and waits and not jacobian:
        what = "TaskSchedule" if data.schedule else "data.batches='task'"
        raise InputError(
            f"{what} leaves branches without a gradient, for which DDP would wait. Use trainer.strategy: "
            "ddp_find_unused_parameters_true."
        )
    if (jacobian or isinstance(combination, FAMO)) and not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        needs = "gradients" if jacobian else "weights, to look at a batch again"
        raise InputError(f"combination={name} needs whole {needs}. Legal strategies: one device, ddp.")
    if jacobian and precision not in ("32-true", "bf16-mixed"):
        raise InputError(
            f"precision={precision}: combination={name} needs gradients in float32 that nothing scales. Legal: 32-true, "
            "bf16-mixed."
        )
    _check_number(combination, data)


def _check_number(combination: Combination, data: Any) -> None:
    """Refuse a combination that is for another number of branches, or cannot do with one that has no targets; a trial tells."""
    trial: Any = copy.deepcopy(combination.weighting if isinstance(combination, FeatureWeighting) else combination)
    if isinstance(trial, Stateful):
        trial.reset()
    trial.cpu()
    for step in sorted({0, *data.schedule.values()}):
        there = [task for name, task in data.tasks.items() if data.schedule.get(name, 0) <= step]
        count = sum(len(task.objectives) for task in there)
        if count == 1 and isinstance(combination, FeatureWeighting):
            continue  # which leaves one as it is
        try:
            with torch.no_grad(), common_seed(0, torch.device("cpu")):
                trial(torch.ones(count) if isinstance(combination, Scalarizer) else torch.eye(count))
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"combination={type(combination).__name__} cannot combine {count} branches, which are there at step {step} (one "
                f"for each task, of a text task for each aim): {error} Give it that number, or another combination."
            ) from error
        several = next((name for name, task in data.tasks.items() if task in there and len(task.objectives) > 1), None)
        if several is None:
            continue
        shares = _shares_beside_nothing(trial, count)
        what = (
            f"from a batch in which a branch has no targets, as may be with the aims of task {several!r}, of which each text "
            "draws one. Give that task one aim, or another combination."
        )
        if not shares.isfinite().all():
            raise InputError(f"combination={type(combination).__name__} makes gradients that are no numbers {what}")
        if float(shares[1:].abs().max()) < 1e-3:
            log.warning("combination=%s learns nothing %s", type(combination).__name__, what)


def _shares_beside_nothing(combination: Any, count: int) -> Tensor:
    """Return what weights branches get, of which the first has the loss and gradients 0, the others 1 [count]."""
    with common_seed(0, torch.device("cpu")):
        if isinstance(combination, Scalarizer):
            losses = torch.ones(count).index_fill(0, torch.tensor([0]), 0.0).requires_grad_()
            (share,) = torch.autograd.grad(combination(losses), losses)
        else:
            rows = torch.eye(count)
            rows[0] = 0.0
            share = combination(rows)  # of a Gramian, weights; of a Jacobian, the gradient
    return share.detach()
