"""A store's sequences for a student with another tokenizer: its tokens of the same text, and the labels that fit them."""

import io
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ...files import digest, write_atomic
from ...modules.distillation import SoftLabels
from ...modules.distillation.alignment import AlignedText, Spelling, VocabularyAlignment
from ...modules.tokens import tokenizer_fingerprint
from .codec import StoredSequence, StoreError, of_bfloat16
from .store import SoftLabelStore

Alignment = Literal["vocabulary", "positions"]


class AlignedExamples(Dataset):
    """Sequences of a store, in the tokens of another tokenizer.

    A token of the student has labels where both tokenizations have a boundary before it. The teacher's ids become the student's
    (``VocabularyAlignment``); probabilities of the same id add up, and what has no id goes to the tail. Tokens without labels
    have a tail of 1, which teaches nothing of its own. What the teacher was not asked for, as a prompt, is not asked of the
    student. Between two boundaries, where one side has several tokens, the text is a chunk: its log-probability is the sum of the
    teacher's tokens' (ALM, arXiv 2503.20083).

    Args:
        store: The store; it must hold its tokens.
        keys: Which of its sequences.
        tokenizer: The student's.
        alignment: ``vocabulary``; or ``positions``, which leaves the teacher's ids as they are, for losses that do not read them.

    Raises:
        StoreError: If the store does not hold what the teacher's tokens spell.
    """

    def __init__(
        self, store: SoftLabelStore, keys: list[bytes], tokenizer: PreTrainedTokenizerBase, alignment: Alignment = "vocabulary"
    ) -> None:
        self.store, self.keys, self.tokenizer = store, keys, tokenizer
        self.teacher, self.student = store.spelling(), Spelling.of(tokenizer)
        self.ids = stored_alignment(store, tokenizer).ids if alignment == "vocabulary" else None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self.store.read(self.keys[index])
        supervised = np.cumsum(np.append(0, sequence.supervised))  # rows of labels before each position
        ids: list[int] = []
        positions, own_supervised, rows, chunks = [], [], [], []
        for begin, end, text in self._pieces(sequence):
            count = len(text.ids)
            ids += text.ids
            positions.append(np.arange(count))
            # A piece's first token has nothing before it; the student's may end within it, and are asked for if the next one is.
            asked = sequence.supervised[begin : end - 1]
            asked = np.append(asked[:1], asked)[text.within] if len(asked) else np.ones(count, dtype=bool)
            own_supervised.append(asked & (np.arange(count) > 0))
            # The label of a token is in the row of the position before it.
            before = begin + text.teacher - 1
            known = (text.teacher > 0) & (text.student > 0) & (text.student < count)
            known &= sequence.supervised[np.clip(before, 0, None)]
            row = np.full(count, -1)
            row[text.student[known]] = supervised[before[known]]
            rows.append(row[own_supervised[-1]])
            chunks.append([part[own_supervised[-1]] for part in _chunks(text, begin, sequence, supervised, known)])
        labels = np.where(np.concatenate(own_supervised), ids, -100)
        tokens, log_p = (np.concatenate(part) for part in zip(*chunks))
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(np.concatenate(positions)),
            "soft_labels": self._labels(sequence, np.concatenate(rows), tokens, log_p),
        }

    def _pieces(self, sequence: StoredSequence) -> Iterator[tuple[int, int, AlignedText]]:
        bounds = [*sequence.starts.tolist(), len(sequence.tokens)]
        nothing = True
        for begin, end in zip(bounds, bounds[1:]):
            text = AlignedText.of(sequence.tokens[begin:end].tolist(), self.teacher, self.tokenizer, self.student)
            if text.ids:
                nothing = False
                yield begin, end, text
        if nothing:  # special tokens alone, say; a batch needs a token
            none = np.zeros(0, dtype=np.int64)
            yield 0, 0, AlignedText([self.student.end or 0], none, none, np.zeros(1, dtype=np.int64))

    def _labels(self, sequence: StoredSequence, rows: np.ndarray, tokens: np.ndarray, log_p: np.ndarray) -> SoftLabels:
        counts = sequence.counts.astype(np.int64)
        owner, ids = np.repeat(np.arange(len(counts)), counts), sequence.ids.astype(np.int64)
        values = of_bfloat16(sequence.probabilities)
        tail = of_bfloat16(sequence.tail)
        if self.ids is not None:
            owner, ids, values, tail = _renamed(owner, self.ids[ids], values, tail)
            counts = np.bincount(owner, minlength=len(counts))
        width = int(counts.max(initial=1))
        table = np.full((len(counts) + 1, width), -1, dtype=np.int32)  # the last row is that of tokens without labels
        probabilities = np.zeros(table.shape, dtype=np.float32)
        kept = np.arange(width) < np.append(counts, 0)[:, None]
        table[kept], probabilities[kept] = ids, values
        return SoftLabels(
            torch.from_numpy(table[rows]),
            torch.from_numpy(probabilities[rows]).bfloat16(),
            torch.from_numpy(np.append(tail, 1.0).astype(np.float32)[rows]).bfloat16(),
            torch.zeros(len(rows), dtype=torch.bfloat16),
            self.store.header.settings.temperature,
            self.store.header.settings.unbiased,
            torch.from_numpy(tokens.astype(np.int32)),
            torch.from_numpy(log_p.astype(np.float32)),
        )

    def label_vocabulary(self) -> np.ndarray:
        """Return the ids that labels or texts of these sequences have, rising, int64: the third vocabulary of the plain form."""
        seen = np.zeros(len(self.student.tokens), dtype=bool)
        for index in range(len(self)):
            example = self[index]
            seen[example["input_ids"].numpy()] = True
            ids = example["soft_labels"].ids.numpy()
            seen[ids[ids >= 0]] = True
        return np.flatnonzero(seen)


