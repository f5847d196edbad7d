"""Training data from a soft-label store, with or without the text that it was made of."""

import logging
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch.utils.data import Dataset

from ...errors import InputError
from ...modules.tokens import tokenizer_fingerprint
from ..base import TokenDataModule
from ..text import TextDataModule
from .aligned import AlignedExamples, Alignment
from .codec import StoreError
from .store import SoftLabelStore, sequence_layout

log = logging.getLogger(__name__)


class StoredExamples(Dataset):
    """Sequences of a store whose tokens it holds.

    Args:
        store: The store.
        keys: Which of its sequences.
    """

    def __init__(self, store: SoftLabelStore, keys: list[bytes]) -> None:
        self.store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.store.example(self.keys[index])


class JoinedExamples(Dataset):
    """A text's sequences, joined with their labels by key.

    Args:
        store: The store.
        examples: The text's sequences.
    """

    def __init__(self, store: SoftLabelStore, examples: Dataset) -> None:
        self.store, self.examples = store, examples

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        tokens = example["input_ids"].numpy()
        key = self.store.header.key(tokens, *sequence_layout(example["position_ids"], example["labels"]))
        if key not in self.store:
            raise StoreError(
                f"{self.store.folder} has no labels for sequence {index} of the text. Capture them with the same text, "
                "block_size, tokenizer and settings."
            )
        return self.store.example(key, tokens)


