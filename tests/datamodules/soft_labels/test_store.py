import errno
import json
import os

import numpy as np
import pytest

from fulgurite.datamodules.soft_labels import SoftLabelAppender, SoftLabelStore, StoredSequence, StoreError, StoreHeader
from fulgurite.datamodules.soft_labels import appender as module
from fulgurite.modules.distillation import LabelSettings

VOCABULARY = 50


def header(**changes):
    fields = {"teacher": "a teacher", "teacher_fingerprint": "t" * 32, "tokenizer_fingerprint": "k" * 32, "codec": "plain-1"}
    return StoreHeader(**{**fields, "vocabulary": VOCABULARY, "settings": LabelSettings(k=3), "weights": "float32", **changes})


def sequence(seed, length=12):
    random = np.random.default_rng(seed)
    supervised = np.ones(length, dtype=bool)
    supervised[-1] = False
    count = length - 1
    half = np.array([0.5, 0.25, 0.125], dtype=np.float32)
    bits = (half.view(np.uint32) >> 16).astype(np.uint16)
    eighth = (np.float32(0.125).reshape(1).view(np.uint32) >> 16).astype(np.uint16)
    made = StoredSequence(
        tokens=random.integers(0, VOCABULARY, length).astype(np.uint32),
        starts=np.array([0, 5], dtype=np.uint32),
        supervised=supervised,
        counts=np.full(count, 3, dtype=np.uint32),
        ids=random.integers(0, VOCABULARY, 3 * count).astype(np.uint32),
        probabilities=np.tile(bits, count),
        tail=np.repeat(eighth, count),
        realised=np.zeros(count, dtype=np.uint16),
    )
    return header().key(made.tokens, made.starts, made.supervised), made


def write(folder, seeds, **settings):
    appender = SoftLabelAppender(folder, header(), **settings)
    for seed in seeds:
        appender.append([sequence(seed)])
    appender.close()
    return SoftLabelStore(folder)


def assert_equal(store, seeds):
    assert len(store) == len(seeds)
    for seed in seeds:
        key, expected = sequence(seed)
        found = store.read(key)
        for name in vars(expected):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_sequences_are_found_by_their_keys(tmp_path):
    store = write(tmp_path / "s", range(20), shard_bytes=1000)
    assert_equal(store, range(20))
    assert len(list((tmp_path / "s").glob("*.flb"))) > 2
    assert len(list(store.verify())) == 20
    assert list(store.keys) == [sequence(seed)[0] for seed in range(20)]


def test_example_rebuilds_positions_and_labels(tmp_path):
    store = write(tmp_path / "s", [1])
    example = store.example(store.keys[0])
    assert example["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert example["labels"][0] == -100
    assert example["labels"][1:].tolist() == example["input_ids"][1:].tolist()
    labels = example["soft_labels"]
    assert labels.ids.shape == (11, 3)
    assert labels.probabilities[0].tolist() == [0.5, 0.25, 0.125]
    assert labels.tail.tolist() == [0.125] * 11


def test_appending_goes_on_and_never_writes_twice(tmp_path):
    write(tmp_path / "s", range(5))
    before = (tmp_path / "s" / "labels-00000-00000.flb").read_bytes()
    store = write(tmp_path / "s", range(8))
    assert_equal(store, range(8))
    assert (tmp_path / "s" / "labels-00000-00000.flb").read_bytes().startswith(before)
    assert len((tmp_path / "s" / "journal-00000.jsonl").read_text().splitlines()) == 8


def test_ranks_write_files_of_their_own(tmp_path):
    write(tmp_path / "s", range(3), rank=0)
    store = write(tmp_path / "s", range(2, 6), rank=1)
    assert_equal(store, range(6))
    lines = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "s").glob("journal-*.jsonl"))]
    assert lines == [3, 3]  # the sequence that both ranks had is written once


def test_the_same_sequence_of_two_ranks_is_no_damage(tmp_path):
    writers = [SoftLabelAppender(tmp_path / "s", header(), rank=rank) for rank in range(2)]
    for writer in writers:
        writer.append([sequence(0)])
        writer.close()
    store = SoftLabelStore(tmp_path / "s")
    assert len(list(store.verify())) == len(store) == 1


def test_damage_in_the_middle_of_what_no_journal_names_cuts_nothing_off(tmp_path):
    write(tmp_path / "s", range(4))
    (tmp_path / "s" / "journal-00000.jsonl").unlink()
    shard = tmp_path / "s" / "labels-00000-00000.flb"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged, and whole ones follow it"):
        SoftLabelAppender(tmp_path / "s", header())
    assert shard.read_bytes() == bytes(data)


