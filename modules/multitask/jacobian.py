"""The gradients of several losses on the weights that they share, for aggregators of ``torchjd``."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized
from torchjd.aggregation import Aggregator, GramianWeightedAggregator
from torchjd.autojac import jac_to_grad

from .combination import Agreement, common_seed, gramian_cosines


class Jacobian:
    """Rows of gradients, one for each task, summed over the batches of an optimizer step and averaged over ranks.

    Args:
        aggregator: Of ``torchjd``: it makes one gradient of the rows.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self._tasks: set[str] = set()  # that had a loss since the last optimizer step

    def add(self, losses: dict[str, Tensor], shared: Sequence[nn.Parameter], own: nn.ModuleDict) -> None:
        """Find the gradients of a batch's losses; those of a branch's own weights are added to its ``grad``.

        Args:
            losses: By task, a scalar [] each; the same tasks in each batch of an optimizer step.
            shared: Weights that all tasks share.
            own: Branch of each task.
        """
        rows: list[list[Tensor | None]] = []
        self._tasks |= set(losses)
        for name, loss in losses.items():
            branch = _trained(own[name])
            found = torch.autograd.grad(loss, [*shared, *branch], retain_graph=len(rows) < len(losses) - 1, allow_unused=True)
            rows.append(list(found[: len(shared)]))
            for parameter, gradient in zip(branch, found[len(shared) :]):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for place, parameter in enumerate(shared):
            gradients = [torch.zeros_like(parameter) if row[place] is None else row[place] for row in rows]
            jacobian = torch.stack(gradients)  # type: ignore[arg-type]
            for row in rows:
                row[place] = None  # so that all rows are held once
            before = getattr(parameter, "jac", None)
            parameter.jac = jacobian if before is None else before.add_(jacobian)  # type: ignore[attr-defined]

    def aggregate(self, shared: Sequence[nn.Parameter], own: nn.ModuleDict, *, seed: int, watch: bool) -> Agreement | None:
        """Turn the rows into ``grad`` of the shared weights, and forget them.

        Args:
            shared: See ``add``.
            own: See ``add``.
            seed: Of aggregators that draw, as PCGrad does: every rank the same.
            watch: Whether to find how the tasks agree.

        Returns:
            What was found of it, if it was asked for.
        """
        rows: list[Tensor] = [parameter.jac for parameter in shared]  # type: ignore[attr-defined]
        if is_available() and is_initialized() and get_world_size() > 1:
            # Those of tasks that have not joined stay None, so that the optimizer leaves them alone, as in one process.
            branches = [parameter for name in own if name in self._tasks for parameter in _trained(own[name])]
            for parameter in branches:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for tensor in [*rows, *(parameter.grad for parameter in branches if parameter.grad is not None)]:
                all_reduce(tensor, ReduceOp.SUM)
                tensor.div_(get_world_size())
        self._tasks.clear()
        gramian = None
        if watch:
            gramian = torch.stack([(flat := one.flatten(1).float()) @ flat.T for one in rows]).sum(dim=0)
        device = rows[0].device
        with common_seed(seed, device), torch.autocast(device.type, enabled=False):
            weights: Tensor | None
            hooked = any(part._forward_hooks or part._forward_pre_hooks for part in self.aggregator.modules())
            if isinstance(self.aggregator, GramianWeightedAggregator) and not hooked:  # rows need not be copied into one matrix
                weights = jac_to_grad(shared, self.aggregator, optimize_gramian_computation=True)
            else:
                weights = jac_to_grad(shared, self.aggregator)
        return None if gramian is None else Agreement(gramian_cosines(gramian), weights)


def _trained(branch: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in branch.parameters() if parameter.requires_grad]