class SoftLabelDataModule(TokenDataModule):
    """Batches with a teacher's stored labels; ``SoftLabelDistillation`` trains on them.

    Args:
        store: Folder of the store to train on.
        val_store: Folder of a store to validate on; None holds out a part of ``store``, or takes ``text``'s own.
        val_fraction: Share of the store's sequences, the last ones (of the last process), that is held out when neither
            ``val_store`` nor an external store's ``text`` is given, in [0, 1).
        text: The text that the store was made of; needed where its tokens are ``external``, and used then only. Its
            validation split is used when ``val_store`` is None, without soft labels.
        train_tokens: Number of tokens to train on, as the teacher counts them; the sequences beyond are left out. None takes
            all.
        alignment: For a store of a teacher with another tokenizer. ``vocabulary`` gives its labels the ids of the student's
            tokens that spell the same, or of their first piece; ``positions`` leaves ids as they are, for divergences that do
            not read them; see ``AlignedExamples``. None refuses such a store.
        teacher_fingerprint: Refuse a store of another teacher than this (``labels stats`` prints it).
        batch_size: Sequences a batch on each device.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the training order; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If the store is missing (the message has the command that makes it), damaged, or was made with
            another tokenizer or teacher.
    """

    def __init__(
        self,
        store: str,
        *,
        val_store: str | None = None,
        val_fraction: float = 0.05,
        text: TextDataModule | None = None,
        train_tokens: int | None = None,
        alignment: Alignment | None = None,
        teacher_fingerprint: str | None = None,
        batch_size: int = 2,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, num_workers=num_workers, seed=seed)
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction={val_fraction} is no share of the store. Legal: 0 up to, not including, 1.")
        if alignment not in (None, *get_args(Alignment)):
            raise InputError(f"alignment={alignment!r} is unknown. Legal: {', '.join(get_args(Alignment))}, null.")
        if alignment is not None and text is not None:
            raise InputError("alignment goes with stored tokens: leave data.text out, and capture with tokens: stored.")
        for name, folder in (("store", store), ("val_store", val_store)):
            if folder is not None and not (Path(folder) / "header.json").is_file():
                raise StoreError(
                    f"{name}={folder!r}: there is no soft-label store yet. Capture one: fulgurite predict -c "
                    f"distillation/capture --data.train YOUR_TEXT --trainer.callbacks.store {folder}"
                )
        self.store_folder, self.val_folder, self.val_fraction = store, val_store, val_fraction
        self.text, self.train_tokens = text, train_tokens
        self.teacher_fingerprint = teacher_fingerprint
        self.alignment = alignment
        self.has_soft_labels = True
        self.store: SoftLabelStore | None = None
        self.val_store: SoftLabelStore | None = None

    @property
    def longest_sequence(self) -> int:
        """See ``TokenDataModule``."""
        store = SoftLabelStore(self.store_folder)
        return max(map(store.tokens_of, store.keys))

    def prepare_data(self) -> None:
        """Tokenise the text, where the store needs it."""
        if self.text is not None:
            self.text._tokenizer = self.tokenizer
            self.text.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Open the stores and check that they fit the model."""
        if self.store is not None:
            return
        self.store = self._open("store", self.store_folder)
        if self.store.header.tokens == "external":
            if self.alignment is not None:
                raise StoreError(
                    f"store={self.store_folder!r} was made with tokens: external: there is no text in it to write in another "
                    "tokenizer's tokens. Capture with tokens: stored."
                )
            if self.text is None:
                raise StoreError(f"store={self.store_folder!r} was made with tokens: external. Give its text as data.text.")
            if self.train_tokens is not None:
                raise StoreError("train_tokens goes with stored tokens; with tokens: external give data.text.train_tokens.")
            self.text._tokenizer = self.tokenizer
            self.text.setup(stage)
            assert self.text.train_set is not None
            self.train_set = JoinedExamples(self.store, self.text.train_set)
            self.val_set = self.text.val_set
        else:
            if self.text is not None:
                log.warning("data.text is ignored: %s holds its tokens itself.", self.store_folder)
            keys = self.store.keys
            held_out = max(1, int(len(keys) * self.val_fraction)) if self.val_folder is None and self.val_fraction else 0
            if len(keys) <= held_out:
                raise StoreError(f"store={self.store_folder!r} has {len(keys)} sequences: too few to train on. Capture more.")
            self.train_set = self._examples(self.store, self._first(keys[: len(keys) - held_out]))
            self.val_set = self._examples(self.store, keys[len(keys) - held_out :]) if held_out else None
            self.val_has_soft_labels = bool(held_out)
        if self.val_folder is not None:
            val_store = self.val_store = self._open("val_store", self.val_folder)
            if not len(val_store):
                raise StoreError(f"val_store={self.val_folder!r} has no sequences. Capture some.")
            if val_store.header.tokens == "external":
                raise StoreError(f"val_store={self.val_folder!r} was made with tokens: external. Capture it with tokens: stored.")
            self.val_has_soft_labels = True
            self.val_set = self._examples(val_store, val_store.keys)
        self.predict_set = self.val_set

    def _examples(self, store: SoftLabelStore, keys: list[bytes]) -> Dataset:
        if self.alignment is None:
            return StoredExamples(store, keys)
        return AlignedExamples(store, keys, self.tokenizer, self.alignment)

    def label_vocabulary(self) -> np.ndarray:
        """Return the ids of the student that labels or texts to train on have, rising, int64; reads them all."""
        assert isinstance(self.train_set, AlignedExamples)
        return self.train_set.label_vocabulary()

    def _first(self, keys: list[bytes]) -> list[bytes]:
        assert self.store is not None
        tokens = self.train_tokens
        if tokens is None:
            return keys
        taken, found = [], 0
        for key in keys:
            found += self.store.tokens_of(key)
            if found > tokens:
                break
            taken.append(key)
        if not taken:
            raise StoreError(f"train_tokens={tokens} is less than one stored sequence. Raise it, or give null for all.")
        return taken

    def _open(self, name: str, folder: str) -> SoftLabelStore:
        store = SoftLabelStore(folder)
        ours = tokenizer_fingerprint(self.tokenizer)
        if store.header.tokenizer_fingerprint != ours and self.alignment is None:
            raise StoreError(
                f"{name}={folder!r} was made with another tokenizer: that of {store.header.teacher} "
                f"({store.header.tokenizer_fingerprint}), not the student's ({ours}). Give data.alignment=vocabulary to "
                "match both by what their tokens spell, or capture with a teacher that has the student's tokenizer."
            )
        wanted = self.teacher_fingerprint
        if wanted is not None and store.header.teacher_fingerprint != wanted:
            raise StoreError(
                f"{name}={folder!r} was made by another teacher: {store.header.teacher} "
                f"({store.header.teacher_fingerprint}), not teacher_fingerprint={wanted!r}."
            )
        return store

    def hashes(self) -> dict[str, str]:
        """Return the fingerprints of the store's teacher and of the tokenizer."""
        assert self.store is not None
        return {
            **super().hashes(),
            "teacher": self.store.header.teacher_fingerprint,
            "store": self.store.content_hash(),
        }
