"""The files of a soft-label store: header, blocks, journal lines, keys. ``docs/soft-label-format.md`` shows the bytes."""

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import zstandard

from ...files import write_atomic, write_json
from ...modules.distillation import LabelSettings
from ...modules.distillation.alignment import Spelling
from .codec import LARGEST, Codec, PlainCodec, StoredSequence, StoreError, decompressed
from .ranked import RankedCodec
from .steps import Values, ValueSteps
from .tables import LabelTables, tables_path

Decoded = TypeVar("Decoded")

_FORMAT = "fulgurite-soft-labels"
FORMAT_VERSION = 2
_READABLE = (1, 2)
CODECS = (RankedCodec.name, PlainCodec.name)
HEADER = "header.json"
_SPELLING = "spelling.fls"
_SPELLING_HEAD = struct.Struct("<4sIIi")  # magic, CRC-32 of the rest, tokens, end-of-text token or -1
_SPELLING_MAGIC = b"FLGS"
_MAGIC = b"FLGB"
_BLOCK = struct.Struct("<4sI16sI")  # magic, length of the payload, key, CRC-32 of the three and the payload


@dataclass(frozen=True)
class StoreHeader:
    """What a store was made with.

    Args:
        teacher: The teacher's name.
        teacher_fingerprint: ``model_fingerprint`` of its weights.
        tokenizer_fingerprint: ``tokenizer_fingerprint`` of its tokenizer.
        vocabulary: Number of ids its head predicts.
        settings: Which labels were kept.
        weights: Type of the teacher's weights in memory during the capture.
        tokens: ``stored`` keeps every sequence's tokens; ``external`` only their hash.
        codec: Name of the record's codec.
        compression: Level of zstd.
        values: How the codec ``ranked-2`` rounds probabilities; see ``ValueSteps``.
        value_step: Size of the steps.
    """

    teacher: str
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    vocabulary: int
    settings: LabelSettings
    weights: str
    tokens: Literal["stored", "external"] = "stored"
    codec: str = RankedCodec.name
    compression: int = 3
    values: Values = "sqrt"
    value_step: float = 0.011

    def write(self, folder: Path) -> None:
        """Write the header into a store's folder, atomically."""
        fields = {"format": _FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        write_json(folder / HEADER, {**fields, "checksum": _checksum(fields)})

    @classmethod
    def read(cls, folder: Path) -> "StoreHeader":
        """Read the header of a store.

        Raises:
            StoreError: If there is none, or it is of another format or version.
        """
        path = folder / HEADER
        if not path.is_file():
            raise StoreError(f"{folder} holds no soft-label store: {HEADER} is missing.")
        try:
            fields = json.loads(path.read_text("utf-8"))
            checksum = fields.pop("checksum", None)
            if fields["format"] != _FORMAT:
                raise StoreError(f"{path} is not the header of a soft-label store.")
            version = fields["version"]
            if version not in _READABLE:
                raise StoreError(f"{path} has format version {version}; this release reads 1 and 2. Update it, or capture again.")
            if version >= 2 and checksum != _checksum(fields):
                raise ValueError("its checksum does not fit")
            del fields["format"], fields["version"]
            header = cls(**{**fields, "settings": LabelSettings(**fields["settings"])})
            header.check()
        except StoreError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged ({error!r}). Restore the file or capture again.") from error
        return header

    def check(self) -> None:
        """Raise an InputError that names a field which has no meaning, TypeError or ValueError for one of another type."""
        if self.codec not in CODECS:
            raise StoreError(f"codec={self.codec!r} is unknown. Legal: {', '.join(CODECS)}.")
        if self.tokens not in ("stored", "external"):
            raise StoreError(f"tokens={self.tokens!r} is unknown. Legal: stored, external.")
        if not 1 <= int(self.vocabulary) <= 1 << 21:
            raise StoreError(f"vocabulary={self.vocabulary} is no size of a vocabulary. Legal: 1 to {1 << 21}.")
        self.settings.check()
        if self.codec == RankedCodec.name:
            self.steps()

    def differences(self, other: "StoreHeader") -> list[str]:
        """Return one phrase for every field in which two headers differ."""
        ours, theirs = ({**asdict(header), "settings": header.settings.identity()} for header in (self, other))
        return [f"{name} is {ours[name]} there, {theirs[name]} here" for name in ours if ours[name] != theirs[name]]

    def steps(self) -> ValueSteps:
        """Return how the codec ``ranked-2`` rounds; the counts of ``random`` selection stay what they are."""
        if self.settings.selection == "random":
            return ValueSteps("even", 1 / (self.settings.k or 1))
        return ValueSteps(self.values, self.value_step, self.settings.floor)

    def make_codec(self, folder: Path, rank: int) -> Codec:
        """Return the codec that the header names, for the shards of one process.

        Args:
            folder: Of the store, where the process's tables are.
            rank: The process.
        """
        if self.codec == PlainCodec.name:
            return PlainCodec(self.vocabulary)

        @functools.cache
        def tables(number: int) -> LabelTables:
            return LabelTables.load(tables_path(folder, rank, number), self.vocabulary, codec.shapes)

        codec = RankedCodec(self.vocabulary, self.steps(), tables)
        return codec

    def key(self, tokens: np.ndarray, starts: np.ndarray, supervised: np.ndarray) -> bytes:
        """Return the 16-byte key of a sequence: the hash of all that its labels depend on.

        Args:
            tokens: Token ids [length].
            starts: Positions at which a document's piece begins.
            supervised: Which tokens have a successor to predict [length].
        """
        made_with = [self.teacher_fingerprint, self.tokenizer_fingerprint, self.settings.identity(), self.weights]
        digest = hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=16)
        for part in (tokens.astype("<u4"), starts.astype("<u4"), np.packbits(supervised, bitorder="little")):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        return digest.digest()


