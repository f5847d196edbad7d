"""Attention spans: profile, plan, optionally tune, validate and export."""

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from ...errors import InputError
from ..base import Rehearsal
from ..distillation.loss import FullVocabularyTargets
from ..distillation.teacher import teacher_states
from ..language_model import Batch, GenerationSettings, LanguageModel
from ..linear_loss import LossParts, linear_loss, shift_labels
from ..precision import Dtype, frozen_dtype
from ..pretrained import head_weight, load_config, load_model
from ..span_attention.attention import attentions
from ..span_attention.rules import CONFIG_KEY, SpanPlan, full_layers, plan_of
from ..span_attention.runtime import apply_plan
from .ablation import ablate, compare_with_ablation
from .fidelity import fidelity
from .measurements import Answered, Processes, answered
from .picture import draw_spans
from .planners import Influence, SpanPlanner
from .profiler import CandidateRules, SpanProfiler
from .solver import Budget

log = logging.getLogger(__name__)


class SpanPruning(LanguageModel):
    """A model whose heads each see as much of the text as they need, chosen on the model's own answers.

    ``fit`` profiles the dense model on the training examples, plans the spans, and takes, of several plans, the one that loses
    least on the validation examples, best at a length that was not profiled; then it trains for as many steps as the Trainer
    has (``max_steps: 0`` for none), every head seeing what the plan lets it. What is measured is kept in the cache as it
    comes, so that a stopped run goes on there.

    Follows MoA (arXiv 2406.14909) in the elastic rules, the calibration on own answers and the mixed-integer program; it
    differs in the default form of influence (``Influence``), one rule for each key/value head, and rows that count from their
    own position, so that decoding and reading a text at once see the same.

    Args:
        source: Model to start from; see ``LanguageModel``.
        density: Share of the key/value cache that is kept, on the average over heads, above 0 up to 1.
        planner: How spans are chosen: ``Influence``, or ``UniformWindow``, ``Shuffled``, ``InductionHeads``, ``HeadGates``,
            ``Ablation`` to compare with.
        candidates: The rules that heads may get.
        budget_lengths: Lengths in tokens at which the density holds; None takes the length levels of the data and
            the longest text that the model takes.
        rules_per_layer: How many distinct rules a layer may have; None for any number.
        check: Compare the profile's costs with ablation, head by head, on this many of the training examples; 0 does not.
        kl_weight: Share of the divergence from the dense model in the training loss, 0 to 1; the answers' cross-entropy has the
            rest.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory.
        gradient_checkpointing: Compute activations again in the backward pass.
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.
        generation: How ``predict`` writes text.

    Raises:
        InputError: If a number is out of range, the model has a plan already, or its attention cannot be given spans.
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        density: float = 0.25,
        planner: SpanPlanner | None = None,
        candidates: CandidateRules | None = None,
        budget_lengths: list[int] | None = None,
        rules_per_layer: int | None = None,
        check: int = 0,
        kl_weight: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        gradient_checkpointing: bool = False,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        for package in ("scipy", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                raise InputError(f"SpanPruning needs the package {package}. Run: pip install 'fulgurite[spans]'")
        candidates = candidates or CandidateRules()
        # The numbers are checked before anything is read; a length that is not known yet is long enough for every rule.
        Budget(density, tuple(budget_lengths or [1 << 20]), candidates, rules_per_layer)
        if not 0 <= kl_weight <= 1:
            raise InputError(f"kl_weight={kl_weight} is no share of the loss. Legal: 0 to 1.")
        if check < 0:
            raise InputError(f"check={check} is below 0. Legal: 0 examples or more.")
        super().__init__(
            source,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
            loss_chunk_tokens=loss_chunk_tokens,
            generation=generation,
        )
        config = load_config(source)
        if plan_of(config) is not None:
            raise InputError(f"source={source!r} has a plan of spans already. Start from the dense model that it was made of.")
        most = getattr(config, "max_position_embeddings", None)
        if budget_lengths and most is not None and max(budget_lengths) > most:
            raise InputError(
                f"budget_lengths={budget_lengths}: source={source!r} takes texts of {most} tokens at most. Lower them."
            )
        self.density, self.planner, self.candidates = density, planner or Influence(), candidates
        self.budget_lengths, self.rules_per_layer, self.check, self.kl_weight = budget_lengths, rules_per_layer, check, kl_weight
        self._longest = set() if most is None else {int(most)}
        self.plan: SpanPlan | None = None
        self._dense: list[PreTrainedModel] = []  # in a list: no part of checkpoints, of DDP or of the optimizer

    def _adopt(self, model: PreTrainedModel) -> None:
        attentions(model)  # says so where the model cannot be given spans
        super()._adopt(model)

    def configure_callbacks(self) -> list:
        """Refuse what cannot work; this is the first hook that sees the Trainer and its data, before the model answers anything.

        Raises:
            InputError: If there is no data module, a strategy splits the weights, or the budget has no room at a length.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        data, strategy = getattr(self.trainer, "datamodule", None), self.trainer.strategy
        if data is None:
            raise InputError(
                "SpanPruning needs a data module, such as SelfGeneratedCalibration: trainer.fit(module, datamodule)."
            )
        self.check_strategy(strategy)
        levels = {length for length in getattr(data, "lengths", []) if length}
        if self.budget_lengths or levels:
            self._budget(levels)
        return []

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``; of the training with spans, not of the profile before."""
        dense = [self._shell(self.source.name, weights=frozen_dtype("auto"))] if self.kl_weight else []
        yield self._rehearsal("training", self._shell(self.source.name), dense)

    def why_not_sharded(self) -> str:
        """See ``PretrainedModule``."""
        return "heads are profiled on whole ones"

    def _budget(self, levels: set[int]) -> Budget:
        lengths = set(self.budget_lengths or levels | self._longest)
        return Budget(self.density, tuple(sorted(lengths)), self.candidates, self.rules_per_layer)

    def on_fit_start(self) -> None:
        """Profile, plan and validate; a run that goes on from a checkpoint has its plan."""
        assert self.model is not None
        data, strategy = self.trainer.datamodule, self.trainer.strategy  # type: ignore[attr-defined]
        if self.plan is None:
            dense = self.model.eval()
            texts = answered(data.train_set)
            budget = self._budget({text.length for text in texts} - {0} or {max(len(text.ids) for text in texts)})
            processes = Processes(self.global_rank, self.trainer.world_size, strategy.barrier, strategy.broadcast)
            plans = self.planner.plans(self.model, texts, budget, processes)
            checked = self._checked(texts, budget, processes) if self.check else {}
            held_out = answered(data.val_set) if data.val_set is not None else []
            measured = processes.of_first(lambda: fidelity(dense, plans, held_out)) if held_out else []
            best = min(range(len(plans)), key=lambda number: measured[number].loss if measured else 0.0)
            densities = {str(length): plans[best].density(length) for length in budget.lengths}
            notes = {"density": densities, **(plans[best].notes or {})}
            if measured:
                notes["validation"] = dataclasses.asdict(measured[best])
            plan = dataclasses.replace(plans[best], notes=notes | checked)
            self._use(plan)
            self._show(plan, max(len(text.ids) for text in [*texts, *held_out]))
            self.model.train()
        if self.kl_weight:
            self._dense = [load_model(self.source.name, frozen_dtype("auto")).requires_grad_(False).to(self.device)]  # type: ignore[arg-type]

    def _checked(self, texts: list[Answered], budget: Budget, processes: Processes) -> dict[str, Any]:
        """Return how well the planner's costs of single heads agree with ablation, on texts of all kinds and lengths."""
        assert self.model is not None
        if not isinstance(self.planner, Influence):
            log.warning("check=%d is ignored: %s has no influence to check.", self.check, type(self.planner).__name__)
            return {}
        count = min(self.check, len(texts))
        some = [texts[number * len(texts) // count] for number in range(count)]
        profile = SpanProfiler(self.candidates, loss=self.planner.loss).profile(self.model, some, processes)
        rule = budget.shortest
        ours = profile.mean(self.planner.form, self.planner.rows)[:, :, profile.rules.index(rule)]
        changes = ablate(self.model, some, rule, sink=budget.sink, loss=self.planner.loss, processes=processes)
        own = full_layers(self.model.config)  # heads of the others have no rule
        found = compare_with_ablation(ours[own], changes.mean(axis=0)[own])
        log.info(
            "Influence and ablation of single heads, %d texts: rank correlation %.2f; of the 10 heads whose ablation costs most, "
            "%d are among the first 20",
            len(some),
            *found.values(),
        )
        return {"check": found}

    def _use(self, plan: SpanPlan) -> None:
        assert self.model is not None
        apply_plan(self.model, plan)
        self.plan = plan

    def _show(self, plan: SpanPlan, length: int) -> None:
        if not self.trainer.is_global_zero:
            return
        measured = (plan.notes or {}).get("validation")
        log.info("Plan: %.1f %% of the cache at %d tokens", 100 * plan.density(length), length)
        if measured:
            log.info(
                "On held-out answers: loss %.4f (dense %.4f), KL to the dense model %.4f, the same most likely token %.1f %%",
                *(measured[name] for name in ("loss", "dense_loss", "kl")),
                100 * measured["agreement"],
            )
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_figure("spans", draw_spans(plan, length))

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of a batch of ``LanguageModel``; in training with its share of the divergence from the dense model."""
        if not (self._dense and self.training):
            return super().loss_parts(batch)
        assert self.model is not None
        dense, targets = self._dense[0], shift_labels(batch["labels"])
        supervised = targets != -100
        return linear_loss(
            self.hidden_states(batch)[supervised],
            head_weight(self.model),
            targets[supervised],
            soft_targets=FullVocabularyTargets(teacher_states(dense, batch), head_weight(dense), "forward_kl", 1.0),
            soft_weight=self.kl_weight,
            chunk_tokens=self.loss_chunk_tokens,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's plan with its weights."""
        super().on_load_checkpoint(checkpoint)
        assert self.model is not None
        data = checkpoint["fulgurite_config"].get(CONFIG_KEY)
        if data is not None:
            self._use(SpanPlan.from_json(data, "the checkpoint's plan of spans"))

    def card_figures(self) -> dict[str, float]:
        """Return the plan's density, and what validation on held-out answers showed."""
        notes = (self.plan.notes if self.plan is not None else None) or {}
        densities = {f"share of the cache at {length} tokens": value for length, value in notes.get("density", {}).items()}
        return {**densities, **{f"held-out answers, {name}": value for name, value in notes.get("validation", {}).items()}}

    def write_extras(self, folder: Path) -> None:
        """Write the plan, and its picture, into an exported folder."""
        if self.plan is None:
            raise InputError("There is no plan of spans to export: fit makes one.")
        super().write_extras(folder)
        lengths = [int(length) for length in (self.plan.notes or {}).get("density", {})] or [4096]
        draw_spans(self.plan, max(lengths)).savefig(folder / "spans.png", dpi=150)
