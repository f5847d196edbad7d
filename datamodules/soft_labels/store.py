"""Reading, writing and checking a store of soft labels."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...modules.distillation import SoftLabels
from ...modules.distillation.alignment import Spelling
from .codec import Codec, StoredSequence, StoreError
from .format import Decoded, StoreHeader, journal_line, pack_block, read_journal, read_spelling, unpack_block, whole_blocks
from .learner import TableLearner
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
            bfloat16(probabilities),
            bfloat16(sequence.tail),
            bfloat16(sequence.realised),
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
            tails.append(bfloat16(sequence.tail).float().numpy())
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
            mass = bfloat16(sequence.tail).double() * (not settings.unbiased)
            owners = torch.repeat_interleave(torch.from_numpy(sequence.counts.astype(np.int64)))
            mass = mass.index_add(0, owners, bfloat16(sequence.probabilities).double())
            realised = bfloat16(sequence.realised)
            if not bool((torch.isfinite(realised) & (realised <= 0)).all()):
                raise StoreError(f"{where}: a log-probability is none. Capture again.")
            slack = torch.from_numpy(self._codec(self._places[key].shard).mass_error(sequence)) + settings.floor
            if len(mass) and not bool(((mass - 1).abs() <= slack).all()):
                raise StoreError(f"{where}: probabilities do not add up to 1. Capture again.")
            if len(sequence.tokens) and self.header.key(sequence.tokens, sequence.starts, sequence.supervised) != key:
                raise StoreError(f"{where}: the tokens do not fit their key. Capture again.")
            yield key


def bfloat16(values: np.ndarray) -> torch.Tensor:
    """Return uint16 [...] as the bfloat16 that they are."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int16).copy()).view(torch.bfloat16)