def _checksum(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def write_spelling(folder: Path, spelling: Spelling) -> None:
    """Keep what the teacher's tokens stand for, so that students with other tokenizers can learn from the store."""
    lengths = np.array([-1 if part is None else len(part) for part in spelling.tokens], dtype="<i4")
    packed = zstandard.ZstdCompressor(level=9).compress(lengths.tobytes() + b"".join(part or b"" for part in spelling.tokens))
    rest = struct.pack("<Ii", len(lengths), -1 if spelling.end is None else spelling.end) + packed
    write_atomic(folder / _SPELLING, _SPELLING_MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest)


def read_spelling(folder: Path) -> Spelling:
    """Return what the teacher's tokens stand for.

    Raises:
        StoreError: If the store does not have it, or it is damaged.
    """
    path = folder / _SPELLING
    try:
        data = path.read_bytes()
        magic, checksum, count, end = _SPELLING_HEAD.unpack_from(data)
        if magic != _SPELLING_MAGIC or zlib.crc32(data[8:]) != checksum:
            raise ValueError("its checksum does not fit")
        unpacked = decompressed(data[_SPELLING_HEAD.size :])
        lengths = np.frombuffer(unpacked, dtype="<i4", count=count)
        if lengths.clip(0).sum(dtype=np.int64) + 4 * count != len(unpacked):
            raise ValueError("its tokens do not fit its head")
    except OSError as error:
        raise StoreError(
            f"{folder} does not hold what its teacher's tokens spell ({error.strerror}), so only students with the teacher's "
            "tokenizer can learn from it. Capture again."
        ) from error
    except (struct.error, ValueError, StoreError) as error:
        raise StoreError(f"{path} is damaged ({error}). Restore the file or capture again.") from error
    ends = 4 * count + np.cumsum(lengths.clip(0))
    tokens = [None if length < 0 else unpacked[stop - length : stop] for length, stop in zip(lengths.tolist(), ends.tolist())]
    return Spelling(tokens, None if end < 0 else end)


def pack_block(key: bytes, sequence: StoredSequence, codec: Codec, compression: int) -> bytes:
    """Return a block: magic, payload length, key, CRC-32, and the record compressed by zstd."""
    record = codec.encode(sequence)
    if len(record) > LARGEST:
        raise StoreError(
            f"a sequence's labels take {len(record)} bytes, more than {LARGEST}. Use shorter sequences or fewer labels."
        )
    payload = zstandard.ZstdCompressor(level=compression).compress(record)
    head = _BLOCK.pack(_MAGIC, len(payload), key, 0)
    return _BLOCK.pack(_MAGIC, len(payload), key, zlib.crc32(payload, zlib.crc32(head[:-4]))) + payload


def unpack_block(block: bytes, key: bytes, decode: Callable[[bytes], Decoded], where: str) -> Decoded:
    """Return what a block's record holds.

    Args:
        block: The block's bytes.
        key: Key that the journal gives it.
        decode: Reads the record: the codec's ``decode``.
        where: File and offset, for messages.

    Raises:
        StoreError: If a byte of it has changed.
    """
    if len(block) < _BLOCK.size:
        raise StoreError(f"{where}: the block is cut off. Restore the file, or delete the store and capture again.")
    magic, length, stored_key, checksum = _BLOCK.unpack_from(block)
    payload = block[_BLOCK.size :]
    if magic != _MAGIC or length != len(payload) or zlib.crc32(payload, zlib.crc32(block[: _BLOCK.size - 4])) != checksum:
        raise StoreError(
            f"{where}: the block's checksum does not fit, so a byte of it has changed. Restore the file, or delete the store "
            "and capture again."
        )
    if stored_key != key:
        raise StoreError(f"{where}: the block belongs to another sequence than the journal says. Capture again.")
    try:
        return decode(decompressed(payload))
    except StoreError as error:
        raise StoreError(f"{where}: the block cannot be read ({error}). Capture again.") from error


def whole_blocks(data: bytes, codec: Codec, where: str) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield offset, length, key and tokens of the whole blocks at the head of some bytes; stop at the first that is none.

    Args:
        data: The bytes.
        codec: The store's codec, which is asked for nothing but the number of tokens.
        where: File and offset, for messages.

    Raises:
        StoreError: If a whole block follows behind what is none: then a byte has changed, and nothing may be cut off.
    """
    offset = 0
    while (found := _whole_block(data, offset)) is not None:
        length, key, record = found
        yield offset, length, key, codec.length(record)
        offset += length
    behind = data.find(_MAGIC, offset + 1)
    while behind >= 0:
        if _whole_block(data, behind) is not None:
            raise StoreError(
                f"{where}: the block at {offset} is damaged, and whole ones follow it. Restore the file, or delete the store and "
                "capture again."
            )
        behind = data.find(_MAGIC, behind + 1)


def _whole_block(data: bytes, offset: int) -> tuple[int, bytes, bytes] | None:
    """Return length, key and record of the block at an offset; None if there is none."""
    if offset + _BLOCK.size > len(data):
        return None
    _, length, key, _ = _BLOCK.unpack_from(data, offset)
    block = data[offset : offset + _BLOCK.size + length]
    try:
        return len(block), key, unpack_block(block, key, bytes, "")
    except StoreError:
        return None


def journal_line(entry: dict[str, Any]) -> bytes:
    """Return an entry as a line: CRC-32 in hexadecimal, a space, JSON."""
    body = json.dumps(entry, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a journal up to its last whole line.

    Args:
        path: The journal's file.

    Returns:
        Its entries, and the length in bytes of what is whole: a process killed while it wrote leaves a part of a line.

    Raises:
        StoreError: If a line before the last is damaged.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        checksum, _, body = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            raise StoreError(f"{path}, line {number}: the checksum does not fit. Restore the file or capture again.")
        entries.append(json.loads(body))
    return entries, whole
