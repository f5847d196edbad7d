"""Distillation of an emulator, by the owner, while what a party will hold stays as it is."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from ...errors import InputError
from ..base import Rehearsal
from ..distillation.labels import LabelSettings
from ..distillation.module import SoftLabelDistillation
from ..language_model import Batch
from ..linear_loss import LossParts, shift_labels
from ..precision import Dtype, FrozenDtype
from ..pretrained import load_config, load_model, load_tokenizer, model_fingerprint
from ..span_attention import refuse_plan
from ..student import decoder_layers, keep_layers, layer_outputs, shared_parts
from ..tokens import tokenizer_fingerprint
from .emulator import EmulatorManifest, EmulatorSpec, digest_of, fused_layers


class EmulatorDistillation(SoftLabelDistillation):
    """An emulator made of some of a model's layers, or of fused ones, and distilled from the model.

    The embedding, the first ``emulator.identical`` layers and the head stay the model's to the bit; the other layers are trained,
    on the text, on the model's distribution, and on its hidden states: ``(1 - w) CE + w KL + h MSE``, where MSE is the mean over
    the layers of the squared distance to the large model's state at the same depth, as a share of that state's square. The
    exported folder has a manifest, ``emulator.json``. With ``trainer.max_steps: 0`` nothing is trained.

    Follows Offsite-Tuning (Xiao et al., arXiv 2302.04870) for the emulator and its distillation.

    Args:
        source: The owner's model; see ``LanguageModel``.
        emulator: Which of its layers are kept.
        hidden_weight: Weight h of the distance between hidden states; not used with stored soft labels.
        soft_weight: Share w of the divergence in the loss, 0 to 1; the cross-entropy to the text has the rest.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the emulator's weights in memory.
        teacher_weights: Type of the model's weights in memory while it teaches.
        gradient_checkpointing: Compute activations again in the backward pass.
        attn_implementation: Attention function of ``transformers``; its own choice when None.
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.

    Raises:
        InputError: If the emulator cannot be made of the model, or a number is out of range, before weights are read.
    """

    def __init__(
        self,
        source: str = "package:smollm2-135m-instruct",
        *,
        emulator: EmulatorSpec | None = None,
        hidden_weight: float = 1.0,
        soft_weight: float = 0.5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: Dtype = "float32",
        teacher_weights: FrozenDtype = "auto",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        if hidden_weight < 0:
            raise InputError(f"hidden_weight={hidden_weight} is below 0. Legal: 0 or more.")
        spec = emulator or EmulatorSpec()
        config = load_config(source)
        refuse_plan(config)
        spec.check(config.get_text_config().num_hidden_layers)
        if spec.fused is not None:
            fused_layers(spec.fused)
        super().__init__(
            source,
            teacher=source,
            selection=LabelSettings(selection="full"),
            soft_weight=soft_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            weights=weights,
            teacher_weights=teacher_weights,
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
            loss_chunk_tokens=loss_chunk_tokens,
        )
        self.emulator, self.hidden_weight = spec, hidden_weight
        self.stands_for: list[int] = []
        self._whole: tuple[str, int] = ("", 0)  # fingerprint and layers of the owner's model

    def configure_model(self) -> None:
        """Make the emulator, and load the model that teaches it unless stored labels do."""
        if getattr(getattr(self._trainer, "datamodule", None), "has_soft_labels", False):
            self.teacher_source = None
        super().configure_model()

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``."""
        if self.emulator.fused is not None:
            model = self._shell(self.emulator.fused)
        else:
            model = self._shell(self.source.name)
            layers = self.emulator.layers
            keep_layers(model, layers if isinstance(layers, list) else list(range(layers)))
        self._freeze(model)
        yield self._rehearsal("training", model, self._teacher_shells(data))

    def _build(self) -> PreTrainedModel | None:
        if self._trainer is None and self.emulator.needs_calibration:
            return None  # made when data comes, or a checkpoint is loaded
        model = load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)
        self._whole = model_fingerprint(model), len(decoder_layers(model))
        if self.emulator.fused is not None:
            return self._fused(model, self.emulator.fused)
        calibration = self._calibration(self.emulator.calibration_tokens) if self.emulator.needs_calibration else None
        self.stands_for = self.emulator.choose(model, calibration)
        keep_layers(model, self.stands_for)
        return model

    def _fused(self, model: PreTrainedModel, folder: str) -> PreTrainedModel:
        """Return a fused model, after it was compared with the owner's where the two have to be the same."""
        fused = load_model(folder, self.weights, attn_implementation=self.attn_implementation)
        self.stands_for = fused_layers(folder)
        pairs = zip(shared_parts(fused, self.emulator.identical), shared_parts(model, self.emulator.identical))
        same = len(decoder_layers(fused)) > self.emulator.identical and all(
            one.state_dict().keys() == other.state_dict().keys()
            and all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
            for one, other in pairs
        )
        if not same or tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer_fingerprint(self.tokenizer):
            raise InputError(
                f"emulator.fused={folder!r}: its tokenizer, embedding, head, last norm or first {self.emulator.identical} "
                f"layers are not those of source={self.source.name!r}. Fuse it with shape.kept_layers={self.emulator.identical}, "
                "and export it in the type of the model's weights (ExportPretrained's dtype)."
            )
        return fused

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model)
        self._freeze(model)

    def _freeze(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        for layer in decoder_layers(model)[self.emulator.identical :]:
            layer.requires_grad_(True)

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of ``SoftLabelDistillation``, in training with the distance between hidden states."""
        if not (self.hidden_weight and self.training and self._teacher):
            return super().loss_parts(batch)
        assert self.model is not None
        with layer_outputs(self.model) as ours, layer_outputs(self._teacher[0]) as theirs:
            parts = super().loss_parts(batch)
        behind = [*(layer - 1 for layer in self.stands_for[1:]), len(theirs) - 1]
        supervised = shift_labels(batch["labels"]) != -100
        distances = []
        for states, place in list(zip(ours, behind))[self.emulator.identical :]:
            own, target = states[supervised].float(), theirs[place][supervised].float()
            distances.append(((own - target).square().mean(-1) / target.square().mean(-1)).mean())
        distance = torch.stack(distances).mean()
        self.log("train_hidden", distance.detach())
        return replace(parts, loss=parts.loss + self.hidden_weight * distance)

    def write_extras(self, folder: Path) -> None:
        """Write the manifest into an exported folder."""
        super().write_extras(folder)
        EmulatorManifest(
            model=self._whole[0],
            layers=self._whole[1],
            stands_for=tuple(self.stands_for),
            identical=self.emulator.identical,
            title=self.source.title,
            licence=self.source.licence,
            files={file.name: digest_of(file) for file in sorted(folder.iterdir())},
        ).save(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the emulator stands for."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fulgurite_emulator"] = {"stands_for": self.stands_for, "whole": list(self._whole)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's layers."""
        saved = checkpoint.get("fulgurite_emulator")
        if saved is None:
            raise InputError("This checkpoint is of no EmulatorDistillation: give the one of the run that is to go on.")
        self.stands_for, self._whole = saved["stands_for"], tuple(saved["whole"])
        super().on_load_checkpoint(checkpoint)
