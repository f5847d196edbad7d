"""What a training on several tasks holds in memory, before any task is read."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from ..base import Rehearsal
from .branches import Branch, build_branches
from .objectives import Kind, Objective
from .trunk import Trunk, View


def rehearsal(
    trunk: Trunk, kinds: dict[str, list[Kind]], branch: Callable[[], Branch], optimizer: OptimizerCallable
) -> Rehearsal:
    """Return the stage in which a trunk is trained with branches for some tasks.

    Args:
        trunk: The shared layers.
        kinds: What each branch of a task predicts, by task; branches of one mask read the same features.
        branch: Makes a branch.
        optimizer: Of the training.
    """
    objectives = {
        f"{name}/{place}": Objective(kind, ("a", "b") if kind in ("sequence", "token") else ())
        for name, own in kinds.items()
        for place, kind in enumerate(own)
    }
    branches: Any = build_branches(trunk, objectives, None, branch)

    def read(ids: Tensor) -> Tensor:
        found = []
        for name, rows in zip(kinds, ids.tensor_split(len(kinds))):
            own = {branch: objective for branch, objective in objectives.items() if branch.rpartition("/")[0] == name}
            for mask in sorted({objective.mask for objective in own.values()}):
                positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
                view: View = {"mask": mask, "input_ids": rows, "position_ids": positions}
                features = trunk(view)
                readers = [branch for branch, objective in own.items() if objective.mask == mask]
                found += [branches[branch].states(trunk, features, view) for branch in readers]
        return torch.cat(found)

    predicts = any(objective.predicts_tokens for objective in objectives.values())
    return Rehearsal("training", [trunk, branches], read, optimizer, len(trunk.table) if predicts else 0)
