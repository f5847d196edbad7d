"""What the suite's data modules share: tokenizer, loaders, and the hashes that results quote."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..modules.pretrained import load_tokenizer, resolve_source
from ..modules.tokens import tokenizer_fingerprint
from .loader import EpochSampler, ResumableLoader
from .packing import collate


class TokenDataModule(LightningDataModule):
    """Base of data modules whose examples are token sequences.

    A sub-class sets ``train_set`` and ``val_set`` in ``setup``, and ``predict_set`` where it is another one.

    Args:
        tokenizer: Source of the tokenizer; None takes the model's own.
        batch_size: Sequences a batch on each device.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the training order; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If a number is out of range or the tokenizer's source is unknown.
    """

    def __init__(self, *, tokenizer: str | None, batch_size: int, num_workers: int, seed: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} holds no sequence. Legal: 1 or more.")
        if num_workers < 0:
            raise InputError(f"num_workers={num_workers} is below 0. Legal: 0 or more.")
        if tokenizer is not None:
            resolve_source(tokenizer)
        self.tokenizer_source = tokenizer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None
        self.predict_set: Dataset | None = None
        self.has_soft_labels = False  # in training
        self.val_has_soft_labels = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._models_tokenizer: PreTrainedTokenizerBase | None = None  # the last that was compared with it

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer named, else that of the first model that the data was used with."""
        module = None if self.trainer is None else self.trainer.lightning_module
        models: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
        if self._tokenizer is None:
            self._tokenizer = models if self.tokenizer_source is None else load_tokenizer(self.tokenizer_source)
        if self._tokenizer is None:
            raise InputError("tokenizer=None: give a source, or use the data with a model that has a tokenizer.")
        if models is not None and models is not self._models_tokenizer:
            if tokenizer_fingerprint(models) != tokenizer_fingerprint(self._tokenizer):
                named = self.tokenizer_source is not None
                raise InputError(
                    f"tokenizer={self.tokenizer_source!r} is not the model's: its ids would mean other words. "
                    + ("Leave it out to take the model's own." if named else "Data is used with one tokenizer: make it anew.")
                )
            self._models_tokenizer = models
        return self._tokenizer

    @property
    def longest_sequence(self) -> int:
        """Tokens of a training sequence at most, before the data is set up."""
        raise InputError(f"{type(self).__name__} cannot say how long its sequences are. Leave --dry_run out.")

    def hashes(self) -> dict[str, str]:
        """Return what results quote of the data: its hashes and the tokenizer's fingerprint."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def calibration_batch(self, tokens: int) -> dict[str, Any]:
        """Return the first training sequences, the same on every rank, as a batch.

        Args:
            tokens: How many tokens at the least, as far as there are that many.
        """
        assert self.train_set is not None
        examples, found = [], 0
        with torch.device("cpu"):  # Lightning has models made, and so may this be called, where new tensors are on a GPU
            for index in range(len(self.train_set)):  # type: ignore[arg-type]
                examples.append({name: part for name, part in self.train_set[index].items() if name != "soft_labels"})
                found += len(examples[-1]["input_ids"])
                if found >= tokens:
                    break
            return self._collate(examples)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(examples, pad=self.tokenizer.pad_token_id or 0)

    def _lengths(self, dataset: Dataset) -> list[int] | None:
        """Return the examples' lengths where batches shall be of examples of like length."""
        return None

    def _loader(self, dataset: Dataset | None, *, training: bool, in_order: bool = False) -> ResumableLoader:
        if dataset is None:
            raise InputError(f"{type(self).__name__} has no such sequences: nothing is held out, or setup() was not called.")
        trainer = self.trainer
        sampler = EpochSampler(
            len(dataset),  # type: ignore[arg-type]
            shuffle=training,
            even=training,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            lengths=None if in_order else self._lengths(dataset),
            batch_size=self.batch_size,
        )
        return ResumableLoader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            collate=self._collate,
            num_workers=self.num_workers,
            drop_last=training and len(sampler) >= self.batch_size,
            content="-".join(value for _, value in sorted(self.hashes().items())) if training else "",
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled training sequences."""
        return self._loader(self.train_set, training=True)

    def val_dataloader(self) -> ResumableLoader | list:
        """Return the validation sequences in order; none where there is no validation data."""
        return [] if self.val_set is None else self._loader(self.val_set, training=False)

    def test_dataloader(self) -> ResumableLoader | list:
        """Return the validation sequences: the split that nothing is trained on."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableLoader:
        """Return the sequences to predict on, in order, each on one rank."""
        return self._loader(self.predict_set, training=False, in_order=True)


def data_hashes(trainer: Trainer) -> dict[str, str]:
    """Return the hashes of a Trainer's data; none for data modules of others."""
    datamodule = getattr(trainer, "datamodule", None)
    return datamodule.hashes() if isinstance(datamodule, TokenDataModule) else {}
