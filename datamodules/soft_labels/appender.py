"""Writing a store of soft labels, so that a process killed at any moment leaves a store."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

from .codec import StoredSequence, StoreError
from .format import StoreHeader, journal_line, pack_block, read_journal, whole_blocks
from .learner import TableLearner
from .ranked import RankedCodec
from .store import SoftLabelStore


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
