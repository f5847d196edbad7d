"""Distillation of a student from a teacher's stored or online soft labels."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from ...errors import InputError
from ..base import Rehearsal
from ..language_model import Batch, GenerationSettings, LanguageModel
from ..linear_loss import LossParts, SoftTargets, linear_log_likelihood, linear_loss, shift_labels
from ..precision import Dtype, FrozenDtype, frozen_dtype
from ..pretrained import head_weight, load_config, load_model, load_tokenizer, resolve_source
from ..student import StudentSpec
from ..tokens import tokenizer_fingerprint
from .chunks import check_chunks, chunk_loss, in_chunks
from .labels import LabelSettings, SoftLabels
from .loss import Divergence, FullVocabularyTargets, KeptLabelTargets, Remainder, check_divergence
from .teacher import teacher_labels, teacher_states

log = logging.getLogger(__name__)

_NO_LABELS = (
    "Distillation needs soft labels: use --data SoftLabelDataModule with a store, or name an online teacher with --model.teacher."
)


class SoftLabelDistillation(LanguageModel):
    """A student trained on hard labels and a teacher's distribution: ``(1 - w) CE + w T^2 D(teacher, student)``.

    The labels come with the batches (``SoftLabelDataModule``), or from ``teacher``, which reads every batch; both give
    the same numbers for the same selection. Logs ``val_kl`` (the chosen divergence) and ``val_agreement`` (share of
    tokens whose most likely token is the teacher's) beside the figures of ``LanguageModel``.

    Follows Hinton et al., arXiv 1503.02531, for the mix and the temperature; the tail bucket keeps the mass that was not
    stored as one more outcome (arXiv 2503.16870 shows why).

    Args:
        source: Model that the student is made of; see ``LanguageModel``.
        student: The smaller model to train; None trains the source itself.
        teacher: Source of an online teacher, for batches that bring no labels; None for stored labels only.
        selection: What is kept of the online teacher's distribution; ``full`` uses all of it.
        soft_weight: Share w of the divergence in the loss, 0 to 1; the cross-entropy to the text has the rest.
        divergence: ``forward_kl``, ``reverse_kl``, ``jensen_shannon``, or ``uld``, which needs no common vocabulary.
        remainder: What becomes of the mass that was not kept: ``tail_bucket``, ``text_tail`` or ``renormalize``; see
            ``KeptLabelTargets``.
        chunk_weight: With a store of another tokenizer: share of the loss on chunks of text (``chunk_loss``) beside the rest.
        chunk_temperature: Temperature of the chunks' likelihoods, 1 or more.
        third_vocabulary: With a store of another tokenizer: train the softmax over the ids alone that its labels or texts have
            (the plain form of the method); figures are over the whole vocabulary.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the student's weights in memory.
        teacher_weights: Type of the online teacher's weights in memory.
        gradient_checkpointing: Compute activations again in the backward pass.
        compile: Compile the student's transformer with ``torch.compile``.
        attn_implementation: Attention function of ``transformers``; its own choice when None.
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.
        generation: How ``predict`` writes text.

    Raises:
        InputError: If a name is unknown, a number out of range, or the teacher has another tokenizer.
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        student: StudentSpec | None = None,
        teacher: str | None = None,
        selection: LabelSettings = LabelSettings(),  # noqa: B008  (frozen)
        soft_weight: float = 0.5,
        divergence: Divergence = "forward_kl",
        remainder: Remainder = "tail_bucket",
        chunk_weight: float = 0.0,
        chunk_temperature: float = 100.0,
        third_vocabulary: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        teacher_weights: FrozenDtype = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        check_divergence(divergence, remainder, selection if teacher is not None else None)
        if not 0 <= soft_weight <= 1:
            raise InputError(f"soft_weight={soft_weight} is no share of the loss. Legal: 0 to 1.")
        check_chunks(chunk_weight, chunk_temperature)
        for name, value in (("chunk_weight", chunk_weight), ("third_vocabulary", third_vocabulary)):
            if value and teacher is not None:
                raise InputError(f"{name}={value} is for a store of another tokenizer, not for an online teacher. Leave one out.")
        selection.check()
        super().__init__(
            source,
            student=student,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            weights=weights,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            attn_implementation=attn_implementation,
            loss_chunk_tokens=loss_chunk_tokens,
            generation=generation,
        )
        self.teacher_source = None if teacher is None else resolve_source(teacher)
        self.selection = selection
        self.soft_weight = soft_weight
        self.divergence: Divergence = divergence
        self.remainder: Remainder = remainder
        self.chunk_weight, self.chunk_temperature = chunk_weight, chunk_temperature
        self.third_vocabulary = third_vocabulary
        self.teacher_weights = frozen_dtype(teacher_weights)
        self._label_vocabulary: Tensor | None = None
        self._teacher: list[PreTrainedModel] = []  # in a list: no part of checkpoints, of DDP or of the optimizer
        self.mean_kl, self.mean_agreement = (MeanMetric(nan_strategy=math.nan) for _ in range(2))

    def configure_model(self) -> None:
        """Load the student, and the online teacher where one is named."""
        if self.teacher_source is not None and not self._teacher:
            name = self.teacher_source.name
            if tokenizer_fingerprint(load_tokenizer(name)) != tokenizer_fingerprint(self.tokenizer):
                raise InputError(
                    f"teacher={name!r} has another tokenizer than source={self.source.name!r}: their vocabularies cannot "
                    "be compared token by token. Give a teacher with the student's tokenizer."
                )
            teacher = load_model(name, self.teacher_weights, attn_implementation=self.attn_implementation)
            self.selection.check(head_weight(teacher).shape[0])
            self._teacher.append(teacher.requires_grad_(False))
        super().configure_model()
        if self.model is not None and self._teacher:
            self._check_vocabulary(head_weight(self.model).shape[0], head_weight(self._teacher[0]).shape[0], "the teacher")

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``; a teacher is held where labels are not stored."""
        yield self._rehearsal("training", self._shell(self.source.name, self.student), self._teacher_shells(data))

    def _teacher_shells(self, data: Any) -> list[PreTrainedModel]:
        if self.teacher_source is None or getattr(data, "has_soft_labels", False):
            return []
        return [self._shell(self.teacher_source.name, weights=self.teacher_weights)]

    def _check_vocabulary(self, ours: int, size: int, whose: str) -> None:
        if size != ours:
            raise InputError(
                f"The head of source={self.source.name!r} has {ours} rows, that of {whose} {size}: their distributions are not "
                "over the same ids. Pad the smaller embedding (resize_token_embeddings) and save the model again; labels of a "
                "file can be imported again with --vocabulary."
            )

    def soft_targets(self, batch: Batch) -> SoftTargets | None:
        """Return the teacher's side of a batch: its stored labels, else the online teacher's, else None."""
        targets = shift_labels(batch["labels"])
        text = targets[targets != -100]
        if "soft_labels" in batch:
            labels = batch["soft_labels"]
            # A teacher of another tokenizer says nothing of the text's own token: with it, there is no divergence to report.
            split = self.training or labels.chunk_tokens is None or self.remainder != "text_tail"
            return KeptLabelTargets(labels, self.divergence, self.remainder if split else "tail_bucket", text)
        if not self._teacher:
            return None
        teacher = self._teacher[0]
        if teacher.device != self.device:
            self._teacher[0] = teacher = teacher.to(self.device)  # type: ignore[arg-type]
        if self.selection.selection == "full":
            return FullVocabularyTargets(
                teacher_states(teacher, batch), head_weight(teacher), self.divergence, self.selection.temperature
            )
        with torch.autocast(self.device.type, enabled=False):  # as in capture
            labels = teacher_labels(teacher, batch, self.selection)
        return KeptLabelTargets(labels, self.divergence, self.remainder, text)

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of a batch of ``LanguageModel``, with ``soft_labels`` of its supervised tokens if stored."""
        assert self.model is not None
        targets = shift_labels(batch["labels"])
        supervised = targets != -100
        soft_targets = self.soft_targets(batch)
        if soft_targets is None and self.training and self.soft_weight:  # data of others, which nothing was known of before
            raise InputError(_NO_LABELS)
        states, weight, labels = self.hidden_states(batch)[supervised], head_weight(self.model), targets[supervised]
        restricted = self._label_vocabulary is not None and self.training
        if restricted:
            weight, labels, soft_targets = self._in_third_vocabulary(weight, labels, soft_targets)
        parts = linear_loss(
            states,
            weight,
            labels,
            soft_targets=soft_targets,
            soft_weight=0.0 if soft_targets is None else self.soft_weight,
            chunk_tokens=self.loss_chunk_tokens,
        )
        soft_labels = batch.get("soft_labels")
        if self.chunk_weight and self.training and soft_labels is not None and soft_labels.chunk_tokens is not None:
            parts = self._with_chunks(parts, states, weight, labels, soft_labels)
        return parts

    def _in_third_vocabulary(
        self, weight: Tensor, labels: Tensor, soft_targets: SoftTargets | None
    ) -> tuple[Tensor, Tensor, SoftTargets | None]:
        """Return head, labels and targets over the third vocabulary."""
        assert self._label_vocabulary is not None
        vocabulary = self._label_vocabulary = self._label_vocabulary.to(weight.device)
        if isinstance(soft_targets, KeptLabelTargets):
            ids = soft_targets.labels.ids
            places = torch.searchsorted(vocabulary, ids.long().clamp(min=0)).int().masked_fill(ids < 0, -1)
            text = None if soft_targets.text is None else torch.searchsorted(vocabulary, soft_targets.text)
            soft_targets = replace(soft_targets, labels=replace(soft_targets.labels, ids=places), text=text)
        return weight[vocabulary], torch.searchsorted(vocabulary, labels), soft_targets

    def _with_chunks(
        self, parts: LossParts, states: Tensor, weight: Tensor, labels: Tensor, soft_labels: SoftLabels
    ) -> LossParts:
        """Add the loss on chunks, a mean over all tokens as the others are."""
        within = in_chunks(soft_labels)
        if not within.any():
            return parts
        likelihood = linear_log_likelihood(states[within], weight, labels[within], chunk_tokens=self.loss_chunk_tokens)
        chunks = chunk_loss(likelihood, soft_labels, self.chunk_temperature) / max(parts.tokens, 1)
        return replace(parts, loss=parts.loss + self.chunk_weight * chunks)

    def setup(self, stage: str) -> None:
        """Check, before the student is loaded, that the stores' labels go with the loss.

        Raises:
            InputError: If they do not.
        """
        data = getattr(self.trainer, "datamodule", None)
        for name in ("store", "val_store"):
            store = getattr(data, name, None)
            if store is None:
                continue
            check_divergence(self.divergence, self.remainder, store.header.settings)
            if self.chunk_weight and store.header.settings.temperature != 1.0:
                raise InputError(
                    f"chunk_weight={self.chunk_weight} with labels of temperature {store.header.settings.temperature}: the "
                    "likelihood of a text is that of temperature 1. Use chunk_weight=0, or capture with temperature 1."
                )
            self._check_alignment(data, store.header.vocabulary)
        super().setup(stage)

    def _check_alignment(self, data: Any, vocabulary: int) -> None:
        """Check that the loss reads the labels that the store gives: its own ids, the student's, or none."""
        alignment = getattr(data, "alignment", None)
        if alignment is None and self.divergence != "uld":
            self._check_vocabulary(load_config(self.source.name).get_text_config().vocab_size, vocabulary, "the store's teacher")
        if alignment == "positions" and self.divergence != "uld":
            raise InputError(
                f"divergence={self.divergence!r} compares tokens, but data.alignment='positions' leaves the teacher's ids as "
                "they are. Use data.alignment='vocabulary', or divergence='uld'."
            )
        if self.chunk_weight and alignment is None:
            raise InputError(
                f"chunk_weight={self.chunk_weight} is for a store of another tokenizer: data.alignment is null here."
            )
        if self.third_vocabulary and alignment != "vocabulary":
            raise InputError(f"third_vocabulary=true is for a store with data.alignment='vocabulary', not {alignment!r}.")

    def on_fit_start(self) -> None:
        """Refuse to train on a loss whose half would be missing.

        Raises:
            InputError: If neither the data nor an online teacher gives soft labels.
        """
        data = getattr(self.trainer, "datamodule", None)
        stored = getattr(data, "has_soft_labels", None)
        if self.teacher_source is None and stored is False:
            raise InputError(_NO_LABELS)
        if stored and self.selection != LabelSettings():
            log.warning("model.selection is ignored: the labels were selected when they were stored.")
        if self.third_vocabulary and data is not None:
            self._label_vocabulary = torch.from_numpy(data.label_vocabulary())

    def _log_training(self, parts: LossParts) -> None:
        super()._log_training(parts)
        self.log("train_kl", parts.soft, prog_bar=True)

    def _evaluate(self, batch: Batch) -> LossParts:
        parts = super()._evaluate(batch)
        labelled = parts.tokens
        if "soft_labels" in batch:  # with another tokenizer, some tokens have none, and count as 0
            labelled = int((batch["soft_labels"].counts > 0).sum())
        if ("soft_labels" in batch or self._teacher) and labelled:
            self.mean_kl.update(parts.soft * parts.tokens / labelled, labelled)
            self.mean_agreement.update(parts.agreement * parts.tokens / labelled, labelled)
        return parts

    def _log_evaluation(self, stage: str) -> None:
        # The same on every rank, or some would wait for others in compute().
        data = getattr(self.trainer, "datamodule", None)
        if self.teacher_source is not None or getattr(data, "val_has_soft_labels", self.mean_kl.update_called):
            self.log(f"{stage}_kl", self.mean_kl.compute())
            if getattr(data, "alignment", None) != "positions":  # its ids are not the student's
                self.log(f"{stage}_agreement", self.mean_agreement.compute())
        super()._log_evaluation(stage)
