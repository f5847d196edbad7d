"""How the losses of several tasks become one gradient for the layers that they share.

Three ways, all of them automatic optimisation:

* a scalarizer of ``torchjd`` makes one loss of all (``Sum``, ``Mean``, ``UW``, ``DWA`` and others);
* ``FeatureWeighting`` weighs what flows back from the branches into the shared features, by how the tasks agree there: one
  backward pass, at the cost of a sum;
* an aggregator of ``torchjd`` (``UPGrad``, ``PCGrad``, ``CAGrad``, ``NashMTL`` and others) works on the Jacobian of the shared
  weights: a backward pass through the shared layers, and a copy of their gradients, for each task.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized
from torch.optim import Optimizer
from torchjd.aggregation import Aggregator, UPGradWeighting, Weighting
from torchjd.linalg import DualConeProjector
from torchjd.scalarization import Scalarizer

from ...errors import InputError

On = Literal["features", "map"]


class LeastSquaresProjector(DualConeProjector):
    """The projection that UPGrad and DualProj need, by SciPy's non-negative least squares.

    It minimises ``v @ G @ v`` over ``v >= u``. The default of ``torchjd`` needs a solver under another kind of licence.

    Args:
        ridge: Added to the diagonal of the Gramian, whose trace is 1; it keeps the solution unique.
    """

    def __init__(self, ridge: float = 1e-4) -> None:
        self.ridge = ridge

    def __repr__(self) -> str:
        return f"LeastSquaresProjector(ridge={self.ridge})"

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return the weights of the projections [..., m] of weights ``U`` [..., m], given a Gramian ``G`` [m, m].

        A Gramian that is not finite leaves them as they are, so that such gradients reach a loss scaler, or the log, as they are.
        """
        if not G.isfinite().all():
            return U
        gramian = G.detach().cpu().double().numpy()
        gramian = gramian / max(float(np.trace(gramian)), 1e-30) + self.ridge * np.eye(len(gramian))
        root = np.linalg.cholesky(gramian).T
        flat = U.detach().cpu().double().numpy().reshape(-1, len(gramian))
        found = [row + nnls(root, -root @ row)[0] for row in flat]
        return torch.as_tensor(np.stack(found), dtype=U.dtype, device=U.device).reshape(U.shape)


class FeatureWeighting(nn.Module):
    """Weighs the gradients that tasks send into the shared features; each branch learns from its own loss alone.

    The weights are a function of the tasks' Gramian, which is found within the one backward pass (torchjd's feature-level
    weighting, and the upper bound of Sener and Koltun, arXiv 1810.04650). The losses of all ranks count.

    Args:
        weighting: Of ``torchjd``: it makes weights [tasks] of a Gramian [tasks, tasks]. None takes UPGrad's (Quinton and Rey,
            arXiv 2406.16232).
        compare: What the Gramian is of. ``features``: gradients of the features themselves, which only tasks on the same text
            share. ``map``: gradients of a linear map between features and branches that is the identity, which tasks on different
            texts share as well. None takes ``features`` where all tasks read the same text, else ``map``.

    Raises:
        InputError: If ``compare`` is unknown.
    """

    def __init__(self, weighting: Weighting | None = None, compare: On | None = None) -> None:
        super().__init__()
        if compare not in (None, "features", "map"):
            raise InputError(f"compare={compare!r} is unknown. Legal: features, map, or null.")
        self.weighting = UPGradWeighting(projector=LeastSquaresProjector()) if weighting is None else weighting
        self.compare: On | None = compare

    def extra_repr(self) -> str:
        """Return what is shown beside the weighting."""
        return f"compare={self.compare}"


Combination = Scalarizer | FeatureWeighting | Aggregator


def with_own_rate(optimizer: OptimizerCallable, part: nn.Module, rate: float, **settings: float) -> OptimizerCallable:
    """Return an optimizer that has a group for a part of a model, at a rate of its own.

    Args:
        optimizer: Makes the optimizer, given its parameters.
        part: Of the model, as it is when the optimizer is made; one that learns nothing changes nothing.
        rate: Learning rate of that group.
        settings: Others of that group.
    """

    def build(parameters: Any) -> Optimizer:
        built = optimizer(parameters)
        learnt = {id(parameter) for parameter in part.parameters()}
        for group in list(built.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in learnt]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in learnt]
                built.add_param_group({**group, "params": own, "lr": rate, **settings})
        return built

    return build


@contextmanager
def common_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Draw within it what every rank draws, and behind it as if nothing had been drawn.

    Args:
        seed: The same on all ranks.
        device: Where it is drawn, beside the CPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def over_ranks(losses: Tensor) -> Tensor:
    """Return losses [tasks] with the values of all ranks' means and the gradients of this one's.

    So every rank combines the same numbers, and gradients that are averaged afterwards are those of one process.
    """
    ranks = get_world_size() if is_available() and is_initialized() else 1
    if ranks == 1:
        return losses
    mean = losses.detach().clone()
    all_reduce(mean, ReduceOp.SUM)
    return losses + (mean / ranks - losses.detach())


@dataclass
class Agreement:
    """What was found on the way back from the branches.

    Args:
        cosines: Of the tasks' gradients on what they share [tasks, tasks].
        weights: That they were given [tasks]; None where nothing weighed them, or not by numbers.
    """

    cosines: Tensor
    weights: Tensor | None