def _chunks(
    text: AlignedText, begin: int, sequence: StoredSequence, supervised: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each token, the tokens of the chunk that begins there and the chunk's log-probability."""
    tokens, log_p = np.zeros(len(text.ids), dtype=np.int64), np.zeros(len(text.ids))
    realised = np.cumsum(np.append(0, of_bfloat16(sequence.realised).astype(np.float64)))
    ours, theirs = np.diff(text.student), np.diff(text.teacher)
    rows = supervised[begin + text.teacher - 1]
    whole = known[:-1] & (np.diff(rows) == theirs) & ((ours > 1) | (theirs > 1)) & (ours > 0) & (theirs > 0)
    places = text.student[:-1][whole]
    tokens[places] = ours[whole]
    log_p[places] = np.diff(realised[rows])[whole]
    return tokens, log_p


def _renamed(
    owner: np.ndarray, ids: np.ndarray, values: np.ndarray, tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Add up values of the same owner and id, move those without an id to the tail; the rest falls in value."""
    named = ids >= 0
    tail = tail + np.bincount(owner[~named], values[~named], minlength=len(tail))
    flat, place = np.unique((owner[named] << 32) + ids[named], return_inverse=True)
    values = np.bincount(place, values[named], minlength=len(flat)).astype(np.float32)
    owner, ids = flat >> 32, flat & 0xFFFFFFFF
    order = np.lexsort((-values, owner))
    return owner[order], ids[order], values[order], tail


def stored_alignment(store: SoftLabelStore, tokenizer: PreTrainedTokenizerBase) -> VocabularyAlignment:
    """Return the alignment of a store's vocabulary with a student's, which stays with the store."""
    spelling = store.spelling()
    size = max(store.header.vocabulary, len(spelling.tokens))
    name = digest([tokenizer_fingerprint(tokenizer), tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)])
    path = store.folder / f"alignment-{name[:16]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = VocabularyAlignment(file["ids"], file["exact"])
            if len(found.ids) == len(found.exact) == size and found.ids.max() < len(tokenizer):
                return found
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise StoreError(f"{path} is damaged ({error}). Delete it: it is made again.") from error
        raise StoreError(f"{path} is of other vocabularies. Delete it: it is made again.")
    made = VocabularyAlignment.of(spelling, tokenizer, size)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=made.ids, exact=made.exact)
    with suppress(OSError):  # a store that may only be read
        write_atomic(path, buffer.getvalue())
    return made
