"""Ten thousand damaged stores: each is refused with a message or read as what it was, in little time and memory."""

import random
import resource
import shutil
import signal
import struct
import zlib
from pathlib import Path

import pytest
import zstandard

from fulgurite.datamodules.soft_labels import SoftLabelStore, StoreError
from tests.datamodules.soft_labels.test_golden import GOLDEN, contents, expected

CASES = 4000  # of each golden store
SECONDS = 20  # for one case
MEMORY = 2 << 30  # bytes beyond what the process has


def damaged(data, dice):
    """Random bytes, flipped bits, pieces cut off, doubled or moved."""
    data = bytearray(data)
    kind = dice.randrange(6)
    if kind == 0:
        return dice.randbytes(dice.randrange(0, 2 * len(data) + 1))
    if kind == 1:
        for _ in range(dice.choice([1, 1, 2, 8, 64])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 2:
        del data[dice.randrange(len(data)) :]
    elif kind == 3:
        data += dice.randbytes(dice.choice([1, 4, 28, 1000]))
    elif kind == 4:
        start, size = dice.randrange(len(data)), dice.choice([1, 4, 16, 100])
        data[start : start + size] = dice.randbytes(size) if dice.random() < 0.5 else b""
    else:
        start = dice.randrange(len(data))
        data[start:start] = data[start : start + dice.choice([1, 4, 100])]
    return bytes(data)


def resealed(data, dice):
    """A shard whose first block's record is damaged, and whose checksum fits again: what the decoder itself must refuse."""
    _, length, key, _ = struct.unpack_from("<4sI16sI", data)
    record = zstandard.ZstdDecompressor().decompress(data[28 : 28 + length])
    if dice.random() < 0.3:  # sizes that no record has
        numbers = bytearray(record)
        struct.pack_into("<I", numbers, 4 * dice.randrange(6), dice.choice([0, 1, 2**16, 2**24, 2**31, 2**32 - 1]))
        record = bytes(numbers)
    else:
        record = damaged(record, dice)
    payload = zstandard.ZstdCompressor().compress(record)
    if dice.random() < 0.1:
        payload = damaged(payload, dice)
    payload = payload[:length].ljust(length, b"\0")  # the journal's lengths still hold
    head = struct.pack("<4sI16s", b"FLGB", length, key)
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload + data[28 + length :]


def resealed_tables(data, dice):
    """Tables whose content is damaged and whose checksum fits again."""
    body = zstandard.ZstdDecompressor().decompress(data[16:])
    head = data[8:16] if dice.random() < 0.7 else damaged(data[8:16], dice)[:8].ljust(8, b"\0")
    rest = head + zstandard.ZstdCompressor().compress(damaged(body, dice))
    return data[:4] + struct.pack("<I", zlib.crc32(rest)) + rest


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_damaged_stores_are_refused_or_whole(tmp_path, name):
    dice = random.Random(name)
    store = tmp_path / "store"
    shutil.copytree(GOLDEN / name / "store", store)
    wanted = expected(name)
    originals = {path: path.read_bytes() for path in store.iterdir() if path.stat().st_size}
    paths = sorted(originals)

    def too_long(*_):
        raise AssertionError("a damaged store took too long")

    before = signal.signal(signal.SIGALRM, too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    refused = whole = 0
    try:
        for case in range(CASES):
            path = dice.choice(paths)
            data = originals[path]
            forge = {".flb": resealed, ".flt": resealed_tables}.get(path.suffix) if dice.random() < 0.7 else None
            path.write_bytes((forge or damaged)(data, dice))
            signal.alarm(SECONDS)
            try:
                opened = SoftLabelStore(store)
                assert all(opened.verify())
                if name != "version-1":  # it had none
                    opened.spelling()
                found = contents(opened)
            except StoreError as error:
                refused += len(str(error)) > 20
            else:
                # With a checksum that fits again, other labels cannot be told from the teacher's; but labels they are.
                assert forge or found == wanted, (case, path.name)
                whole += 1
            finally:
                signal.alarm(0)
                path.write_bytes(data)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
    assert refused > 0.9 * CASES, (refused, whole)