class SoftLabelAppender:
    """Appends one process's sequences to a store, which it makes or goes on with.

    A block is synced to disk before the journal's line that names it, so that a killed process leaves at most bytes that
    no line names. When the store is opened again, whole blocks among them are entered and the rest is cut off.

    Args:
        folder: The store's folder.
        header: What the labels are made with.
        rank: This process; each has shards and a journal of its own.
        shard_bytes: A new shard is begun when one has grown beyond this.

    Raises:
        StoreError: If the folder holds labels made with something else, is damaged, or is being written to.
    """

    def __init__(self, folder: str | Path, header: StoreHeader, *, rank: int = 0, shard_bytes: int = 1 << 28) -> None:
        self.folder = Path(folder)
        self.header = header
        self.rank, self.shard_bytes = rank, shard_bytes
        self._codec = header.make_codec(self.folder, rank)
        prepare_store(self.folder, header, write=rank == 0)
        self._lock = open(self.folder / f"writer-{rank:05d}.lock", "w")  # noqa: SIM115  (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(
                f"{self.folder} is being written to by another process. Wait for it, or use another folder."
            ) from None
        self._keys = set(SoftLabelStore(self.folder).keys)
        self._journal_path = self.folder / f"journal-{rank:05d}.jsonl"
        self._recover()
        self._learner = self._make_learner()
        self._journal = open(self._journal_path, "ab", buffering=0)  # noqa: SIM115
        self._shard = open(self.folder / self._shard_name, "ab", buffering=0)  # noqa: SIM115

    def _recover(self) -> None:
        """Cut off what is half written, and enter whole blocks that the journal does not name."""
        entries, whole = read_journal(self._journal_path) if self._journal_path.is_file() else ([], 0)
        if self._journal_path.is_file():
            os.truncate(self._journal_path, whole)
        ends: dict[str, int] = {}
        for entry in entries:
            ends[entry["shard"]] = max(ends.get(entry["shard"], 0), entry["offset"] + entry["length"])
        last = max(map(_shard_number, ends), default=-1)
        found: list[bytes] = []
        for path in sorted(self.folder.glob(f"labels-{self.rank:05d}-*.flb"), key=lambda path: _shard_number(path.name)):
            if _shard_number(path.name) < last:
                continue
            end = ends.get(path.name, 0)
            with open(path, "rb") as file:
                file.seek(end)
                rest = file.read()
            for offset, length, key, tokens in whole_blocks(rest, self._codec, f"{path} behind byte {end}"):
                found.append(_entry(path.name, ends.get(path.name, 0) + offset, length, key, tokens))
                self._keys.add(key)
                end = ends.get(path.name, 0) + offset + length
            os.truncate(path, end)
            last = _shard_number(path.name) if end else last
        if found:
            with open(self._journal_path, "ab", buffering=0) as journal:
                _write(journal, b"".join(found))
        self._number = max(last, 0)
        for path in self.folder.glob(f"labels-{self.rank:05d}-*.flb"):
            if _shard_number(path.name) > self._number:
                path.unlink()

    def _make_learner(self) -> TableLearner | None:
        if not isinstance(self._codec, RankedCodec):
            return None
        entries = read_journal(self._journal_path)[0] if self._journal_path.is_file() else []
        store = SoftLabelStore(self.folder)
        before = (store.rounded(bytes.fromhex(entry["key"])) for entry in reversed(entries))
        return TableLearner(self._codec, self.folder, self.rank, before, sum(entry["tokens"] for entry in entries))

    @property
    def _shard_name(self) -> str:
        return f"labels-{self.rank:05d}-{self._number:05d}.flb"

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def append(self, sequences: list[tuple[bytes, StoredSequence]]) -> int:
        """Write sequences and sync them to disk.

        Args:
            sequences: Keys and sequences; a key that the store has is passed over.

        Returns:
            Number of bytes written to the shard.

        Raises:
            StoreError: If a number is none, or the disk is full; what was appended before stays readable.
        """
        offset = start = self._shard.seek(0, os.SEEK_END)
        journal_end = self._journal.seek(0, os.SEEK_END)
        new = {key: sequence for key, sequence in sequences if key not in self._keys}
        for sequence in new.values():
            sequence.check()
        lines, blocks = [], []
        try:
            for key, sequence in new.items():
                if self._learner is not None:
                    self._learner.add(sequence)
                block = pack_block(key, sequence, self._codec, self.header.compression)
                lines.append(_entry(self._shard_name, offset, len(block), key, len(sequence.supervised)))
                blocks.append(block)
                offset += len(block)
            _write(self._shard, b"".join(blocks))
            _write(self._journal, b"".join(lines))
        except OSError as error:
            self._shard.truncate(start)
            self._journal.truncate(journal_end)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise StoreError(
                f"The disk of {self.folder} is full ({error.strerror}). The store holds {start} whole bytes in "
                f"{self._shard_name}: free some space and run the same command again, it goes on from there."
            ) from error
        self._keys.update(new)
        if offset >= self.shard_bytes:
            self._shard.close()
            self._number += 1
            self._shard = open(self.folder / self._shard_name, "ab", buffering=0)  # noqa: SIM115
        return offset - start

    def close(self) -> None:
        """Close the files and let others write."""
        for file in (self._shard, self._journal, self._lock):
            file.close()


def _shard_number(name: str) -> int:
    return int(name.rsplit("-", 1)[1].removesuffix(".flb"))


def _entry(shard: str, offset: int, length: int, key: bytes, tokens: int) -> bytes:
    return journal_line({"shard": shard, "offset": offset, "length": length, "key": key.hex(), "tokens": tokens})


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def prepare_store(folder: Path, header: StoreHeader, *, write: bool = True) -> None:
    """Make a store's folder and header, or check that they are of the same making.

    Args:
        folder: The store's folder.
        header: What the labels are made with.
        write: Whether this process writes a missing header.

    Raises:
        StoreError: If the folder holds other files, or a store made with something else; the message names what differs.
    """
    folder = Path(folder)
    header.check()
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file. Give an empty or a new folder for the store.")
    try:
        existing = StoreHeader.read(folder)
    except StoreError:
        if (folder / "header.json").exists():
            raise
        if folder.is_dir() and any(not name.name.startswith(("writer-", ".header")) for name in folder.iterdir()):
            raise StoreError(f"{folder} holds other files and no soft-label store. Give an empty or a new folder.") from None
        if write:
            header.write(folder)
        return
    different = existing.differences(header)
    if different:
        raise StoreError(
            f"{folder} holds labels that were made with something else: {'; '.join(different)}. Give another folder, or the "
            "settings of the store."
        )
