"""What stored labels cost and cover; measured by ``benchmark distillation/labels`` and ``distillation/vocabularies``."""

import statistics
import struct
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from rich.progress import track
from transformers import PreTrainedModel

from ...datamodules import TextDataModule
from ...datamodules.soft_labels import SoftLabelStore, StoredSequence, StoreHeader
from ...datamodules.soft_labels.aligned import AlignedExamples, Alignment, stored_alignment
from ...datamodules.soft_labels.codec import PlainCodec, bfloat16_bits, of_bfloat16
from ...datamodules.soft_labels.format import pack_block, unpack_block
from ...datamodules.soft_labels.learner import TableLearner
from ...datamodules.soft_labels.ranked import RankedCodec
from ...errors import InputError
from ...files import atomic_file, cache_folder, digest
from ...modules import SoftLabelTeacher
from ...modules.distillation import LabelSettings
from ...modules.distillation.chunks import in_chunks
from ...modules.distillation.labels import sampling_chances, select_labels
from ...modules.distillation.teacher import teacher_states
from ...modules.linear_loss import shift_labels
from ...modules.pretrained import head_weight, load_tokenizer

BLOCK = 512
_KEPT = 50
_PART = 8  # blocks in a file of the cache

Codec = Literal["ranked", "packed", "polynomial", "half"]


@dataclass
class Labels:
    """What a teacher says of the supervised tokens of a block, before it is rounded.

    Args:
        counts: Labels of each token, int64 [tokens].
        ids: int64 [labels].
        p: Their probabilities, float32 [labels], falling within a token.
        tail: Probability of the rest, float32 [tokens].
        realised: Log-probability of the text's own next token, float32 [tokens].
    """

    counts: np.ndarray
    ids: np.ndarray
    p: np.ndarray
    tail: np.ndarray
    realised: np.ndarray


def teacher_says(source: str, text: str, tokens: int | None, theta: float) -> tuple[dict[str, list[Labels]], int]:
    """Return a teacher's labels of a text by selection, ``fixed`` and ``sampled``, block by block, and its vocabulary's size.

    The text is read once; what was read is in the cache.

    Args:
        source: Of the teacher.
        text: As ``TextDataModule`` takes it.
        tokens: How many of it; None for all.
        theta: Of ``sampled``.
    """
    settings = {"fixed": LabelSettings(k=_KEPT), "sampled": LabelSettings(selection="sampled", theta=theta)}
    teacher = SoftLabelTeacher(source)
    data = TextDataModule(text, tokenizer=source, block_size=BLOCK, batch_size=1, train_tokens=tokens, val_fraction=0)
    data.prepare_data()
    data.setup()
    teacher.configure_model()
    model = teacher.model
    assert model is not None
    assert data.train_set is not None
    key = digest([teacher.fingerprint, data.hashes(), *(chosen.identity() for chosen in settings.values()), BLOCK])
    found: dict[str, list[Labels]] = {name: [] for name in settings}
    count = len(data.train_set)  # type: ignore[arg-type]
    for start in track(range(0, count, _PART), description="reading the text"):
        stop = min(start + _PART, count)
        path = cache_folder("teacher_says", key, f"{start:06d}-{stop:06d}.npz")
        if not path.is_file():
            arrays: dict[str, np.ndarray] = {}
            for number in range(start, stop):
                for name, labels in _read(model, data._collate([data.train_set[number]]), settings).items():
                    arrays |= {f"{name} {number:06d} {part}": values for part, values in vars(labels).items()}
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        with np.load(path) as file:
            for name, number in sorted({tuple(part.split()[:2]) for part in file.files}):
                found[name].append(Labels(**{part: file[f"{name} {number} {part}"] for part in Labels.__annotations__}))
    return found, head_weight(model).shape[0]


@torch.no_grad()
def _read(model: PreTrainedModel, batch: dict[str, Any], settings: dict[str, LabelSettings]) -> dict[str, Labels]:
    targets = shift_labels(batch["labels"])
    supervised = targets != -100
    states, found = teacher_states(model, batch), {}
    for name, chosen in settings.items():
        chances = sampling_chances(batch["input_ids"], batch["position_ids"], supervised, chosen)
        labels = select_labels(states, head_weight(model), targets[supervised], chosen, chances=chances, dtype=torch.float32)
        kept = labels.ids >= 0
        found[name] = Labels(
            kept.sum(dim=1).numpy(),
            labels.ids[kept].long().numpy(),
            labels.probabilities[kept].numpy(),
            labels.tail.numpy(),
            labels.realised.numpy(),
        )
    return found


