"""Fusion compression: operators are learnt in stages, then the small model that they made is trained freely."""

import logging
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...errors import InputError
from ..distillation.labels import LabelSettings
from ..distillation.loss import Divergence, Remainder
from ..distillation.module import SoftLabelDistillation
from ..language_model import Batch, GenerationSettings
from ..pretrained import Dtype, load_config, load_model
from .fused import FusedTable, materialise
from .shape import FusionShape
from .starts import BestSelection, LearnedFusion, Stage
from .statistics import Rows, rows_of

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

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        shape: FusionShape,
        start: BestSelection | None = None,
        teacher: str | None = None,
        selection: LabelSettings = LabelSettings(selection="full"),  # noqa: B008  (frozen)
        soft_weight: float = 0.5,
        divergence: Divergence = "forward_kl",
        remainder: Remainder = "tail_bucket",
        operator_optimizer: OptimizerCallable = torch.optim.AdamW,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        teacher_weights: Dtype = "bfloat16",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        config = load_config(source)
        self_shape = shape.resolve(config)
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
        self.shape, self.start = self_shape, start or LearnedFusion()
        self.operator_optimizer = operator_optimizer
        self.stages: list[Stage] = self.start.stages(config, self_shape)
        self.stage = 0  # the number of those that are done
        self.centres: list[int] = []
        self.wide: PreTrainedModel | None = None  # what the width stage made, frozen; part of checkpoints
        self._large: list[PreTrainedModel] = []  # in a list: a checkpoint names its source instead

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

    def _build(self) -> PreTrainedModel | None:
        if self._trainer is None:
            log.info("The small model is made when a Trainer brings data to measure the large one on, or a checkpoint is loaded.")
            return None
        large = self._load_large()
        if self.in_last_stage:
            return self.start.build(large, self.shape, self._rows())
        return self._begin(large)

    def _load_large(self) -> PreTrainedModel:
        if not self._large:
            self._large = [load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)]
        return self._large[0]

    def _rows(self) -> Rows:
        batch = self._calibration(self.start.calibration_tokens)
        if batch is None:
            raise InputError(
                "FusionCompression needs data of this suite to measure the model on: trainer.fit(module, datamodule)."
            )
        return [{name: part.to(self.device) for name, part in row.items()} for row in rows_of(batch)]

    def _begin(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model of the stage that comes."""
        name = self.stages[self.stage]
        log.info("Stage %d of %d: %s", self.stage + 1, len(self.stages) + 1, name)
        fused = self.start.begin(name, model, self.shape, self._rows())
        self.centres = fused.centres
        return fused.model

    def _adopt(self, model: PreTrainedModel) -> None:
        if self.in_last_stage:
            super()._adopt(model)
            return
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model.train()

    def begin_next_stage(self) -> None:
        """Write out the small model that the operators made, and go on with it; ``TrainUntilCondition`` calls this."""
        assert self.model is not None
        plain = materialise(self.model)
        self.stage += 1
        self._large.clear()
        if self.in_last_stage:
            log.info("Stage %d of %d: the small model itself", self.stage + 1, len(self.stages) + 1)
            self.wide = None
            self._adopt(plain)
        else:
            self.wide = plain
            self._adopt(self._begin(plain))
        self._first_step = self.trainer.global_step
        strategy = self.trainer.strategy
        strategy.setup_optimizers(self.trainer)
        if isinstance(strategy, DDPStrategy):  # its reducer knows the parameters of the stage before
            strategy.model = self
            strategy.configure_ddp()

    def on_fit_start(self) -> None:
        """Bring the large model to the device, and refuse strategies that split weights."""
        super().on_fit_start()
        if self.stages and not isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"strategy: {type(self.trainer.strategy).__name__} may split the weights, and operators need whole ones. Legal: "
                "one device, or ddp; or a start without operators."
            )
        if self._large:
            self._large[0].to(self.device)  # type: ignore[arg-type]

    def on_train_end(self) -> None:
        """Leave a plain model behind, also where training ended within a stage."""
        if not self.in_last_stage:
            log.warning(
                "Training ended in stage %r: operators were learnt no longer. Give more steps, or end stages sooner with "
                "TrainUntilCondition.",
                self.stages[self.stage],
            )
        while not self.in_last_stage:
            self.begin_next_stage()

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states as the head reads them; see ``LanguageModel``."""
        assert self.model is not None
        head: Any = self.model.get_output_embeddings()
        states = super().hidden_states(batch)
        return head.expand(states) if isinstance(head, FusedTable) else states

    def configure_optimizers(self) -> Any:
        """Return the stage's optimizer, and the last one's schedule."""
        if self.in_last_stage:
            return super().configure_optimizers()
        return self.operator_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fulgurite_fusion"] = {"stage": self.stage, "centres": self.centres, "first_step": self._first_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the model of the checkpoint's stage."""
        saved = checkpoint.get("fulgurite_fusion")
        if saved is None:
            raise InputError("This checkpoint is of no FusionCompression: give the one of the run that is to go on.")
        self.stage, self.centres, self._first_step = saved["stage"], saved["centres"], saved["first_step"]
        if self.in_last_stage:
            self.model, self.wide = None, None
            self._large.clear()
            super().on_load_checkpoint(checkpoint)
            return
        assert isinstance(self.start, LearnedFusion)
        name, model = self.stages[self.stage], self._load_large()
        if self.stage:
            config = self.start.shape_of("width", model, self.shape).config(model.config)
            model = self.wide = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        self._adopt(self.start.again(name, model, self.shape, self.centres))
        if self._trainer is not None:
            super().on_load_checkpoint(checkpoint)
