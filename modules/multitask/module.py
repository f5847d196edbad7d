"""Multi-task training: shared layers, and for each task a branch network and a loss.

Follows ERNIE 3.0 (arXiv 2107.02137): a shared semantic layer, branches that understand and branches that generate. A text goes
through the shared layers once for each mask, and every branch of that mask reads the same features. ERNIE's branches for
understanding share one network; here each task has its own, by default of the trunk's own kind of layers.
"""

import logging
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torchjd.aggregation import Aggregator
from torchjd.autojac import jac_to_grad
from torchjd.scalarization import DWA, FAMO, Mean, Scalarizer, Sum
from transformers import AutoConfig, PreTrainedModel

from ...errors import InputError, nearest
from ..base import PretrainedModule
from ..pretrained import Dtype, base_from_config, load_base, load_config
from .branches import Answer, Branch, TransformerBranch, build_branches
from .combination import FanOut, FeatureWeighting, gramian_cosines
from .metrics import TaskMetrics
from .objectives import Objective
from .plain import plain_model, why_not_plain
from .readable import readable
from .trunk import Trunk, View, check_trunk

log = logging.getLogger(__name__)

Combination = Scalarizer | FeatureWeighting | Aggregator


class MultiTask(PretrainedModule):
    """Several tasks on one trunk.

    The tasks come with the data (``MultiTaskDataModule``); a checkpoint holds what of them the model depends on.

    Args:
        source: Model that the trunk starts from, a decoder or an encoder; see ``LanguageModel``.
        fresh: Fields of the model's config to change; the trunk starts from random weights then.
        branches: Branch by task, for all of them; None makes ``TransformerBranch(branch_layers)`` for each.
        branch_layers: Transformer layers of a branch, where ``branches`` is None.
        combination: How the losses become one gradient: a scalarizer of ``torchjd``, ``FeatureWeighting``, or an aggregator of
            ``torchjd``; see ``combination``. None is the sum.
        loss_weights: Factor of a task's loss before that, by task; those not named have 1.
        period: Optimizer steps after which a combination that counts in epochs (DWA) is told that one is over.
        max_new_tokens: Tokens that ``predict`` writes behind a prompt at most.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory; train ``float32`` with ``trainer.precision: bf16-mixed``.
        gradient_checkpointing: Compute the trunk's activations again in the backward pass.

    Raises:
        InputError: If the source cannot be a trunk, or a number is out of range.
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        fresh: dict[str, Any] | None = None,
        branches: dict[str, Branch] | None = None,
        branch_layers: int = 1,
        combination: Combination | None = None,
        loss_weights: dict[str, float] | None = None,
        period: int = 50,
        max_new_tokens: int = 32,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        modules = ("combination", "branches")
        super().__init__(source, optimizer=optimizer, lr_scheduler=lr_scheduler, weights=weights, parts=modules)
        config = load_config(source)
        check_trunk(config)
        for name in fresh or {}:
            if not hasattr(config, name):
                raise InputError(f"fresh has {name!r}, which the model's config has not.{nearest(name, config.to_dict())}")
        for name, factor in (loss_weights or {}).items():
            if factor < 0:
                raise InputError(f"loss_weights.{name}={factor} is below 0. Legal: 0 or more.")
        if period < 1:
            raise InputError(f"period={period}. Legal: 1 or more optimizer steps.")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} writes nothing. Legal: 1 or more.")
        TransformerBranch(branch_layers)  # refuses a wrong number
        self.fresh, self.given, self.branch_layers = fresh, branches, branch_layers
        self.combination: Combination = combination or Sum()
        if isinstance(self.combination, FAMO):  # steps its own weights, which no optimizer of ours and no DDP should wait for
            self.combination.requires_grad_(False)
        self.loss_weights, self.period, self.max_new_tokens = loss_weights or {}, period, max_new_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.objectives: dict[str, Objective] = {}
        self.trunk: Trunk | None = None
        self.branches = nn.ModuleDict()
        self.metrics = nn.ModuleDict()
        self._pending: list[tuple[list[str], list[Tensor]]] = []  # losses whose Jacobian is to be found
        self._random: Tensor | None = None
        self._told = 0  # the step that the combination was told of last
        self._last_batch: Any = None  # of FAMO, which looks at it again

    def configure_model(self) -> None:
        """Load the trunk, and attach a branch for each task of the data."""
        if self.trunk is not None:
            return
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        objectives = getattr(data, "objectives", None)
        if objectives is None:
            if self._trainer is None:
                return  # load_from_checkpoint brings them
            raise InputError("MultiTask needs data that names tasks: trainer.fit(module, MultiTaskDataModule(...)).")
        self._build(objectives, load_base(self.source.name, self.weights, self.fresh))

    def _build(self, objectives: dict[str, Objective], model: PreTrainedModel) -> None:
        self._check(objectives)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.objectives = dict(objectives)
        self.trunk = Trunk(model)
        default = lambda: TransformerBranch(self.branch_layers)  # noqa: E731
        self.branches = build_branches(self.trunk, self.objectives, self.given, default)
        self.metrics = nn.ModuleDict({name: TaskMetrics(objective) for name, objective in self.objectives.items()})
        self.train()

    def _check(self, objectives: dict[str, Objective]) -> None:
        for what, names in (("branches", self.given), ("loss_weights", self.loss_weights)):
            for name in names or {}:
                if name not in objectives:
                    raise InputError(f"{what} has {name!r}, which is no task of the data.{nearest(name, objectives)}")
        missing = [name for name in objectives if self.given is not None and name not in self.given]
        if missing:
            raise InputError(
                f"branches has none for task {missing[0]!r}. Give one for each task of the data ({', '.join(objectives)}), or "
                "leave branches out."
            )

    def on_fit_start(self) -> None:
        """Refuse combinations that the batches or the strategy cannot serve."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        name = type(self.combination).__name__
        needs_all = not isinstance(self.combination, Sum | Mean)
        if needs_all and not data.mixed:
            raise InputError(
                f"combination={name} compares tasks, but data.batches='task' brings one at a time. Legal: data.batches=mixed, or "
                "combination Sum or Mean."
            )
        if needs_all and data.schedule and not isinstance(self.combination, FeatureWeighting | Aggregator):
            raise InputError(
                f"combination={name} needs all tasks from the start, but TaskSchedule adds some later. Leave one out."
            )
        strategy = self.trainer.strategy
        finds_unused = not isinstance(strategy, DDPStrategy) or getattr(strategy.model, "find_unused_parameters", True)
        if (data.schedule or not data.mixed) and not finds_unused and not isinstance(self.combination, Aggregator):
            what = "TaskSchedule" if data.schedule else "data.batches='task'"
            raise InputError(
                f"{what} leaves branches without a gradient, for which DDP would wait. Use trainer.strategy: "
                "ddp_find_unused_parameters_true."
            )
        if isinstance(self.combination, Aggregator):
            if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
                raise InputError(f"combination={name} needs whole gradients. Legal strategies: one device, ddp.")
            if self.trainer.precision == "16-mixed":
                raise InputError(f"combination={name} cannot scale its gradients. Legal precisions: 32-true, bf16-mixed.")
            if isinstance(strategy, DDPStrategy):  # the Jacobian's rows are averaged here, not by DDP
                strategy.model.require_backward_grad_sync = False  # type: ignore[union-attr]

    def _answers(self, batch: dict[str, Any], *, watch: bool = False) -> tuple[dict[str, Answer], FanOut]:
        """Return what each task's branch made of a batch, whose views each go through the trunk once."""
        assert self.trunk is not None
        views: list[View] = batch["views"]
        features = [self.trunk(view) for view in views]
        names = [name for view in views for name in view["targets"]]
        places = iter(range(len(names)))
        readers = [[next(places) for _ in view["targets"]] for view in views]
        rule = self.combination if isinstance(self.combination, FeatureWeighting) else None
        fan = FanOut(rule, watch=watch)
        direct = isinstance(self.combination, Aggregator) or not torch.is_grad_enabled()
        copies = [[own] * len(tasks) for own, tasks in zip(features, readers)] if direct else fan.split(features, readers)
        found: dict[str, Answer] = {}
        for view, own in zip(views, copies):
            for (name, targets), read in zip(view["targets"].items(), own):
                branch: Any = self.branches[name]
                found[name] = branch.answer(self.trunk, branch.states(self.trunk, read, view), view, targets)
        return found, fan

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch: ``views``, each with ``targets`` by task."""
        answers, self._fan = self._answers(batch, watch=self._should_log)
        each = [answer.loss * self.loss_weights.get(name, 1.0) for name, answer in answers.items()]
        losses = torch.stack(each)
        for name, answer in answers.items():
            self.log(f"train_loss/{name}", answer.loss.detach(), batch_size=max(1, answer.count))
        if isinstance(self.combination, Scalarizer):
            loss = losses[0] if len(losses) == 1 else self.combination(self._over_ranks(losses))
        else:
            loss = losses.sum()
        if isinstance(self.combination, Aggregator):
            self._pending = [(list(answers), each)]
        elif isinstance(self.combination, FAMO):
            self._last_batch = batch
        self._names = list(answers)
        self.log("train_loss", losses.detach().sum(), prog_bar=True)
        return loss

    def _over_ranks(self, losses: Tensor) -> Tensor:
        """Return losses with the values of all ranks' means and the gradients of this one's.

        So every rank combines the same numbers, and gradients that are averaged afterwards are those of one process.
        """
        if self.trainer.world_size == 1:
            return losses
        mean = losses.detach().clone()
        all_reduce(mean, ReduceOp.SUM)
        return losses + (mean / self.trainer.world_size - losses.detach())

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Find the gradients; for an aggregator a row of the Jacobian for each task."""
        if not isinstance(self.combination, Aggregator):
            super().backward(loss, *args, **kwargs)
            self._log_agreement()
            return
        (names, losses), self._pending = self._pending[0], []
        shared = self._shared()
        losses = [one / self.trainer.accumulate_grad_batches for one in losses]
        rows: list[tuple[Tensor | None, ...]] = []
        for place, name in enumerate(names):
            own = list(self.branches[name].parameters())
            found = torch.autograd.grad(losses[place], [*shared, *own], retain_graph=place < len(names) - 1, allow_unused=True)
            rows.append(found[: len(shared)])
            for parameter, gradient in zip(own, found[len(shared) :]):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for parameter, *gradients in zip(shared, *rows):
            jacobian = torch.stack([torch.zeros_like(parameter) if row is None else row for row in gradients])
            parameter.jac = parameter.jac + jacobian if hasattr(parameter, "jac") else jacobian

    def _shared(self) -> list[nn.Parameter]:
        assert self.trunk is not None
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    def _jacobians(self) -> list[Tensor]:
        return [parameter.jac for parameter in self._shared()]  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Aggregate the Jacobian, before the Trainer clips what comes of it."""
        if not isinstance(self.combination, Aggregator):
            return
        shared = self._shared()
        ranks = self.trainer.world_size
        if ranks > 1:
            for jacobian in self._jacobians():
                all_reduce(jacobian, ReduceOp.SUM)
                jacobian /= ranks
            for parameter in self.branches.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                all_reduce(parameter.grad, ReduceOp.SUM)
                parameter.grad /= ranks
        if self._should_log:
            gramian = torch.stack([_rows(one) @ _rows(one).T for one in self._jacobians()]).sum(dim=0)
            self._log_cosines(gramian_cosines(gramian))
        # An aggregator may draw, as PCGrad does: every rank the same.
        with torch.random.fork_rng(devices=[]), torch.autocast(self.device.type, enabled=False):
            torch.manual_seed(self.trainer.global_step)
            weights = jac_to_grad(shared, self.combination)
        if weights is not None and self._should_log:
            for name, weight in zip(self._names, weights.tolist()):
                self.log(f"weight/{name}", weight)

    @property
    def _should_log(self) -> bool:
        # As Lightning's loggers count.
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _log_agreement(self) -> None:
        found, self._fan.agreement = self._fan.agreement, None
        if found is None or not self._should_log:
            return
        for one, name in enumerate(self._names):
            if isinstance(self.combination, FeatureWeighting):
                self.log(f"weight/{name}", found.weights[one])
        self._log_cosines(found.cosines)

    def _log_cosines(self, cosines: Tensor) -> None:
        for one, name in enumerate(self._names):
            for two in range(one + 1, len(self._names)):
                self.log(f"cosine/{name}~{self._names[two]}", cosines[one, two])

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell combinations what they have to know."""
        if self.trainer.global_step == self._told:  # within an accumulation
            return
        self._told = self.trainer.global_step
        if isinstance(self.combination, FAMO) and self._last_batch is not None:
            answers, _ = self._answers(self._last_batch)
            losses = [answer.loss * self.loss_weights.get(name, 1.0) for name, answer in answers.items()]
            self.combination.requires_grad_(True).update(self._over_ranks(torch.stack(losses)))
            self.combination.requires_grad_(False)
            self._last_batch = None
        if isinstance(self.combination, DWA) and self.trainer.global_step % self.period == 0:
            self.combination.step()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its tasks' metrics."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its tasks' metrics."""
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> None:
        for name, answer in self._answers(batch)[0].items():
            self.metrics[name].add(answer)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all tasks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all tasks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        losses = []
        for name, metrics in self.metrics.items():
            found: dict[str, float] = metrics.take()  # type: ignore[operator]
            if found:
                losses.append(found["loss"])
            self.log_dict({f"{stage}_{kind}/{name}": value for kind, value in found.items()})
        self.log(f"{stage}_loss", sum(losses) / max(1, len(losses)), prog_bar=True)

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return every task's answer to every row, as a person reads it.

        Args:
            batch: Views, as in training.
            batch_idx: Not used.
            dataloader_idx: Not used.

        Returns:
            ``task``, ``text`` and ``prediction``; see ``readable``.
        """
        assert self.trunk is not None
        found = []
        for view in batch["views"]:
            features = self.trunk(view)
            for name, targets in view["targets"].items():
                branch: Any = self.branches[name]
                states = branch.states(self.trunk, features, view)
                own = self.objectives[name], states, view, targets, self.tokenizer, self.max_new_tokens
                found += [{"task": name, **row} for row in readable(self.trunk, branch, *own)]
        return found

    def why_not_plain(self, task: str) -> str | None:
        """Return why ``transformers`` has no model of trunk and a task's branch, or None where it has."""
        assert self.trunk is not None
        branch: Any = self.branches[task]
        return why_not_plain(self.trunk, branch, self.objectives[task])

    def plain_model(self, task: str) -> PreTrainedModel:
        """Return trunk and a task's branch as a model of ``transformers``.

        Args:
            task: Name of the task; of a text task with its aim.

        Raises:
            InputError: If there is no such task, or no such model.
        """
        if self.trunk is None or task not in self.objectives:
            raise InputError(f"task={task!r} is none of the model's.{nearest(task, self.objectives)}")
        branch: Any = self.branches[task]
        return plain_model(self.trunk, branch, self.objectives[task])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the model depends on: the trunk's config and the tasks."""
        assert self.trunk is not None
        checkpoint["fulgurite_multitask"] = {
            "config": self.trunk.model.config.to_dict(),
            "objectives": {name: [own.kind, list(own.classes)] for name, own in self.objectives.items()},
            "combination": _kept(self.combination),
            "random": torch.get_rng_state(),  # of dropout
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the checkpoint's model where there is none yet, and check that its tasks are those at hand.

        Raises:
            InputError: If it is a checkpoint of another system, or of other tasks.
        """
        saved = checkpoint.get("fulgurite_multitask")
        if saved is None:
            raise InputError("This checkpoint is of no MultiTask: give the one of the run that is to go on.")
        objectives = {name: Objective(kind, tuple(classes)) for name, (kind, classes) in saved["objectives"].items()}
        if self.trunk is None:
            config = AutoConfig.for_model(saved["config"]["model_type"]).from_dict(saved["config"])
            self._build(objectives, base_from_config(config, self.weights))
        elif objectives != self.objectives:
            raise InputError(
                f"The checkpoint is of other tasks: {', '.join(objectives)}, with their classes; here are "
                f"{', '.join(self.objectives)}. Give the data of the run that wrote it."
            )
        for name, value in saved["combination"].items():
            setattr(self.combination, name, value)
        self._random = saved["random"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the run that wrote the checkpoint; loaders that begin have drawn one meanwhile."""
        if self._random is not None:
            torch.set_rng_state(self._random.cpu())
            self._random = None


def _rows(jacobian: Tensor) -> Tensor:
    return jacobian.flatten(1).float()


def _kept(combination: Any) -> dict[str, Any]:
    """Return what a combination remembers beside its parameters (DWA's averages), as plain values and tensors."""
    plain = (int, float, bool, str, Tensor, type(None))
    return {
        name: value
        for name, value in vars(combination).items()
        if name not in vars(nn.Module())
        and (isinstance(value, plain) or (isinstance(value, list) and all(isinstance(one, plain) for one in value)))
    }