def _adaptive(labels: Labels, threshold: float) -> Labels:
    """Keep the fewest of each token's labels that reach a mass."""
    owner = np.repeat(np.arange(len(labels.counts)), labels.counts)
    sums = np.cumsum(labels.p, dtype=np.float64)
    starts = np.cumsum(labels.counts) - labels.counts
    before = sums - labels.p - np.append(0.0, sums)[starts][owner]
    needed = before < threshold
    mass = np.bincount(owner[needed], labels.p[needed], minlength=len(labels.counts))
    counts = np.bincount(owner[needed], minlength=len(labels.counts))
    return replace(labels, counts=counts, ids=labels.ids[needed], p=labels.p[needed], tail=(1 - mass).clip(0).astype(np.float32))


def measure(
    *,
    seed: int,
    teacher: str,
    text: str,
    tokens: int | None,
    selection: Literal["fixed", "adaptive", "sampled"],
    codec: Codec,
    rounds: int,
    theta: float = 0.025,
    threshold: float = 0.95,
) -> dict[str, float]:
    """Write and read a teacher's labels of a text.

    Args:
        seed: Not used; labels are sampled by their tokens.
        teacher: Source of the teacher.
        text: As ``TextDataModule`` takes it.
        tokens: How many of it; None for all.
        selection: ``fixed`` keeps 50 labels, ``adaptive`` those that reach ``threshold``, 50 at most.
        codec: ``ranked`` is ours; ``packed`` bfloat16 and bit-packed ids; ``half`` float16, 16 and further bits of ids, zstd;
            ``polynomial`` the first probability and a curve through the logarithms of the others, bit-packed ids.
        rounds: How often the whole is written and read for the timing; medians.
        theta: Of ``sampled``.
        threshold: Of ``adaptive``.

    Returns:
        ``bytes_per_token`` of labels and blocks; ``beside_per_token``, tables and journal; ``labels_per_token``; ``kl_mean``,
        ``kl_p99`` and ``kl_most`` in nats, from what was kept and the rest to what was read (of ``sampled``: of what it keeps
        exactly); ``encode_tokens_per_second`` and ``decode_tokens_per_second``.
    """
    if codec == "polynomial" and selection != "fixed":
        raise InputError(f"selection={selection!r} with codec='polynomial', which has {_KEPT} labels a token. Legal: fixed.")
    if rounds < 1:
        raise InputError(f"rounds={rounds} measures nothing. Legal: 1 or more.")
    said, vocabulary = teacher_says(teacher, text, tokens, theta)
    settings = LabelSettings(selection=selection, k=_KEPT, threshold=threshold, theta=theta)
    blocks = said["sampled" if selection == "sampled" else "fixed"]
    if selection == "adaptive":
        blocks = [_adaptive(labels, threshold) for labels in blocks]
    count = sum(len(labels.counts) for labels in blocks)
    ways: dict[str, Callable[[], _Way]] = {
        "ranked": lambda: _Ours(vocabulary, settings),
        "packed": lambda: _Packed(vocabulary),
        "half": lambda: _Half(vocabulary),
        "polynomial": lambda: _Polynomial(vocabulary),
    }
    times: list[tuple[float, float]] = []
    written: list[bytes] = []
    read: list[Labels] = []
    for _ in track(range(rounds), description=f"{codec}, {selection}"):
        way = ways[codec]()
        begin = time.perf_counter()
        written = [way.write(labels) for labels in blocks]
        middle = time.perf_counter()
        read = [way.read(data) for data in written]
        times.append((middle - begin, time.perf_counter() - middle))
    errors = np.concatenate([_divergence(labels, other, settings.floor) for labels, other in zip(blocks, read)])
    return {
        "bytes_per_token": sum(map(len, written)) / count,
        "beside_per_token": way.beside() / count,
        "labels_per_token": sum(len(labels.ids) for labels in blocks) / count,
        "kl_mean": float(errors.mean()),
        "kl_p99": float(np.quantile(errors, 0.99)),
        "kl_most": float(errors.max()),
        "encode_tokens_per_second": count / statistics.median(write for write, _ in times),
        "decode_tokens_per_second": count / statistics.median(take for _, take in times),
        "tokens": float(count),
    }


