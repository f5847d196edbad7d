"""Offsite prefix tuning, a party's side: a prefix is learnt on an emulator, plugged in, or learnt through a split model."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from ...errors import InputError
from ..base import Rehearsal
from ..language_model import Batch, GenerationSettings, LanguageModel
from ..linear_loss import LossParts, shift_labels
from ..precision import FrozenDtype, frozen_dtype
from ..pretrained import head_weight, load_model, model_fingerprint
from .choices import Choices
from .client import OwnerAccess
from .emulator import MANIFEST, EmulatorManifest
from .owner import HeadRequest
from .prefix import LayerMap, Prefix, PrefixSettings, StandsFor, behind_prefix, carried_over, plugged_in
from .remote import Owner, OwnersHead, OwnersLayers, split_model

log = logging.getLogger(__name__)

Phase = Literal["emulator", "plug_in", "split"]
_SAMPLED_TOP = 50  # ids that are asked of the owner's head where the next token is drawn


class OffsitePrefixTuning(LanguageModel):
    """A prefix for a model whose weights stay as they are, and stay with their owner.

    ``phase: emulator`` learns it on a model at hand, the owner's emulator. ``phase: plug_in`` puts it into the owner's model, for
    whoever has that, to validate and to predict. ``phase: split`` validates, predicts and goes on learning through the owner's
    layers over the network; the party holds embedding, first layers and head, all of them from the emulator's folder. Every
    example is read as one text behind the prefix. With ``candidates``, ``val_accuracy`` is logged: how often the token by which
    the right answer is told from the others is the most likely one among theirs.

    Prefixes are learnt as in P-tuning v2 (arXiv 2110.07602) or prefix tuning (arXiv 2101.00190); emulator and plug-in follow
    Offsite-Tuning (arXiv 2302.04870).

    Args:
        source: The emulator's folder; the owner's model for ``plug_in``. For ``emulator``, any model will do.
        phase: What is done, see above.
        prefix: What a new prefix is; None for none, to see what the model does by itself.
        start: Folder of a prefix to go on with, in place of a new one; one of an emulator is carried over.
        text: Text that a new prefix begins as; None takes random tokens.
        layer_map: How an emulator's prefix is carried over, see ``carried_over``.
        owner: How the owner is reached, for ``split``.
        head: Who turns states into logits in ``split``: the ``party``, or the ``owner``, who then gives the logits of supervised
            positions, and in generation the most likely next tokens.
        prefix_layers: Who gets the rows of the owner's layers in ``split``: the ``owner``, once for an optimizer step; or
            nobody, and the prefix has rows in the ``party``'s layers only.
        noise: In ``split``, deviation of Gaussian noise on the states that are sent, as a share of each token's root mean square:
            harder to read for the owner, and for its layers.
        send_labels: With ``head: owner``, let the owner compute the loss from the labels, which saves bytes. It could read them
            from the gradients, too.
        candidates: Answers to choose from, as they stand in the rows; behind the tokens with which all begin, if any, each has
            another one. With ``head: owner``, only the logits of these are asked.
        optimizer: Optimizer, given its parameters.
        lr_scheduler: Learning-rate schedule, stepped with every optimizer step; None keeps the rate.
        weights: Type of the frozen weights, ``auto`` is bfloat16 where that is fast; the prefix is learnt in float32.
        gradient_checkpointing: Compute activations again in the backward pass.
        attn_implementation: Attention function of ``transformers``; its own choice when None.
        loss_chunk_tokens: Tokens whose logits exist at the same time in the loss; None takes 64 on a CPU, 1024 elsewhere.
        generation: How ``predict`` writes text.

    Raises:
        InputError: If settings contradict each other, or a file is missing, before weights are read.
    """

    def __init__(
        self,
        source: str,
        *,
        phase: Phase = "emulator",
        prefix: PrefixSettings | None = PrefixSettings(),  # noqa: B008  (frozen)
        start: str | None = None,
        text: str | None = None,
        layer_map: LayerMap = "kept",
        owner: OwnerAccess | None = None,
        head: Literal["party", "owner"] = "party",
        prefix_layers: Literal["party", "owner"] = "owner",
        noise: float = 0.0,
        send_labels: bool = False,
        candidates: list[str] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weights: FrozenDtype = "auto",
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        loss_chunk_tokens: int | None = None,
        generation: GenerationSettings | None = None,
    ) -> None:
        super().__init__(
            source,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            weights=frozen_dtype(weights),
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
            loss_chunk_tokens=loss_chunk_tokens,
            generation=generation,
        )
        for name, value, usual in (
            ("head", head, "party"),
            ("prefix_layers", prefix_layers, "owner"),
            ("owner", owner, None),
            ("noise", noise, 0.0),
        ):
            if phase != "split" and value != usual:
                raise InputError(f"{name}={value!r} is for phase: split; the phase is {phase!r}. Leave it out.")
        if noise < 0:
            raise InputError(f"noise={noise} is below 0. Legal: 0 or more.")
        if send_labels and head != "owner":
            raise InputError("send_labels=true is for head: owner: the loss is computed where the head is. Leave it out.")
        if candidates is not None and len(set(candidates)) < 2:
            raise InputError(f"candidates={candidates} leaves nothing to choose. Give two or more.")
        if text is not None and (start is not None or prefix is None):
            raise InputError("text is what a new prefix begins as; here is none. Leave it out.")
        # The emulator says, to begin with, whether all its files are those that the owner made.
        self.manifest = EmulatorManifest.load(Path(source)) if (Path(source) / MANIFEST).is_file() else None
        if phase == "split" and self.manifest is None:
            raise InputError(f"source={source!r} has no {MANIFEST}. For phase: split, give the folder of the owner's emulator.")
        if start is not None and not (Path(start) / "prefix.json").is_file():
            raise InputError(f"start={start!r} is no prefix: it has no prefix.json.")
        self.phase: Phase = phase
        self.prefix_settings, self.start, self.text, self.layer_map = prefix, start, text, layer_map
        self.access, self.head, self.prefix_layers, self.send_labels = owner, head, prefix_layers, send_labels
        self.candidates, self.noise = candidates, noise
        self.prefix: Prefix | None = None
        self.owner: Owner | None = None
        """Set before the model is configured, this owner is taken instead of one over the network."""
        self.cut: int | None = None  # first layer of the owner in a split; None takes the network owner's own
        self._owners: OwnersLayers | None = None
        self._plug = ExitStack()
        self.fingerprint = ""
        """Of the model that the prefix is for."""
        self._choices: Choices | None = None
        self.accuracy = MeanMetric()

    @property
    def length(self) -> int:
        """Virtual positions before every text."""
        return 0 if self.prefix is None else self.prefix.settings.length

    def _build(self) -> PreTrainedModel:
        if self.phase == "split":
            self._meet_owner()
        self._choices = None if self.candidates is None else Choices(self.candidates, self.tokenizer)
        model = load_model(self.source.name, self.weights, attn_implementation=self.attn_implementation)
        own = model_fingerprint(model)
        self.fingerprint = self.manifest.model if self.phase == "split" and self.manifest is not None else own
        if self.start is not None:
            self.prefix = Prefix.load(Path(self.start), self.fingerprint, self.layer_map)
        elif self.prefix_settings is not None:
            self.prefix = self._new_prefix(model, self.prefix_settings)
        return model

    def _check_answers(self, data: Any) -> None:
        """Refuse rows whose answer is none of the candidates, before weights are read."""
        if self.candidates is None:
            return
        sets = [found for found in (getattr(data, "train_set", None), getattr(data, "val_set", None)) if found is not None]
        answers = (row["labels"][row["labels"] != -100] for rows in sets for row in rows if "labels" in row)
        Choices(self.candidates, self.tokenizer).check(answers)

    def rehearsals(self, data: Any) -> Iterator[Rehearsal]:
        """See ``PretrainedModule``; of a split, what the party holds and the owner computes."""
        model = self._shell(self.source.name).requires_grad_(False)
        stage = self._rehearsal("training", model, [])
        settings = self.prefix_settings or PrefixSettings()
        prefix = Prefix.random(model, settings)
        stage.models.append(prefix)
        with plugged_in(model, prefix):
            padding = settings.length
            yield replace(stage, read=lambda ids: stage.read(torch.cat([ids[:, :1].expand(-1, padding), ids], dim=1)))

    def _meet_owner(self) -> None:
        assert self.manifest is not None
        manifest = self.manifest
        if self.owner is None:
            if self.access is None:
                raise InputError("phase: split needs the owner's address, a token and a certificate (model.owner).")
            client = self.access.client()
            told = client.health()
            if told["model"] != manifest.model or told["layers"] != manifest.layers:
                raise InputError(
                    f"The owner at {self.access.address} has another model ({told['model']}) than the one that "
                    f"source={self.source.name!r} is an emulator of ({manifest.model}). Fetch its emulator."
                )
            self.owner, self.cut = client, told["cut"]
        if self.cut is None or not 1 <= self.cut <= manifest.identical:
            raise InputError(
                f"The owner's layers begin at {self.cut}, but the emulator has only the first {manifest.identical} as there. "
                "Ask the owner for one with more (emulator.identical)."
            )

    def _new_prefix(self, model: PreTrainedModel, settings: PrefixSettings) -> Prefix:
        if self.text is None:
            prefix = Prefix.random(model, settings, seed=int(torch.initial_seed() % (1 << 31)))
        else:
            ids = self.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).input_ids[0]
            prefix = Prefix.of_text(model, settings, ids)
        if self.phase == "split" and self.manifest is not None:
            return carried_over(prefix, self.manifest.whole, self.layer_map)
        return prefix

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model.requires_grad_(False))
        prefix = self.prefix
        if self.phase == "split":
            assert self.manifest is not None
            assert self.cut is not None
            assert self.owner is not None
            if prefix is not None and self.prefix_layers == "party":
                own = prefix.within(0, self.cut)
                if not len(own.rows):
                    raise InputError(
                        f"prefix_layers: party trains rows of the layers before the owner's, 0 to {self.cut - 1}, and the prefix "
                        f"has rows in {list(prefix.settings.layers or ())} alone. Give prefix.layers among them, or "
                        "prefix_layers: owner."
                    )
                prefix = self.prefix = own
            theirs = None if prefix is None else prefix.within(self.cut, self.manifest.layers)
            theirs = theirs if theirs is not None and len(theirs.rows) else None
            self._owners = OwnersLayers(self.owner, self.manifest.layers - self.cut, self.length, theirs, self.noise)
            split_model(model, self.cut, self._owners)
            if self.head == "owner":
                self._owners.top = _SAMPLED_TOP if self.generation.temperature > 0 else 1
                model.set_output_embeddings(OwnersHead(self._owners, int(model.config.vocab_size)))
            prefix = None if prefix is None else prefix.within(0, self.cut)
        if prefix is not None:  # for as long as the model lives: checkpointed layers are called again in the backward pass
            self._plug.close()
            self._plug.enter_context(plugged_in(model, prefix))

    def setup(self, stage: str) -> None:
        """Refuse what cannot be trained or measured, before the model is loaded.

        Raises:
            InputError: If there is no prefix, the phase is ``plug_in``, the precision or strategy cannot be split, or rows have
                answers that are no candidates.
        """
        if stage != "predict":
            self._check_answers(getattr(self.trainer, "datamodule", None))
        if stage != "fit":
            return
        if self.phase == "plug_in" or (self.prefix_settings is None and self.start is None):
            raise InputError(
                f"phase={self.phase!r}, prefix={self.prefix_settings}: there is nothing to train here. Use validate."
            )
        self.check_strategy(self.trainer.strategy)
        if self.phase != "split":
            return
        if self.trainer.world_size > 1:
            raise InputError("phase: split trains on one device: the owner knows a party by its token. Use trainer.devices: 1.")
        if self.trainer.precision == "16-mixed":
            raise InputError("precision: 16-mixed scales gradients, the owner's rows among them. Legal: 32-true, bf16-mixed.")

    def why_not_sharded(self) -> str:
        """See ``PretrainedModule``."""
        return "a prefix is put into whole layers"

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the final hidden states [batch, length, hidden size] of a right-padded batch, each row one text."""
        assert self.model is not None
        ids = behind_prefix({"input_ids": batch["input_ids"]}, self.length)["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        states = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return states[:, self.length :]

    def loss_parts(self, batch: Batch) -> LossParts:
        """Return the loss of a batch: ``input_ids`` and ``labels`` [batch, length], int64."""
        targets = shift_labels(batch["labels"])
        supervised = targets != -100
        if self.head == "owner":
            return self._loss_of_owner(batch, targets, supervised)
        if self.training or self._choices is None:
            return super().loss_parts(batch)
        assert self.model is not None
        states = self.hidden_states(batch)
        rows, places = self._choices.decisive(supervised)
        candidates = head_weight(self.model)[self._choices.ids.to(states.device)]
        self._note_accuracy(states[rows, places] @ candidates.T, targets[rows, places])
        return self._loss_of_states(states, targets, supervised)

    def _loss_of_owner(self, batch: Batch, targets: Tensor, supervised: Tensor) -> LossParts:
        """Ask the owner's head, where there are candidates at the position of each row that decides among them, else at all."""
        assert self._owners is not None
        owners, choices = self._owners, self._choices
        candidates = None if choices is None else choices.ids
        rows, places = supervised.nonzero(as_tuple=True) if choices is None else choices.decisive(supervised)
        if undecided := not len(rows):  # all are cut before the token that decides: the owner is asked, and it counts for nothing
            rows = places = torch.zeros(1, dtype=torch.long, device=targets.device)
        labels = torch.zeros_like(rows) if undecided else targets[rows, places]
        if candidates is not None and not undecided:
            choice = labels[:, None] == candidates.to(labels.device)
            if not choice.any(dim=1).all():  # of a loader that no data module brought, and setup did not see
                raise InputError(f"An answer begins as none of candidates={self.candidates} does. Name all answers.")
            labels = choice.int().argmax(dim=1)
        told = self.send_labels and self.training
        owners.request = HeadRequest(torch.stack([rows, places], dim=1), candidates, labels if told else None)
        try:
            self.hidden_states(batch)
        finally:
            owners.request = None
        answer, owners.answer = owners.answer, None
        assert answer is not None
        if undecided:
            nothing, none = answer.float().mean() * 0, answer.new_zeros(0)
            return LossParts(nothing, nothing.detach(), nothing.detach(), nothing.detach(), 0, none, none.bool())
        if told:
            nothing = torch.zeros(len(labels), device=labels.device)
            mean = answer.mean()
            return LossParts(mean, mean.detach(), nothing.sum(), nothing.sum(), len(labels), nothing, nothing.bool())
        answer = answer.float()
        mean = torch.nn.functional.cross_entropy(answer, labels)
        confidence, best = answer.detach().softmax(-1).max(dim=-1)
        correct = best == labels
        if candidates is not None and not self.training:
            self.accuracy.update(correct.float().mean(), len(correct))
        return LossParts(mean, mean.detach(), mean.new_zeros(()), correct.float().mean(), len(labels), confidence, correct)

    def loss_is_of_text(self) -> bool:
        """See ``LanguageModel``; an owner that is asked for candidates gives the loss among these."""
        return self.head == "party" or self.candidates is None

    def _note_accuracy(self, logits: Tensor, right: Tensor) -> None:
        assert self._choices is not None
        if not len(right):  # all are cut before the token that decides
            return
        correct = self._choices.ids.to(right.device)[logits.float().argmax(dim=-1)] == right
        self.accuracy.update(correct.float().mean(), len(correct))

    def _log_evaluation(self, stage: str) -> None:
        if self._choices is not None:
            self.log(f"{stage}_accuracy", self.accuracy.compute(), prog_bar=True)
        super()._log_evaluation(stage)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Fetch the gradients of the owner's rows, before they are clipped."""
        if self._owners is not None:
            self._owners.steps.collect()

    def _written(self, prompts: Tensor, mask: Tensor) -> Tensor:
        if self.phase != "split":
            behind = behind_prefix({"input_ids": prompts, "attention_mask": mask}, self.length)
            return super()._written(behind["input_ids"], behind["attention_mask"])
        found = []
        for ids, own in zip(prompts, mask):
            ids = behind_prefix({"input_ids": ids[own.bool()][None]}, self.length)["input_ids"]
            found.append(super()._written(ids, torch.ones_like(ids))[0])
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)

    def save_prefix(self, folder: Path) -> None:
        """Write the prefix, with what is needed to carry it over to the model that the emulator stands for.

        Args:
            folder: To write to.
        """
        assert self.prefix is not None
        emulated = self.phase == "emulator" and self.manifest is not None
        whole: StandsFor | None = self.manifest.whole if emulated and self.manifest is not None else None
        self.prefix.save(folder, self.fingerprint, whole)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the prefix alone: the weights are not trained."""
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("prefix.")
        }
        checkpoint["fulgurite_prefix_of"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's prefix is for the model at hand.

        Raises:
            InputError: If it is of another model, or of another shape.
        """
        ours = self.state_dict()
        theirs = checkpoint["state_dict"]
        rows = {name: tuple(tensor.shape) for name, tensor in ours.items() if name.startswith("prefix.")}
        if checkpoint.get("fulgurite_prefix_of") != self.fingerprint or rows != {
            name: tuple(tensor.shape) for name, tensor in theirs.items()
        }:
            raise InputError(
                "The checkpoint's prefix is for another model, or of another length, kind or choice of layers. Give the settings "
                "of the run that wrote it."
            )
        checkpoint["state_dict"] = {**ours, **theirs}
