"""Fusion compression: operators are learnt in stages, then the small model that they made is trained freely."""

import itertools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ..base import Rehearsal
from ..distillation.labels import LabelSettings
from ..distillation.loss import Divergence, Remainder
from ..distillation.module import SoftLabelDistillation
from ..language_model import Batch, GenerationSettings
from ..linear_loss import LossParts, shift_labels
from ..optimizers import MuonAdamW
from ..precision import Dtype, FrozenDtype
from ..pretrained import load_config, load_model
from ..student import decoder_layers, layer_outputs, shared_parts
from .fused import materialise
from .reading import hidden_distance, readable, text_loss
from .shape import FusionShape
from .starts import FusionStart, LearnedFusion, Stage
from .statistics import Rows, rows_of
from .summary import can_draw, draw_operators, summarise, summary_of_kept

log = logging.getLogger(__name__)


class FusionCompression(SoftLabelDistillation):
    """A large model fused into a small one, width and then depth, and distilled.

    Operators over the frozen large model are learnt first, stage by stage; ``TrainUntilCondition`` ends a stage. Then the small
    model's weights are written out, and trained freely until the Trainer's end. All along the loss is that of
    ``SoftLabelDistillation``: cross-entropy to the text and divergence from the large model, which reads every batch, or from
    stored labels, where the data brings them.

    Follows LEMON (ACL 2024, long 434); see ``LearnedFusion`` for what differs.

    Args:
        source: The large model; see ``LanguageModel``.
        shape: Sizes of the small model, or its number of parameters.
        start: How the small model begins: ``LearnedFusion``, or ``BestSelection`` and others to compare with.
        teacher: Source of the model whose distribution is learnt from; None takes the large model itself.
        selection: What is kept of its distribution; not used with stored labels.
        soft_weight: Share of the divergence in the loss, 0 to 1; the cross-entropy to the text has the rest.
        divergence: See ``SoftLabelDistillation``.
        remainder: See ``SoftLabelDistillation``.
        hidden_weight: While operators are learnt, weight of the mean over layers of 1 - cosine between the residual stream behind
            a small layer and behind the large layers that it stands for; needs an online teacher.
        operator_optimizer: Optimizer of the stages in which operators are learnt, given its parameters; its rate stays.
        optimizer: Optimizer of the last stage.
        lr_scheduler: Learning-rate schedule of the last stage, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory.
        teacher_weights: Type of the teacher's weights in memory.
        gradient_checkpointing: Compute activations again in the backward pass.
        attn_implementation: Attention function of ``transformers``; its own choice when None.
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.
        generation: How ``predict`` writes text.

    Raises:
        InputError: If the shape does not fit the model, or a number is out of range, before weights are read.
    """

    STAGES = get_args(Stage)
    """Names of all stages that a start may have."""

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        shape: FusionShape,
        start: FusionStart | None = None,
        teacher: str | None = None,
        selection: LabelSettings = LabelSettings(selection="full"),  # noqa: B008  (frozen)
        soft_weight: float = 0.5,
        divergence: Divergence = "forward_kl",
        remainder: Remainder = "tail_bucket",
        hidden_weight: float = 0.0,
        operator_optimizer: OptimizerCallable = MuonAdamW,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        teacher_weights: FrozenDtype = "auto",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        if hidden_weight < 0:
            raise InputError(f"hidden_weight={hidden_weight} is below 0. Legal: 0 or more.")
        if hidden_weight and teacher not in (None, source):
            raise InputError(
                f"hidden_weight={hidden_weight} compares layers with those that they were made of, but teacher={teacher!r} is "
                "another model. Use hidden_weight=0, or leave teacher out."
            )
        config = load_config(source)
        resolved = shape.resolve(config)
        super().__init__(
            source,
            teacher=teacher or source,
            selection=selection,
            soft_weight=soft_weight,
            divergence=divergence,
            remainder=remainder,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            weights=weights,
            teacher_weights=teacher_weights,
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
            loss_chunk_tokens=loss_chunk_tokens,
            generation=generation,
        )
        self.shape, self.start, self.hidden_weight = resolved, start or LearnedFusion(), hidden_weight
        self.operator_optimizer = operator_optimizer
        self.stages: list[Stage] = self.start.stages(config, resolved)
        self.stage = 0  # the number of those that are done
        self.centres: list[int] = []
        self.wide: PreTrainedModel | None = None  # what the depth stage mixes, frozen; part of checkpoints
        self._large: list[PreTrainedModel] = []  # in a list: a checkpoint names its source instead
        self.held_out: dict[str, float] = {}  # perplexities of held-out text by model
        self.learnt: dict[str, Any] = {}  # what the operators of the stages so far came to, or which layers were kept without any

    @property
    def stage_name(self) -> str:
        """Name of the stage in which operators are learnt; empty in the last, which has none."""
        return "" if self.in_last_stage else self.stages[self.stage]

    @property
    def in_last_stage(self) -> bool:
        """Whether the small model itself is trained."""
        return self.stage >= len(self.stages)

    def configure_model(self) -> None:
        """Load the models, and make the first stage's."""
        data = getattr(self._trainer, "datamodule", None)
        if getattr(data, "has_soft_labels", False):
            self.teacher_source = None
        super().configure_model()

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``."""
        teachers = self._teacher_shells(data)
        large, shape = self._shell(self.source.name), self.shape
        for name in self.stages:
            assert isinstance(self.start, LearnedFusion)
            target = self.start.shape_of(name, large.config, shape)
            fused = self.start.again(name, large, shape, list(range(target.num_hidden_layers or 0)))
            stage = self._rehearsal(name, fused, teachers)
            held = [*stage.models, large.requires_grad_(False)]
            yield replace(stage, models=held, optimizer=self.operator_optimizer)
            large = self._empty(target.config(large.config))
        if not self.stages:
            large = self._empty(shape.config(large.config))
        yield self._rehearsal("the small model", large, teachers)

    def why_not_sharded(self) -> str:
        """See ``PretrainedModule``."""
        return "operators need whole ones (a start without operators does not)" if self.stages else ""

    def _build(self) -> PreTrainedModel | None:
        if self._trainer is None:
            log.info("The small model is made when a Trainer brings data to measure the large one on, or a checkpoint is loaded.")
            return None
        large = self._load_large()
        if not self.in_last_stage:
            return self._begin(large)
        self._large.clear()
        small, kept = self.start.build(large, self.shape, self._rows(large.device))
        self.learnt = summary_of_kept(kept, load_config(self.source.name))
        return small

    def _load_large(self) -> PreTrainedModel:
        if not self._large:
            self._large = [load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)]
        return self._large[0]

    def _rows(self, device: torch.device) -> Rows:
        batch = self._calibration(self.start.calibration_tokens)
        if batch is None:
            raise InputError(
                "FusionCompression needs data of this suite to measure the model on: trainer.fit(module, datamodule)."
            )
        return [{name: part.to(device) for name, part in row.items()} for row in rows_of(batch)]

    def _begin(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model of the stage that comes."""
        name = self.stages[self.stage]
        log.info("Stage %d of %d: %s", self.stage + 1, len(self.stages) + 1, name)
        assert isinstance(self.start, LearnedFusion)
        fused = self.start.begin(name, model, self.shape, self._rows(model.device))
        if name == "depth":  # its weights are no longer the source's, so a checkpoint has to hold them
            self.wide = model
            self._large.clear()
            if self.hidden_weight and model.config.hidden_size != load_config(self.source.name).hidden_size:
                log.warning("hidden_weight=%s is ignored in this stage: the hidden size is another.", self.hidden_weight)
        self.centres = fused.centres
        return fused.model

    def _adopt(self, model: PreTrainedModel) -> None:
        if self.in_last_stage:
            super()._adopt(model)
            if self.shape.kept_layers:
                self._keep_layers(model)
            return
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model = model.train()

    def _keep_layers(self, model: PreTrainedModel) -> None:
        """Give what stays (first layers, embedding, last norm, head) the source's own numbers to the bit, and freeze it."""
        source = load_model(self.source.name, self.weights)  # the large model's gains may have been folded
        for own, original in zip(*(shared_parts(each, self.shape.kept_layers) for each in (model, source))):
            own.load_state_dict(original.state_dict())
            own.requires_grad_(False)

    def begin_next_stage(self) -> None:
        """Write out the small model that the operators made, and go on with it; ``TrainUntilCondition`` calls this."""
        self._leave_stage()
        self._set_up_optimizers()

    def _set_up_optimizers(self) -> None:
        self._first_step = self.trainer.global_step
        strategy = self.trainer.strategy
        strategy.setup_optimizers(self.trainer)
        if isinstance(strategy, DDPStrategy):  # its reducer knows the parameters of the stage before
            strategy.model = self
            strategy.configure_ddp()

    def _leave_stage(self) -> None:
        assert self.model is not None
        large = self.wide if self.wide is not None else self._load_large()
        self.learnt |= summarise(self.model, self.centres, len(decoder_layers(large)))
        plain = materialise(self.model)
        self.stage += 1
        self._large.clear()
        if self.in_last_stage:
            log.info("Stage %d of %d: the small model itself", self.stage + 1, len(self.stages) + 1)
            self.wide = None
        self._adopt(plain if self.in_last_stage else self._begin(plain))

    def on_fit_start(self) -> None:
        """Bring the large model to the device, and refuse strategies that split weights."""
        super().on_fit_start()
        self.check_strategy(self.trainer.strategy)
        if self._large:
            self._large[0].to(self.device)  # type: ignore[arg-type]
        if self.hidden_weight and (not self._teacher or not self.stages):
            why = "the start has no operators" if not self.stages else "stored labels leave no teacher to compare with"
            log.warning("hidden_weight=%s is ignored: %s.", self.hidden_weight, why)

    def on_train_start(self) -> None:
        """Measure the large model and the small one's start on held-out text; a run that goes on has done so."""
        super().on_train_start()
        if self.held_out:
            return
        assert self.model is not None
        here = self._teacher and self.teacher_source == self.source
        original = self._teacher[0] if here else load_model(self.source.name, self.teacher_weights)  # only for this
        self._measure({"original": original.to(self.device), "start": self.model})  # type: ignore[arg-type]
        if self.held_out and self.logger is not None:
            self.logger.log_metrics(
                {"val_perplexity": self.held_out["start"], "original_perplexity": self.held_out["original"]}, step=0
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the stage, counted from 1."""
        self.log("stage", float(self.stage + 1))

    @torch.no_grad()
    def _measure(self, models: dict[str, PreTrainedModel]) -> None:
        """Add each model's perplexity on the batches of a validation."""
        loaders = self.trainer.val_dataloaders
        if loaders is None or not self.trainer.num_val_batches:
            return
        if isinstance(self.trainer.strategy, FSDPStrategy):  # which has whole weights within a training step alone
            return
        sums = torch.zeros(len(models) + 1, dtype=torch.float64, device=self.device)
        for model in models.values():
            model.eval()
        for batch in itertools.islice(loaders, int(self.trainer.num_val_batches[0])):
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            with self.trainer.strategy.precision_plugin.val_step_context():
                found = [text_loss(model, batch, self.loss_chunk_tokens) for model in models.values()]
            sums += torch.stack([*(parts.hard.double() * parts.tokens for parts in found), sums.new_tensor(found[0].tokens)])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        for name, total in zip(models, sums):
            self.held_out[name] = math.exp(min(float(total / sums[-1]), 700.0))
            log.info("Perplexity on held-out text, %s: %.2f", name, self.held_out[name])
        if self.model is not None:
            self.model.train()

    def prepare_export(self) -> None:
        """Make the small model where training ended within a stage, or had no steps left to go on with."""
        if not self.in_last_stage:
            log.warning(
                "Training ended in stage %r: operators were learnt no longer. Give more steps, or end stages sooner with "
                "TrainUntilCondition.",
                self.stages[self.stage],
            )
        while not self.in_last_stage:
            self._leave_stage()

    def on_train_end(self) -> None:
        """Leave a plain model behind, and say what came of it."""
        if not self.in_last_stage:
            self.prepare_export()
            self._set_up_optimizers()  # for checkpoints that are saved from now on
        assert self.model is not None
        self._measure({"small model": self.model})
        if self.learnt and isinstance(self.logger, TensorBoardLogger) and self.trainer.is_global_zero and can_draw():
            self.logger.experiment.add_figure("operators", draw_operators(self.learnt))

    def write_extras(self, folder: Path) -> None:
        """Write what the operators came to into an exported folder, and a picture of it where matplotlib is there."""
        super().write_extras(folder)
        if self.learnt:
            (folder / "fusion.json").write_text(json.dumps(self.learnt) + "\n", "utf-8")
        if self.learnt and can_draw():
            draw_operators(self.learnt).savefig(folder / "fusion.png", dpi=150)

    def card_figures(self) -> dict[str, float]:
        """Return the perplexities before and after."""
        return {f"perplexity on held-out text, {name}": value for name, value in self.held_out.items()}

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states as the head reads them; see ``LanguageModel``."""
        assert self.model is not None
        return readable(self.model, super().hidden_states(batch))

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of a batch of ``SoftLabelDistillation``, with that of the hidden states while operators are learnt."""
        if not (self.hidden_weight and self.training and self._teacher) or self.in_last_stage:
            return super().loss_parts(batch)
        assert self.model is not None
        teacher = self._teacher[0]
        last = len(decoder_layers(teacher)) - 1
        behind = [*(centre - 1 for centre in self.centres[1:]), last]
        with layer_outputs(self.model) as ours, layer_outputs(teacher) as theirs:
            parts = super().loss_parts(batch)
        operators: Any = self.model.operators
        supervised = shift_labels(batch["labels"]) != -100
        distance = hidden_distance(operators.residual, ours, (theirs[place] for place in behind), supervised)
        if distance is None:  # the width stage's operator is gone
            return parts
        self.log("train_hidden", distance.detach())
        return replace(parts, loss=parts.loss + self.hidden_weight * distance)

    def configure_optimizers(self) -> Any:
        """Return the stage's optimizer, and the last one's schedule."""
        return super().configure_optimizers() if self.in_last_stage else self._new_optimizer(self.operator_optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fulgurite_fusion"] = {
            "stage": self.stage,
            "centres": self.centres,
            "first_step": self._first_step,
            "held_out": self.held_out,
            "learnt": self.learnt,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the model of the checkpoint's stage."""
        saved = checkpoint.get("fulgurite_fusion")
        if saved is None:
            raise InputError("This checkpoint is of no FusionCompression: give the one of the run that is to go on.")
        self.stage, self.centres, self._first_step = saved["stage"], saved["centres"], saved["first_step"]
        self.held_out, self.learnt = saved["held_out"], saved["learnt"]
        if self.in_last_stage:
            self.model, self.wide = None, None
            self._large.clear()
            super().on_load_checkpoint(checkpoint)
            return
        assert isinstance(self.start, LearnedFusion)
        name = self.stages[self.stage]
        if name == "depth":
            self._large.clear()
            large = load_config(self.source.name)
            config = self.start.shape_of("width", large, self.shape).config(large)
            model = self.wide = self._empty(config).to(self.device)  # type: ignore[arg-type]
        else:
            model = self._load_large()
        self._adopt(self.start.again(name, model, self.shape, self.centres))
        if self._trainer is not None:
            super().on_load_checkpoint(checkpoint)