def coverage(*, seed: int, store: str, student: str, alignment: Alignment) -> dict[str, float]:
    """How much of a text and of a teacher's probability supervises a student with another tokenizer.

    Args:
        seed: Not used.
        store: Folder of the labels.
        student: Source of the student's tokenizer.
        alignment: As ``SoftLabelDataModule`` takes it.

    Returns:
        ``positions``: share of the student's tokens with labels; ``in_chunks``: with the likelihood of a chunk. And with
        ``vocabulary``, of the teacher's probability where there are labels: ``exact_mass`` on tokens that the student has,
        ``piece_mass`` on first pieces of others, ``tail_mass`` on the rest.
    """
    opened, tokenizer = SoftLabelStore(store), load_tokenizer(student)
    examples = AlignedExamples(opened, opened.keys, tokenizer, alignment)
    tokens = labelled = chunked = 0
    for number in track(range(len(examples)), description="coverage"):
        labels = examples[number]["soft_labels"]
        tokens += len(labels)
        labelled += int((labels.counts > 0).sum())
        chunked += int(in_chunks(labels).sum())
    found = {"positions": labelled / tokens, "in_chunks": chunked / tokens}
    if alignment == "vocabulary":
        aligned = stored_alignment(opened, tokenizer)
        kinds = np.where(aligned.exact, 0, np.where(aligned.ids >= 0, 1, 2))
        mass = np.zeros(3)
        for key in opened.keys:
            sequence = opened.read(key)
            mass += np.bincount(kinds[sequence.ids], of_bfloat16(sequence.probabilities), minlength=3)
            mass[2] += float(of_bfloat16(sequence.tail).sum(dtype=np.float64))
        found |= dict(zip(("exact_mass", "piece_mass", "tail_mass"), (mass / mass.sum()).tolist()))
    return found


def _divergence(labels: Labels, other: Labels, floor: float) -> np.ndarray:
    """Return KL(kept and tail || read) of each token [tokens], both scaled to add up to 1."""
    np.testing.assert_array_equal(labels.counts, other.counts)
    owner = np.repeat(np.arange(len(labels.counts)), labels.counts)
    ours, theirs = (np.lexsort((part.ids, owner)) for part in (labels, other))
    np.testing.assert_array_equal(labels.ids[ours], other.ids[theirs])
    p, q = labels.p[ours].astype(np.float64), other.p[theirs].astype(np.float64)
    tail, rest = (part.tail.astype(np.float64) for part in (labels, other))
    if floor:  # what was sampled is part of the rest
        exact = p > floor
        owner, p, q = owner[exact], p[exact], q[exact]
    tokens = len(tail)
    p, q, tail, rest = (np.maximum(part, 1e-7) for part in (p, q, tail, rest))
    whole_p = np.bincount(owner, p, minlength=tokens) + tail
    whole_q = np.bincount(owner, q, minlength=tokens) + rest
    p, q, tail, rest = p / whole_p[owner], q / whole_q[owner], tail / whole_p, rest / whole_q
    return np.bincount(owner, p * np.log(p / q), minlength=tokens) + tail * np.log(tail / rest)


class _Way(ABC):
    """Writes a block's labels and reads them again."""

    @abstractmethod
    def write(self, labels: Labels) -> bytes:
        """Return the bytes of a block."""

    @abstractmethod
    def read(self, data: bytes) -> Labels:
        """Return the labels of some bytes."""

    def beside(self) -> float:
        """Return bytes of what is kept once for all blocks."""
        return 0.0


class _Ours(_Way):
    """The store's own blocks, with tables that are learnt on the way."""

    def __init__(self, vocabulary: int, settings: LabelSettings) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._header = StoreHeader("", "", "", vocabulary, settings, "", tokens="external")
        codec = self._header.make_codec(folder, 0)
        assert isinstance(codec, RankedCodec)
        self._codec, self._learner = codec, TableLearner(codec, folder, 0, (), 0)

    def write(self, labels: Labels) -> bytes:
        sequence = _sequence(labels)
        self._learner.add(sequence)
        return pack_block(bytes(16), sequence, self._codec, 3)

    def read(self, data: bytes) -> Labels:
        return _labels(unpack_block(data, bytes(16), self._codec.decode, ""))

    def beside(self) -> float:
        return float(sum(path.stat().st_size for path in Path(self._folder.name).iterdir()))


class _Packed(_Way):
    """bfloat16 values and ids of as many bits as the vocabulary needs, as they are; the store's plain record."""

    def __init__(self, vocabulary: int) -> None:
        self._codec = PlainCodec(vocabulary)

    def write(self, labels: Labels) -> bytes:
        return self._codec.encode(_sequence(labels))

    def read(self, data: bytes) -> Labels:
        return _labels(self._codec.decode(data))


