"""Reading and checking a store of soft labels."""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...modules.distillation import SoftLabels
from ...modules.distillation.alignment import Spelling
from .codec import Codec, StoredSequence, StoreError, of_bfloat16
from .format import Decoded, StoreHeader, read_journal, read_spelling, unpack_block
from .ranked import RankedCodec, RoundedLabels


@dataclass(frozen=True)
class _Place:
    shard: str
    offset: int
    length: int
    tokens: int


@dataclass(frozen=True)
class StoreStats:
    """What a store holds.

    Args:
        header: What it was made with.
        sequences: Number of sequences.
        tokens: Number of their tokens.
        size: Bytes of all blocks.
        tables: Bytes of all tables.
        columns: Bytes of each column within the records; tokens in stored stores are shrunk by zstd afterwards.
        counts: Labels kept for each supervised token [supervised tokens].
        tail: Probability of what was not kept, or was sampled [supervised tokens].
        error_bound: What rounding can cost each of them, in nats; see ``Codec.error_bound``.
    """

    header: StoreHeader
    sequences: int
    tokens: int
    size: int
    tables: int
    columns: dict[str, float]
    counts: np.ndarray
    tail: np.ndarray
    error_bound: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain JSON: means and extremes."""
        tokens = max(len(self.counts), 1)
        labels = {name: size / tokens for name, size in self.columns.items() if name != "tokens"}

        def ends(values: np.ndarray) -> dict[str, float]:
            if not len(values):
                return {}
            found = {"mean": values.mean(), "p99": np.quantile(values, 0.99), "least": values.min(), "most": values.max()}
            return {name: float(value) for name, value in found.items()}

        return {
            "teacher": self.header.teacher,
            "teacher_fingerprint": self.header.teacher_fingerprint,
            "settings": self.header.settings.identity(),
            "codec": self.header.codec,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "labelled_tokens": len(self.counts),
            "bytes": self.size,
            "bytes_of_tables": self.tables,
            "bytes_per_labelled_token": self.size / tokens,
            "bytes_per_labelled_token_by_column": {**labels, "all_labels": sum(labels.values())},
            "labels_per_token": ends(self.counts),
            "mass_kept": ends(1 - self.tail),
            "error_bound_nats": ends(self.error_bound),
        }


def sequence_layout(position_ids: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return where pieces begin, and which tokens have a successor to predict, of one sequence [length]."""
    starts = (position_ids == 0).nonzero()[:, 0].numpy().astype(np.uint32)
    supervised = np.zeros(len(labels), dtype=bool)
    supervised[:-1] = (labels[1:] != -100).numpy()
    return starts, supervised