@pytest.mark.parametrize("cut", [1, 10, 40])
@pytest.mark.parametrize("extra", [0, 7])
def test_half_written_tail_is_cut_off(tmp_path, cut, extra):
    whole = tmp_path / "whole"
    write(whole, range(6))
    folder = tmp_path / "s"
    write(folder, range(6))
    journal, shard = folder / "journal-00000.jsonl", folder / "labels-00000-00000.flb"
    os.truncate(journal, journal.stat().st_size - cut)  # killed while the journal's line was written
    with open(shard, "ab") as file:
        file.write(b"x" * extra)  # or while a block was written
    assert_equal(SoftLabelStore(folder), range(5))
    assert_equal(write(folder, range(6)), range(6))
    for name in (journal.name, shard.name):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_lost_journal_is_made_anew_from_the_blocks(tmp_path):
    whole = write(tmp_path / "whole", range(9), shard_bytes=1000)
    folder = tmp_path / "s"
    write(folder, range(9), shard_bytes=1000)
    (folder / "journal-00000.jsonl").unlink()
    with pytest.raises(StoreError, match="no journal names its last"):
        list(SoftLabelStore(folder).verify())
    assert_equal(write(folder, range(9), shard_bytes=1000), range(9))
    for file in whole.folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_killed_between_shards(tmp_path):
    whole = write(tmp_path / "whole", range(9), shard_bytes=1000)
    folder = tmp_path / "s"
    write(folder, range(6), shard_bytes=1000)
    (folder / "labels-00000-00099.flb").write_bytes(b"a shard that no line names")
    assert_equal(write(folder, range(9), shard_bytes=1000), range(9))
    for file in whole.folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_every_flipped_byte_is_noticed(tmp_path):
    write(tmp_path / "s", [0])
    shard = tmp_path / "s" / "labels-00000-00000.flb"
    data = shard.read_bytes()
    for place in range(len(data)):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"labels-00000-00000\.flb at byte 0.*capture again"):
            list(SoftLabelStore(tmp_path / "s").verify())


@pytest.mark.parametrize("place", [0, 12, 60])
def test_flipped_byte_in_the_journal_is_noticed(tmp_path, place):
    write(tmp_path / "s", range(3))
    journal = tmp_path / "s" / "journal-00000.jsonl"
    data = bytearray(journal.read_bytes())
    data[place] ^= 1
    journal.write_bytes(data)
    with pytest.raises(StoreError, match=r"journal-00000\.jsonl, line 1"):
        SoftLabelStore(tmp_path / "s")


def test_truncated_shard_is_refused(tmp_path):
    store = write(tmp_path / "s", range(3))
    shard = tmp_path / "s" / "labels-00000-00000.flb"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(StoreError, match="truncated"):
        SoftLabelStore(store.folder)
    shard.unlink()
    with pytest.raises(StoreError, match="truncated"):
        SoftLabelStore(store.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_fingerprint": "u" * 32}, "teacher_fingerprint is ttt"),
        ({"tokenizer_fingerprint": "u" * 32}, "tokenizer_fingerprint"),
        ({"settings": LabelSettings(k=4)}, "settings"),
    ],
)
def test_store_of_another_making_is_refused(tmp_path, change, message):
    write(tmp_path / "s", [0])
    with pytest.raises(StoreError, match=message):
        SoftLabelAppender(tmp_path / "s", header(**change))
    assert_equal(SoftLabelStore(tmp_path / "s"), [0])


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="holds other files"):
        SoftLabelAppender(tmp_path, header())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_second_writer_is_refused(tmp_path):
    appender = SoftLabelAppender(tmp_path / "s", header())
    with pytest.raises(StoreError, match="another process"):
        SoftLabelAppender(tmp_path / "s", header())
    appender.close()


@pytest.mark.parametrize("fails_at", ["labels", "journal"])
def test_full_disk_leaves_a_whole_store(tmp_path, monkeypatch, fails_at):
    appender = SoftLabelAppender(tmp_path / "s", header())
    appender.append([sequence(0)])
    write_bytes = module._write

    def full(file, data):
        if fails_at in os.path.basename(file.name):
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(file, data)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(StoreError, match=r"disk of .* is full.*run the same command again"):
        appender.append([sequence(1)])
    appender.close()
    monkeypatch.undo()
    assert_equal(SoftLabelStore(tmp_path / "s"), [0])
    assert_equal(write(tmp_path / "s", range(3)), range(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": "something", "version": 1}', "not the header"),
        (None, "format version 99"),
        ("codec", "codec='other' is unknown"),
        ("teacher", "checksum does not fit"),
    ],
)
def test_other_headers_are_refused(tmp_path, content, message):
    write(tmp_path / "s", [0])
    path = tmp_path / "s" / "header.json"
    fields = json.loads(path.read_text())
    if content is None:
        content = json.dumps({**fields, "version": 99})
    elif content == "codec":
        content = json.dumps({**fields, "version": 1, "codec": "other"})
    elif content == "teacher":
        content = json.dumps({**fields, "teacher": "another"})
    path.write_text(content)
    with pytest.raises(StoreError, match=message):
        SoftLabelStore(tmp_path / "s")


def test_missing_store_is_named(tmp_path):
    with pytest.raises(StoreError, match="holds no soft-label store"):
        SoftLabelStore(tmp_path / "none")


def test_stats_count_what_was_written(tmp_path):
    stats = write(tmp_path / "s", range(4)).stats().summary()
    assert (stats["sequences"], stats["tokens"], stats["labelled_tokens"]) == (4, 48, 44)
    assert stats["labels_per_token"] == {"mean": 3, "p99": 3, "least": 3, "most": 3}
    assert stats["mass_kept"]["mean"] == pytest.approx(0.875)
    columns = stats["bytes_per_labelled_token_by_column"]
    assert columns == {"counts": 4, "ids": pytest.approx(3 * 9 / 8, abs=0.1), "values": 6, "tail": 2, "realised": 2, **columns}
    assert columns["all_labels"] == pytest.approx(sum(columns.values()) / 2)
    assert stats["error_bound_nats"]["most"] == 0
    size = (tmp_path / "s" / "labels-00000-00000.flb").stat().st_size
    assert stats["bytes_per_labelled_token"] == pytest.approx(size / 44)