class FanOut:
    """The place between shared features and branches.

    On the way forth each branch gets the features as they are. On the way back what all branches send is there at once, and is
    summed with weights.

    Args:
        rule: How it is weighed; None for a plain sum.
        watch: Whether to find the gradients' cosines, where no rule needs them.
        seed: Of rules that draw, as PCGrad's does: every rank the same.
    """

    def __init__(self, rule: FeatureWeighting | None, *, watch: bool = False, seed: int = 0) -> None:
        self.rule, self.watch, self.seed = rule, watch, seed
        self.agreement: Agreement | None = None

    def split(self, features: Sequence[Tensor], readers: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Return for each view the features of each of its readers.

        Args:
            features: Of each view [rows, length, hidden size].
            readers: Of each view the indices of the tasks that read it; over all views 0 to tasks - 1.
        """
        flat = iter(_FanOut.apply(self, readers, *features))
        return [[next(flat) for _ in tasks] for tasks in readers]

    def combine(
        self, features: Sequence[Tensor], readers: Sequence[Sequence[int]], sent: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the gradient of each view's features [rows, length, hidden size], given what its readers sent back."""
        tasks = 1 + max(max(own) for own in readers)
        by_view, place = [], 0
        for own in readers:
            by_view.append(list(zip(own, sent[place : place + len(own)])))
            place += len(own)
        weights = torch.ones(tasks, device=features[0].device)
        if tasks > 1 and (self.rule is not None or self.watch):
            on = self.rule.compare if self.rule is not None else None
            if on is None:
                on = "features" if len(readers) == 1 else "map"
            gramian = self._gramian(features, by_view, tasks, on)
            if self.rule is not None:
                with common_seed(self.seed, gramian.device):
                    weights = self.rule.weighting(gramian).detach()
            self.agreement = Agreement(gramian_cosines(gramian), None if self.rule is None else weights)
        found = []
        for view, pairs in zip(features, by_view):
            total = torch.zeros_like(view)
            for task, gradient in pairs:
                if gradient is not None:
                    total.add_(gradient * weights[task].to(gradient.dtype))
            found.append(total)
        return found

    @staticmethod
    def _gramian(features: Sequence[Tensor], by_view: list[list[tuple[int, Tensor | None]]], tasks: int, on: On) -> Tensor:
        device, ranks = features[0].device, get_world_size() if is_available() and is_initialized() else 1
        if on == "features":
            gramian = torch.zeros(tasks, tasks, device=device)
            for own in by_view:
                rows = {task: gradient.flatten().float() for task, gradient in own if gradient is not None}
                for one, first in rows.items():
                    for two, second in rows.items():
                        gramian[one, two] += first @ second
            if ranks > 1:
                all_reduce(gramian, ReduceOp.SUM)
                gramian /= ranks**2  # the loss is the mean of the ranks'
            return gramian
        width = features[0].shape[-1]
        maps = torch.zeros(tasks, width, width, device=device)
        for view, own in zip(features, by_view):
            read = view.detach().flatten(0, -2).float()
            for task, gradient in own:
                if gradient is not None:
                    maps[task].addmm_(gradient.flatten(0, -2).float().T, read)
        if ranks > 1:
            all_reduce(maps, ReduceOp.SUM)
            maps /= ranks
        flat = maps.flatten(1)
        return flat @ flat.T


def gramian_cosines(gramian: Tensor) -> Tensor:
    """Return the cosines between rows of which a Gramian [rows, rows] is known."""
    lengths = gramian.diagonal().clamp(min=1e-30).sqrt()
    return gramian / (lengths[:, None] * lengths)


def combination_name(combination: Any) -> str:
    """Return what tells a combination from others: its class, with its settings where it prints them."""
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", repr(combination)))


def combination_state(combination: Any) -> dict[str, Any]:
    """Return what a combination and its parts remember beside parameters and buffers, such as DWA's averages.

    That are plain values and tensors, which a checkpoint may hold; Nash-MTL's last solution and FAMO's optimizer are not.
    """
    parts = combination.named_modules() if isinstance(combination, nn.Module) else []
    known = vars(nn.Module())
    return {
        f"{prefix}.{name}".removeprefix("."): value
        for prefix, part in parts
        for name, value in vars(part).items()
        if name not in known and _is_plain(value)
    }


def load_combination_state(combination: nn.Module, state: dict[str, Any], device: torch.device) -> None:
    """Give a combination back what ``combination_state`` returned of one with the same name.

    Args:
        combination: How losses are combined.
        state: What it remembered.
        device: Where its tensors go.
    """
    for name, value in state.items():
        place, _, attribute = name.rpartition(".")
        setattr(combination.get_submodule(place), attribute, _on(value, device))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_on(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, int | float | bool | str | Tensor | torch.dtype)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fan: FanOut, readers: Sequence[Sequence[int]], *features: Tensor) -> tuple[Tensor, ...]:
        ctx.fan, ctx.readers = fan, readers
        ctx.save_for_backward(*features)
        ctx.set_materialize_grads(False)
        return tuple(view.view_as(view) for view, tasks in zip(features, readers) for _ in tasks)

    @staticmethod
    def backward(ctx: Any, *sent: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.fan.combine(ctx.saved_tensors, ctx.readers, sent)