class _Half(_Way):
    """float16 probabilities, ids as their lower 16 bits and a plane a further bit, through zstd at level 3."""

    def __init__(self, vocabulary: int) -> None:
        self._planes = max(0, (vocabulary - 1).bit_length() - 16)
        self._packer, self._opener = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()

    def write(self, labels: Labels) -> bytes:
        planes = [np.packbits((labels.ids >> (16 + plane)) & 1) for plane in range(self._planes)]
        columns = [
            labels.counts.astype("<u2"),
            labels.p.astype("<f2"),
            (labels.ids & 0xFFFF).astype("<u2"),
            *planes,
            labels.tail.astype("<f2"),
            labels.realised.astype("<f2"),
        ]
        head = struct.pack("<II", len(labels.counts), len(labels.ids))
        return self._packer.compress(head + b"".join(column.tobytes() for column in columns))

    def read(self, data: bytes) -> Labels:
        unpacked = self._opener.decompress(data)
        tokens, kept = struct.unpack_from("<II", unpacked)
        position = 8

        def take(count: int, dtype: str) -> np.ndarray:
            nonlocal position
            values = np.frombuffer(unpacked, dtype, count, position)
            position += values.nbytes
            return values

        counts, p, ids = take(tokens, "<u2"), take(kept, "<f2"), take(kept, "<u2").astype(np.int64)
        for plane in range(self._planes):
            ids |= np.unpackbits(take(-(-kept // 8), "u1"), count=kept).astype(np.int64) << (16 + plane)
        tail, realised = take(tokens, "<f2"), take(tokens, "<f2")
        return Labels(counts.astype(np.int64), ids, *(part.astype(np.float32) for part in (p, tail, realised)))


class _Polynomial(_Way):
    """The first probability, three coefficients of a curve of log p over the rank, and bit-packed ids (as DistillKit's layout).

    The curve's terms are 1, log r and log^2 r, which fits these labels better than powers of the rank. The tail is what the read
    probabilities leave.
    """

    def __init__(self, vocabulary: int) -> None:
        self._plain = PlainCodec(vocabulary)
        rank = np.log(np.arange(2, _KEPT + 1))
        self._terms = np.stack([np.ones_like(rank), rank, rank**2], axis=1)
        self._solve = np.linalg.pinv(self._terms)

    def write(self, labels: Labels) -> bytes:
        p = labels.p.reshape(-1, _KEPT).astype(np.float64)
        fitted = np.log(p[:, 1:].clip(1e-30)) @ self._solve.T
        ids = self._plain.pack(labels.ids.astype(np.uint32))
        return b"".join(
            (struct.pack("<I", len(p)), p[:, 0].astype("<f2").tobytes(), fitted.astype("<f4").tobytes(), ids.tobytes())
        )

    def read(self, data: bytes) -> Labels:
        (tokens,) = struct.unpack_from("<I", data)
        first = np.frombuffer(data, "<f2", tokens, 4).astype(np.float64)
        fitted = np.frombuffer(data, "<f4", 3 * tokens, 4 + 2 * tokens).reshape(tokens, 3)
        ids = self._plain.unpack(np.frombuffer(data, "u1", offset=4 + 14 * tokens), tokens * _KEPT)
        p = np.concatenate([first[:, None], np.exp(fitted @ self._terms.T)], axis=1)
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1)
        tail = (1 - p.sum(axis=1)).clip(0).astype(np.float32)
        return Labels(
            np.full(tokens, _KEPT), ids.astype(np.int64), p.reshape(-1).astype(np.float32), tail, np.zeros(tokens, np.float32)
        )


def _sequence(labels: Labels) -> StoredSequence:
    tokens = len(labels.counts)
    return StoredSequence(
        tokens=np.zeros(0, dtype=np.uint32),
        starts=np.zeros(1, dtype=np.uint32),
        supervised=np.append(np.ones(tokens, dtype=bool), False),
        counts=labels.counts.astype(np.uint32),
        ids=labels.ids.astype(np.uint32),
        probabilities=bfloat16_bits(labels.p),
        tail=bfloat16_bits(labels.tail),
        realised=bfloat16_bits(labels.realised),
    )


def _labels(sequence: StoredSequence) -> Labels:
    p, tail, realised = (of_bfloat16(part) for part in (sequence.probabilities, sequence.tail, sequence.realised))
    return Labels(sequence.counts.astype(np.int64), sequence.ids.astype(np.int64), p, tail, realised)
