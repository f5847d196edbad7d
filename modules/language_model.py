"""Plain training and fine-tuning of a causal language model; the base of the suite's other systems."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import BinaryCalibrationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..errors import InputError
from .base import PretrainedModule, Rehearsal
from .linear_loss import LossParts, linear_loss, shift_labels
from .precision import Dtype
from .pretrained import head_weight, load_config, load_model
from .span_attention import NOTICE, adopt_plan, plan_of
from .student import LayerChoice, StudentSpec, build_student
from .tokens import token_byte_lengths

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass
class GenerationSettings:
    """How ``predict`` writes text.

    Args:
        max_new_tokens: Tokens to write after each prompt.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature.
        top_p: Tokens are drawn from the smallest set with this probability mass, in (0, 1].
        prompt_tokens: Of a block without a prompt of its own, this many first tokens are the prompt.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    prompt_tokens: int = 32

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments for ``transformers``' ``generate``."""
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} writes nothing. Legal: 1 or more.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature} is below 0. Legal: 0 (greedy) or above.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is no probability mass. Legal: above 0, up to 1.")
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            # Without top_k, the model's own or that of transformers cuts the distribution.
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return arguments


class LanguageModel(PretrainedModule):
    """A causal language model trained on the next token of packed text or of responses.

    Validation and test log, weighted by tokens over all ranks: ``val_loss`` (nats per token), ``val_perplexity``,
    ``val_bits_per_byte``, which compares models with different tokenizers, and ``val_calibration_error``: the mean distance
    between the probability of the most likely token and how often it is right, over 15 bins of that probability (expected
    calibration error, Guo et al., arXiv 1706.04599).

    Args:
        source: Model to start from: ``package:smollm2-135m-instruct``, a folder, a ``.gguf`` file, a hub id,
            ``random:tiny``.
        student: Train a smaller student made of this model instead of the model itself.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the weights in memory; train ``float32`` with ``trainer.precision: auto``.
        gradient_checkpointing: Compute activations again in the backward pass, which saves memory for time.
        compile: Compile the transformer with ``torch.compile``.
        attn_implementation: Attention function of ``transformers`` (``sdpa``, ``eager``, ``flash_attention_2``).
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.
        generation: How ``predict`` writes text.

    Raises:
        InputError: If the source is unknown, or the student does not fit it, before weights are read.

    Example:
        >>> model = LanguageModel("random:tiny")
        >>> model.configure_model()
        >>> model.model.config.num_hidden_layers
        4
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        student: StudentSpec | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        super().__init__(source, optimizer=optimizer, lr_scheduler=lr_scheduler, weights=weights)
        if loss_chunk_tokens is not None and loss_chunk_tokens < 1:
            raise InputError(f"loss_chunk_tokens={loss_chunk_tokens} holds no token. Legal: 1 or more.")
        self.student = student
        if student is not None:
            student.check(load_config(source))
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_transformer = compile
        self.attn_implementation = attn_implementation
        self.loss_chunk_tokens = loss_chunk_tokens
        self.generation = generation or GenerationSettings()
        self.generation.kwargs()
        self.model: PreTrainedModel | None = None
        self._byte_lengths: Tensor | None = None
        # Of validation or test. A loss that is no number is not hidden.
        self.mean_loss, self.token_count, self.byte_count = MeanMetric(nan_strategy=math.nan), SumMetric(), SumMetric()
        # Of the event "the most likely token is right", whose probability is the confidence.
        self.calibration_error = BinaryCalibrationError(n_bins=15, validate_args=False)

    def configure_model(self) -> None:
        """Load the weights, and make the student of them."""
        if self.model is None and (model := self._build()) is not None:
            self._adopt(model)

    def _build(self) -> PreTrainedModel | None:
        """Return the model to train, or None where it cannot be made yet."""
        if self._trainer is None and self.student is not None and self.student.needs_calibration:
            # load_from_checkpoint asks too early, and brings the student's config itself.
            log.info("The student is made when a Trainer brings data to choose its layers by, or a checkpoint is loaded.")
            return None
        model = load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)
        if self.student is None:
            return model
        calibration = self._calibration(self.student.calibration_tokens) if self.student.needs_calibration else None
        return build_student(model, self.student, calibration)

    def _adopt(self, model: PreTrainedModel) -> None:
        head_weight(model)
        adopt_plan(model)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model = model.train()
        if self.compile_transformer:
            model.base_model.compile()

    def _calibration(self, tokens: int) -> Batch | None:
        """Return a batch of the first training sequences with at least so many tokens, where the data has one."""
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "calibration_batch"):
            return None
        return datamodule.calibration_batch(tokens)

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``."""
        yield self._rehearsal("training", self._shell(self.source.name, self.student), [])

    def _shell(self, source: str, student: StudentSpec | None = None, weights: Dtype | None = None) -> PreTrainedModel:
        """Return a model of a source's config, or its student, without the source's numbers."""
        model = self._empty(load_config(source), weights)
        if student is None:
            return model
        keep = student.keep_layers
        if isinstance(keep, LayerChoice):  # which ones makes no difference
            student = replace(student, keep_layers=list(range(keep.count)))
        return build_student(model, student)

    def _empty(self, config: Any, weights: Dtype | None = None) -> PreTrainedModel:
        """Return a model of a config, whose numbers are yet to come."""
        dtype = getattr(torch, weights or self.weights)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attn_implementation)

    def _rehearsal(self, name: str, model: PreTrainedModel, teachers: list[PreTrainedModel]) -> Rehearsal:
        """Return a stage that trains a model, with teachers."""
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        held: list[Any] = [model.train(), *(teacher.requires_grad_(False) for teacher in teachers)]
        read: Any = model.base_model
        head = head_weight(model)
        return Rehearsal(
            name,
            held,
            lambda ids: read(input_ids=ids, use_cache=False)[0],
            self.optimizer,
            len(head),
            head.requires_grad,
            teachers,
        )

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states [batch, length, hidden size] of a packed or right-padded batch.

        The model is called without a cache and without an attention mask: with either, ``transformers`` ignores that
        ``position_ids`` restart with each packed document. Right padding needs no mask under causal attention.
        """
        assert self.model is not None
        return self.model.base_model(
            input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False
        ).last_hidden_state

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of a batch: ``input_ids``, ``labels`` and ``position_ids``, all int64 [batch, length]."""
        targets = shift_labels(batch["labels"])
        return self._loss_of_states(self.hidden_states(batch), targets, targets != -100)

    def _loss_of_states(self, states: Tensor, targets: Tensor, supervised: Tensor) -> LossParts:
        assert self.model is not None
        return linear_loss(
            states[supervised],
            head_weight(self.model),
            targets[supervised],
            chunk_tokens=self.loss_chunk_tokens,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        parts = self.loss_parts(batch)
        self._log_training(parts)
        return parts.loss

    def _log_training(self, parts: LossParts) -> None:
        self.log("train_loss", parts.hard, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_evaluation("test")

    def _evaluate(self, batch: Batch) -> LossParts:
        parts = self.loss_parts(batch)
        targets = shift_labels(batch["labels"])
        if self._byte_lengths is None:
            self._byte_lengths = token_byte_lengths(self.tokenizer).to(targets.device)
        self.mean_loss.update(parts.hard, parts.tokens)
        self.token_count.update(parts.tokens)
        self.byte_count.update(self._byte_lengths[targets[targets != -100]].sum())
        self.calibration_error.update(parts.confidence, parts.correct)
        return parts

    def loss_is_of_text(self) -> bool:
        """Return whether the loss in an evaluation is that of all supervised tokens, so that there is a perplexity."""
        return True

    def _log_evaluation(self, stage: str) -> None:
        loss, tokens, size = (float(metric.compute()) for metric in (self.mean_loss, self.token_count, self.byte_count))
        self.log(f"{stage}_loss", loss, prog_bar=True)
        if self.loss_is_of_text():
            self.log(f"{stage}_perplexity", math.exp(min(loss, 700.0)))
            self.log(f"{stage}_bits_per_byte", loss * tokens / max(size, 1) / math.log(2))
        self.log(f"{stage}_calibration_error", float(self.calibration_error.compute()))
        for module in self.children():
            if isinstance(module, Metric):
                module.reset()

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Write a text after each prompt of a batch.

        Args:
            batch: Left-padded prompts ``input_ids`` with ``attention_mask``, or blocks of text, [batch, length].
            batch_idx: Not used.
            dataloader_idx: Not used.

        Returns:
            ``prompt`` and ``text`` of every row.
        """
        assert self.model is not None
        prompts, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is None:
            prompts = prompts[:, : self.generation.prompt_tokens]
            places = torch.arange(prompts.shape[1], device=prompts.device)
            padding = (len(places) - batch["lengths"]).clamp(min=0)[:, None] if "lengths" in batch else 0
            prompts = prompts.gather(1, ((places - padding) % len(places)).expand_as(prompts))  # from the right to the left
            mask = (places >= padding).expand_as(prompts).long()
        texts = self.tokenizer.batch_decode(self._written(prompts, mask), skip_special_tokens=True)
        asked = self.tokenizer.batch_decode([row[own.bool()] for row, own in zip(prompts, mask)], skip_special_tokens=True)
        return [{"prompt": prompt, "text": text} for prompt, text in zip(asked, texts)]

    def _written(self, prompts: Tensor, mask: Tensor) -> Tensor:
        """Return the ids that follow left-padded prompts [batch, tokens written]."""
        assert self.model is not None
        written = self.model.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=mask,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            **self.generation.kwargs(),
        )
        return written[:, prompts.shape[1] :]

    def card_notice(self) -> str:
        """Return what a reader of the model card must know first; nothing for a model that runs everywhere as it is."""
        return NOTICE if self.model is not None and plan_of(self.model.config) is not None else ""

    def prepare_export(self) -> None:
        """Give ``model`` the form in which it is exported; called at the end of ``fit``, also where no step was left to train."""

    def write_extras(self, folder: Path) -> None:
        """Write into an exported folder what the method adds to it.

        Args:
            folder: It holds model, tokenizer and config already.
        """
        plan = None if self.model is None else plan_of(self.model.config)
        if plan is not None:
            plan.save(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the small model's config, so that the checkpoint can be read without the large model."""
        if self.model is not None:
            checkpoint["fulgurite_config"] = json.loads(self.model.config.to_json_string(use_diff=False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the model at hand is of the checkpoint's shape; ``load_from_checkpoint`` builds the checkpoint's own.

        Raises:
            InputError: If it is a checkpoint of another model.
        """
        saved = checkpoint.get("fulgurite_config")
        if saved is None:
            raise InputError("This checkpoint holds no model config: it was not written by a fulgurite system.")
        if self.model is None or self._trainer is None:
            config = AutoConfig.for_model(saved["model_type"]).from_dict(saved)
            self._adopt(self._empty(config))
            return
        if "state_dict" not in checkpoint:  # FSDP has compared and loaded it
            return
        ours = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if wrong:
            name = wrong[0]
            raise InputError(
                f"The checkpoint is of another model: {len(wrong)} of its tensors differ, {name} is {theirs.get(name)} "
                f"there and {ours.get(name)} in source={self.source.name!r}. Give the source and student of the run "
                "that wrote it."
            )
