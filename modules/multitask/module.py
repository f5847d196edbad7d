"""Multi-task training: shared layers, and for each task a branch network and a loss.

Follows ERNIE 3.0 (arXiv 2107.02137): a shared semantic layer, branches that understand and branches that generate. A text goes
through the shared layers once for each mask, and every branch of that mask reads the same features. ERNIE's branches for
understanding share one network; here each task has its own, by default of the trunk's own kind of layers.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, NashMTL
from torchjd.scalarization import DWA, FAMO, Scalarizer, Sum
from transformers import AutoConfig, PreTrainedModel

from ...errors import InputError, nearest
from ..base import PretrainedModule, Rehearsal
from ..precision import Dtype
from ..pretrained import load_config
from ..student import fresh_config
from .branches import Answer, Branch, Pooling, TransformerBranch, build_branches
from .checks import check_combination, check_same_tasks, check_saved_branches, check_tasks
from .combination import (
    Agreement,
    Combination,
    FanOut,
    FeatureWeighting,
    combination_name,
    combination_state,
    load_combination_state,
    over_ranks,
    with_own_rate,
)
from .jacobian import Jacobian
from .metrics import TaskMetrics
from .objectives import Objective
from .plain import plain_model, why_not_plain
from .readable import readable
from .rehearsal import rehearsal
from .trunk import Trunk, View, check_trunk, load_trunk, trunk_of_config

log = logging.getLogger(__name__)


class MultiTask(PretrainedModule):
    """Several tasks on one trunk.

    The tasks come with the data (``MultiTaskDataModule``); a checkpoint holds what of them the model depends on.

    Args:
        source: Model that the trunk starts from, a decoder or an encoder; see ``LanguageModel``.
        fresh: Fields of the model's config to change; the trunk starts from random weights then.
        branches: Branch by task, for all of them; None makes a ``TransformerBranch`` for each.
        branch_layers: Transformer layers of a branch, where ``branches`` is None.
        branch_pooling: What of a text a branch's head reads, where ``branches`` is None; see ``TransformerBranch``.
        branch_rate: Learning rate of the branches, which are new and can take a higher one than the trunk (discriminative
            fine-tuning, arXiv 1801.06146); None takes the optimizer's.
        combination: How the losses become one gradient: a scalarizer of ``torchjd``, ``FeatureWeighting``, or an aggregator of
            ``torchjd``; see ``combination``. None is the sum.
        combination_rate: Learning rate of what a combination learns (UW's and IMTL-L's weights), without weight decay, under the
            schedule of the others; 0.025 is FAMO's for such weights (arXiv 2306.03792).
        loss_weights: Factor of a task's loss before that, by task; those not named have 1.
        period: Optimizer steps after which a combination that counts in epochs (DWA) is told that one is over.
        max_new_tokens: Tokens that ``predict`` writes behind a prompt at most.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory; train ``float32`` with ``trainer.precision: auto``.
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
        branch_pooling: Pooling | None = None,
        branch_rate: float | None = None,
        combination: Combination | None = None,
        combination_rate: float = 0.025,
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
        check_trunk(load_config(source), fresh)
        for name, factor in (loss_weights or {}).items():
            if factor < 0:
                raise InputError(f"loss_weights.{name}={factor} is below 0. Legal: 0 or more.")
        for part, rate in (("combination", combination_rate), ("branch", branch_rate)):
            if rate is not None and rate <= 0:
                raise InputError(f"{part}_rate={rate}: the {part} would learn nothing. Legal: above 0.")
        if period < 1:
            raise InputError(f"period={period}. Legal: 1 or more optimizer steps.")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} writes nothing. Legal: 1 or more.")
        self._branch = partial(TransformerBranch, branch_layers, pooling=branch_pooling)
        self._branch()  # refuses wrong settings
        self.fresh, self.given = fresh, branches
        self.combination: Combination = combination or Sum()
        if isinstance(self.combination, FAMO):  # steps its own weights, which no optimizer of ours and no DDP should wait for
            self.combination.requires_grad_(False)
        self.branches = nn.ModuleDict()
        self.optimizer = with_own_rate(optimizer, self.combination, combination_rate, weight_decay=0.0)
        if branch_rate is not None:
            self.optimizer = with_own_rate(self.optimizer, self.branches, branch_rate)
        self.loss_weights, self.period, self.max_new_tokens = loss_weights or {}, period, max_new_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.objectives: dict[str, Objective] = {}
        self.trunk: Trunk | None = None
        self.metrics = nn.ModuleDict()
        self._jacobian = Jacobian(self.combination) if isinstance(self.combination, Aggregator) else None
        self._losses: dict[str, Tensor] = {}  # of the batch at work, weighted
        self._random: dict[str, Tensor] = {}  # states that a checkpoint brought
        self._remembered: dict[str, Any] = {}  # by the combination, as a checkpoint brought it
        self._told = 0  # the step that the combination was told of last
        self._last_batch: Any = None  # of FAMO, which looks at it again

    def setup(self, stage: str) -> None:
        """Refuse tasks that the model cannot serve, and for ``fit`` a combination, before any weight is loaded."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "objectives"):
            if self.trunk is not None and stage != "fit":
                return
            raise InputError("MultiTask needs data that names tasks: trainer.fit(module, MultiTaskDataModule(...)).")
        if self.trunk is None:
            check_tasks(data, self.source.name, self.fresh, self.given, self.loss_weights)
        else:
            check_same_tasks(self.objectives, data.objectives, "the data", all_of_them=stage == "fit")
        if stage == "fit":
            check_combination(self.combination, data, self.trainer.strategy, self.trainer.precision)

    def configure_model(self) -> None:
        """Load the trunk, and attach a branch for each task of the data."""
        if self.trunk is None and self._trainer is not None:  # load_from_checkpoint brings them
            objectives = self.trainer.datamodule.objectives  # type: ignore[attr-defined]
            self._build(objectives, load_trunk(self.source.name, self.weights, self.fresh))

    def _build(self, objectives: dict[str, Objective], trunk: Trunk) -> None:
        if self.gradient_checkpointing:
            trunk.model.activation_checkpointing_enable({"use_reentrant": False})
        self.objectives = dict(objectives)
        self.trunk = trunk
        if not any(objective.predicts_tokens for objective in objectives.values()):
            trunk.head = None  # nothing would train it
        self.branches.update(dict(build_branches(trunk, self.objectives, self.given, self._branch).items()))
        self.metrics = nn.ModuleDict({name: TaskMetrics(objective) for name, objective in self.objectives.items()})
        self.train()

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``; of a mixed batch of equally many texts a task, with branches where none are given."""
        trunk = trunk_of_config(fresh_config(load_config(self.source.name), self.fresh or {}), self.weights)
        if self.gradient_checkpointing:
            trunk.model.activation_checkpointing_enable({"use_reentrant": False})
        kinds = {name: task.kinds for name, task in data.tasks.items()}
        yield rehearsal(trunk, kinds, self._branch, self.optimizer)

    def why_not_sharded(self) -> str:
        """See ``PretrainedModule``."""
        return "" if self._jacobian is None else f"combination={type(self.combination).__name__} needs whole gradients"

    def on_fit_start(self) -> None:
        """Leave DDP's averaging to the Jacobian, whose rows are averaged before they are aggregated."""
        if self._jacobian is not None and isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy.model.require_backward_grad_sync = False  # type: ignore[union-attr]

    def on_train_start(self) -> None:
        """Give the combination back what a checkpoint remembered of it, now that the model is on its device."""
        super().on_train_start()
        load_combination_state(self.combination, self._remembered, self.device)
        self._remembered = {}

    def _answers(self, batch: dict[str, Any], *, watch: bool = False) -> tuple[dict[str, Answer], FanOut]:
        """Return what each task's branch made of a batch, whose views each go through the trunk once."""
        assert self.trunk is not None
        views: list[View] = batch["views"]
        features = [self.trunk(view) for view in views]
        names = [name for view in views for name in view["targets"]]
        places = iter(range(len(names)))
        readers = [[next(places) for _ in view["targets"]] for view in views]
        rule = self.combination if isinstance(self.combination, FeatureWeighting) else None
        fan = FanOut(rule, watch=watch, seed=self.trainer.global_step)
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
        self._losses = {name: answer.loss * self.loss_weights.get(name, 1.0) for name, answer in answers.items()}
        losses = torch.stack(list(self._losses.values()))
        for name, answer in answers.items():
            if answer.count:
                self.log(f"train_loss/{name}", answer.loss.detach(), batch_size=answer.count)
        self.log("train_loss", losses.detach().sum(), prog_bar=True)
        if isinstance(self.combination, FAMO):
            self._last_batch = batch
        if isinstance(self.combination, Scalarizer):
            alone = len(losses) == 1 < len(self.branches)  # in a batch of one task
            return losses[0] if alone else self.combination(over_ranks(losses))
        return losses.sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Find the gradients of a loss []; for an aggregator a row of the Jacobian for each task."""
        if self._jacobian is None:
            super().backward(loss, *args, **kwargs)
            agreement, self._fan.agreement = self._fan.agreement, None
            self._log_agreement(agreement)
            return
        losses = {name: one / self.trainer.accumulate_grad_batches for name, one in self._losses.items()}
        self._jacobian.add(losses, self._shared(), self.branches)
        self._losses = {name: one.detach() for name, one in self._losses.items()}  # what the branches kept is free now

    def _shared(self) -> list[nn.Parameter]:
        assert self.trunk is not None
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Aggregate the Jacobian, before the Trainer clips what comes of it."""
        if self._jacobian is not None:
            step = self.trainer.global_step
            found = self._jacobian.aggregate(self._shared(), self.branches, seed=step, watch=self._should_log)
            self._log_agreement(found)

    @property
    def _should_log(self) -> bool:
        # As Lightning's loggers count.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _log_agreement(self, found: Agreement | None) -> None:
        if found is None or not self._should_log:
            return
        names = list(self._losses)
        for one, name in enumerate(names):
            if found.weights is not None:
                self.log(f"weight/{name}", found.weights[one])
            for two in range(one + 1, len(names)):
                self.log(f"cosine/{name}~{names[two]}", found.cosines[one, two])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the random numbers of the run that wrote the checkpoint; loaders that begin have drawn one meanwhile."""
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"].cpu())
        if "cuda" in self._random and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random["cuda"].cpu(), self.device)
        self._random = {}
        self._tell()

    @torch.no_grad()
    def _tell(self) -> None:
        """Tell combinations of the step before: here, since checkpoints are written before a module hears that it is over."""
        step = self.trainer.global_step
        if step in (0, self._told):  # the second is within an accumulation
            return
        self._told = step
        if isinstance(self.combination, FAMO) and self._last_batch is not None:
            with self.trainer.precision_plugin.forward_context():
                answers, _ = self._answers(self._last_batch)
            losses = [answer.loss * self.loss_weights.get(name, 1.0) for name, answer in answers.items()]
            self.combination.requires_grad_(True).update(over_ranks(torch.stack(losses)))
            self.combination.requires_grad_(False)
            self._last_batch = None
        if isinstance(self.combination, DWA) and step % self.period == 0:
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
        return why_not_plain(self.trunk, self.branches[task], self.objectives[task])  # type: ignore[arg-type]

    def plain_model(self, task: str) -> PreTrainedModel:
        """Return trunk and a task's branch as a model of ``transformers``.

        Args:
            task: Name of the task; of a text task with its aim.

        Raises:
            InputError: If there is no such task, or no such model.
        """
        if self.trunk is None or task not in self.objectives:
            raise InputError(f"task={task!r} is none of the model's.{nearest(task, self.objectives)}")
        return plain_model(self.trunk, self.branches[task], self.objectives[task])  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the model depends on: the trunk's config and the tasks."""
        assert self.trunk is not None
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        checkpoint["fulgurite_multitask"] = {
            "config": self.trunk.model.config.to_dict(),
            "objectives": {name: [own.kind, list(own.classes)] for name, own in self.objectives.items()},
            "branches": {name: type(branch).__name__ for name, branch in self.branches.items()},
            "combination": combination_name(self.combination),
            "combination_state": combination_state(self.combination),
            "told": self._told,
            "random": {"cpu": torch.get_rng_state(), **cuda},  # of dropout
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
            check_saved_branches(saved["branches"], self.given)
            config = AutoConfig.for_model(saved["config"]["model_type"]).from_dict(saved["config"])
            self._build(objectives, trunk_of_config(config, self.weights))
        check_same_tasks(self.objectives, objectives, "the checkpoint", all_of_them=True)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:  # what combined the losses is not asked for
            mine = {f"combination.{name}": value for name, value in self.combination.state_dict().items()}
            others = {name: one for name, one in checkpoint.get("state_dict", {}).items() if not name.startswith("combination.")}
            checkpoint["state_dict"] = others | mine
            return
        name = combination_name(self.combination)
        if name != saved["combination"]:
            raise InputError(
                f"combination={name}, but the run that wrote the checkpoint had {saved['combination']}. Give that one to go on."
            )
        if isinstance(self.combination, FAMO | NashMTL):
            log.warning("%s begins anew but for its weights: a checkpoint cannot keep the rest", type(self.combination).__name__)
        else:
            self._remembered = saved["combination_state"]
        self._told, self._random = saved.get("told", 0), saved["random"]