class SoftLabelStore:
    """A store, opened for reading: random access by key through memory maps.

    A capture may be running or have been killed: what is in the journals is whole, the rest is not seen.

    Args:
        folder: The store's folder.

    Raises:
        StoreError: If there is no store, or a file is missing, shorter than its journal says or of another format.

    Example:
        >>> store = SoftLabelStore("runs/labels")            # doctest: +SKIP
        >>> sequence = store.read(store.keys[0])              # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = StoreHeader.read(self.folder)
        self._codecs: dict[str, Codec] = {}
        self._places: dict[bytes, _Place] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._ends: dict[str, int] = {}  # of what the journals name in each shard
        for journal in sorted(self.folder.glob("journal-*.jsonl")):
            for entry in read_journal(journal)[0]:
                place = _Place(entry["shard"], entry["offset"], entry["length"], entry["tokens"])
                self._places.setdefault(bytes.fromhex(entry["key"]), place)  # two ranks may have met the same text
                self._ends[place.shard] = max(self._ends.get(place.shard, 0), place.offset + place.length)
        self._check_sizes()
        self.keys: list[bytes] = list(self._places)

    def _check_sizes(self) -> None:
        for shard, end in self._ends.items():
            path = self.folder / shard
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                raise StoreError(
                    f"{path} is truncated: the journal names {end} bytes, the file has {size}. Restore it, or delete the "
                    "store and capture again."
                )

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_codecs": {}}  # worker processes map the files themselves

    def read(self, key: bytes) -> StoredSequence:
        """Return the sequence under a key.

        Raises:
            KeyError: If the store does not have it.
            StoreError: If its bytes have changed since they were written.
        """
        return self._decoded(key, self._codec(self._places[key].shard).decode)

    def rounded(self, key: bytes) -> RoundedLabels:
        """Return the labels under a key as the codec ``ranked-2`` wrote them.

        Raises:
            KeyError, StoreError: As ``read``.
        """
        codec = self._codec(self._places[key].shard)
        assert isinstance(codec, RankedCodec)
        return self._decoded(key, codec.decode_rounded)

    def _decoded(self, key: bytes, decode: Callable[[bytes], Decoded]) -> Decoded:
        place = self._places[key]
        if place.shard not in self._maps:
            with open(self.folder / place.shard, "rb") as file:
                self._maps[place.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        block = self._maps[place.shard][place.offset : place.offset + place.length]
        return unpack_block(block, key, decode, f"{self.folder / place.shard} at byte {place.offset}")

    def _codec(self, shard: str) -> Codec:
        rank = shard.split("-")[1]
        if rank not in self._codecs:
            self._codecs[rank] = self.header.make_codec(self.folder, int(rank))
        return self._codecs[rank]

    def example(self, key: bytes, tokens: np.ndarray | None = None) -> dict[str, Any]:
        """Return a training example: ``input_ids``, ``labels``, ``position_ids`` [length] and ``soft_labels``.

        Args:
            key: The sequence's key.
            tokens: Its tokens, for a store that does not hold them.
        """
        sequence = self.read(key)
        ids = torch.from_numpy((sequence.tokens if tokens is None else tokens).astype(np.int64))
        length = len(sequence.supervised)
        begins = np.zeros(length, dtype=np.int64)
        begins[sequence.starts] = sequence.starts
        labels = torch.full((length,), -100)
        labelled = torch.from_numpy(sequence.supervised.nonzero()[0] + 1)
        labels[labelled] = ids[labelled]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.from_numpy(np.arange(length) - np.maximum.accumulate(begins)),
            "soft_labels": self._soft_labels(sequence),
        }

    def _soft_labels(self, sequence: StoredSequence) -> SoftLabels:
        counts = sequence.counts.astype(np.int64)
        width = int(counts.max(initial=1))
        kept = np.arange(width) < counts[:, None]
        ids = np.full(kept.shape, -1, dtype=np.int32)
        probabilities = np.zeros(kept.shape, dtype=np.uint16)
        ids[kept], probabilities[kept] = sequence.ids, sequence.probabilities
        return SoftLabels(
            torch.from_numpy(ids),
            _bfloat16(probabilities),
            _bfloat16(sequence.tail),
            _bfloat16(sequence.realised),
            self.header.settings.temperature,
            self.header.settings.unbiased,
        )

    def tokens_of(self, key: bytes) -> int:
        """Return the length of a sequence in tokens, without reading it."""
        return self._places[key].tokens

    def content_hash(self) -> str:
        """Return 32 hexadecimal digits of the store's header and keys, for results to quote."""
        made_with = json.dumps(asdict(self.header), sort_keys=True).encode()
        return hashlib.blake2b(made_with + b"".join(sorted(self.keys)), digest_size=16).hexdigest()

    def spelling(self) -> Spelling:
        """Return what the teacher's tokens stand for.

        Raises:
            StoreError: If the store does not hold it, or not the tokens of its text.
        """
        if self.header.tokens == "external":
            raise StoreError(
                f"{self.folder} was made with tokens: external, so a student with another tokenizer finds no text in it. Capture "
                "with tokens: stored."
            )
        return read_spelling(self.folder)

    def stats(self) -> "StoreStats":
        """Return counts, sizes and errors of a store; reads every block."""
        columns = dict.fromkeys(("tokens", "counts", "ids", "values", "tail", "realised"), 0.0)
        counts, tails, bounds = [], [], []
        for key in self.keys:
            codec = self._codec(self._places[key].shard)
            record = self._decoded(key, bytes)
            sequence = codec.decode(record)
            columns["tokens"] += 4 * len(sequence.tokens)
            for name, size in codec.column_bytes(record).items():
                columns[name] += size
            counts.append(sequence.counts)
            tails.append(of_bfloat16(sequence.tail))
            bounds.append(codec.error_bound(sequence))
        return StoreStats(
            self.header,
            sequences=len(self),
            tokens=sum(place.tokens for place in self._places.values()),
            size=sum(place.length for place in self._places.values()),
            tables=sum(path.stat().st_size for path in self.folder.glob("tables-*.flt")),
            columns=columns,
            counts=np.concatenate([np.zeros(0, np.uint32), *counts]),
            tail=np.concatenate([np.zeros(0, np.float32), *tails]),
            error_bound=np.concatenate([np.zeros(0), *bounds]),
        )

    def verify(self) -> Iterator[bytes]:
        """Read and check every block, yielding its key.

        Raises:
            StoreError: At the first block that is damaged or holds what no teacher can have said.
        """
        for path in sorted(self.folder.glob("labels-*.flb")):
            unnamed = path.stat().st_size - self._ends.get(path.name, 0)
            if unnamed:
                raise StoreError(
                    f"{path}: no journal names its last {unnamed} bytes. A capture was killed or a journal lost: run the same "
                    "capture again, it enters what is whole."
                )
        for key in self.keys:
            sequence = self.read(key)
            where = f"{self.folder / self._places[key].shard} at byte {self._places[key].offset}"
            if len(sequence.ids) and int(sequence.ids.max()) >= self.header.vocabulary:
                raise StoreError(f"{where}: an id is outside the vocabulary of {self.header.vocabulary}. Capture again.")
            settings = self.header.settings
            owners = np.repeat(np.arange(len(sequence.counts)), sequence.counts.astype(np.int64))
            mass = np.bincount(owners, of_bfloat16(sequence.probabilities), minlength=len(sequence.counts))
            mass += of_bfloat16(sequence.tail) * (not settings.unbiased)
            realised = of_bfloat16(sequence.realised)
            if not (np.isfinite(realised) & (realised <= 0)).all():
                raise StoreError(f"{where}: a log-probability is none. Capture again.")
            slack = self._codec(self._places[key].shard).mass_error(sequence) + settings.floor
            if not (np.abs(mass - 1) <= slack).all():
                raise StoreError(f"{where}: probabilities do not add up to 1. Capture again.")
            if len(sequence.tokens) and self.header.key(sequence.tokens, sequence.starts, sequence.supervised) != key:
                raise StoreError(f"{where}: the tokens do not fit their key. Capture again.")
            yield key


def _bfloat16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int16).copy()).view(torch.bfloat16)
