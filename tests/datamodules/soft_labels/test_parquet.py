"""Labels as Parquet: what goes out comes in again, and what is none is refused."""

import math

import numpy as np
import pytest

from fulgurite.datamodules.soft_labels import SoftLabelStore, StoreError
from fulgurite.datamodules.soft_labels.codec import of_bfloat16
from fulgurite.datamodules.soft_labels.parquet import export_parquet, import_parquet
from fulgurite.errors import InputError
from tests.datamodules.soft_labels.test_aligned import SPELLED, store_of
from tests.datamodules.soft_labels.test_golden import GOLDEN
from tests.vocabularies import TOKENIZERS

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def taken(tmp_path, file="labels.parquet", **settings):
    return import_parquet(
        tmp_path / file, tmp_path / "again", **{"teacher": "a teacher", "tokenizer": TOKENIZERS["large"], **settings}
    )


def test_what_goes_out_comes_in_again(tmp_path):
    store, sequence = store_of(tmp_path / "s", "large", ["the sand was grün 雷", "and the glass was green"])
    assert export_parquet(store, tmp_path / "labels.parquet") == 1
    assert taken(tmp_path) == 1
    assert taken(tmp_path) == 1  # once more changes nothing
    again = SoftLabelStore(tmp_path / "again")
    assert again.header.vocabulary == store.header.vocabulary
    assert len(list(again.verify())) == 1
    assert again.spelling() == SPELLED["large"]
    found = again.read(again.keys[0])
    with_labels = np.flatnonzero(sequence.counts)
    np.testing.assert_array_equal(found.tokens, sequence.tokens)
    np.testing.assert_array_equal(found.starts, sequence.starts)
    np.testing.assert_array_equal(found.supervised.nonzero()[0], sequence.supervised.nonzero()[0][with_labels])
    np.testing.assert_array_equal(found.counts, sequence.counts[with_labels])
    realised = of_bfloat16(sequence.realised)[with_labels]
    np.testing.assert_allclose(of_bfloat16(found.realised), realised, atol=1 / 30, rtol=0.01)
    ends = np.cumsum(found.counts)[:-1].astype(int)
    for ours, theirs in zip(np.split(found.ids, ends), np.split(sequence.ids, ends)):
        assert set(ours) == set(theirs)


def test_datasets_reads_what_goes_out(tmp_path):
    datasets = pytest.importorskip("datasets")
    store, sequence = store_of(tmp_path / "s", "large", ["the sand was grün 雷"])
    export_parquet(store, tmp_path / "labels.parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "labels.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert rows[0]["input_ids"] == sequence.tokens.tolist()
    assert sum(len(part) for part in rows[0]["top_ids"]) == len(sequence.ids)
    assert [part is None for part in rows[0]["tail"]] == (~sequence.supervised).tolist()


def dump(tmp_path, **changes):
    """What an inference server says of a prompt of four tokens."""
    row = {
        "input_ids": [5, 6, 7, 8],
        "top_ids": [[6, 9], [1, 2, 7], [8], []],
        "top_log_probabilities": [[-0.5, -2.0], [-3.0, -1.0, -1.5], [-0.1], []],
        **changes,
    }
    parquet.write_table(
        pyarrow.Table.from_pylist([{name: part for name, part in row.items() if part is not None}]), tmp_path / "d.parquet"
    )


NOTHING_LAST = {"top_ids": [[6, 9], [1, 2, 7], [8]], "top_log_probabilities": [[-0.5, -2.0], [-3.0, -1.0, -1.5], [-0.1]]}


def test_log_probabilities_of_a_server_become_labels(tmp_path):
    dump(tmp_path, **{name: [*values, None] for name, values in NOTHING_LAST.items()})
    assert taken(tmp_path, "d.parquet") == 1
    store = SoftLabelStore(tmp_path / "again")
    labels = store.example(store.keys[0])["soft_labels"]
    assert labels.ids.tolist() == [[6, 9, -1], [2, 7, 1], [8, -1, -1]]
    assert labels.realised.float().tolist() == pytest.approx([-0.5, -1.5, -0.1], abs=0.02)
    assert float(labels.probabilities[0, 0]) == pytest.approx(math.exp(-0.5), abs=0.02)
    assert float(labels.tail[2]) == pytest.approx(1 - math.exp(-0.1), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ids": None}, "has no column top_ids"),
        ({"top_ids": [[], [], [], []], "top_log_probabilities": [[], [], [], []]}, "every entry of top_ids is empty"),
        ({"input_ids": []}, "row 0: input_ids is empty"),
        ({"top_ids": [[6, 9], [1, 2, 7], [8]]}, "4 input_ids, 3 top_ids"),
        ({"top_ids": [[6], [1, 2, 7], [8], []]}, "differ at a token"),
        ({"top_ids": [[6, 6], [1, 2, 7], [8], []]}, "the same id twice"),
        ({"top_ids": [[6, 10**6], [1, 2, 7], [8], []]}, "outside the vocabulary of"),
        ({"input_ids": [5, 9, 7, 10**6]}, "input_ids has an id outside"),
        ({"top_log_probabilities": [[-0.5, -0.1], [-3.0, -1.0, -1.5], [-0.1], []]}, "add up to more than 1"),
        ({"top_log_probabilities": [[-0.5, float("nan")], [-3.0, -1.0, -1.5], [-0.1], []]}, "not numbers"),
        ({"log_probabilities": [0.5, -1.0, -1.0, None]}, "0.5 is no log-probability"),
        ({"log_probabilities": [float("nan"), -1.0, -1.0, None]}, "nan is no log-probability"),
        ({"log_probabilities": [-1.0]}, "not of the type"),
        ({"starts": [0, 9]}, r"starts=\[0, 9\] are no beginnings"),
        ({"starts": [0, 2, 1]}, "are no beginnings"),
        ({"starts": [-1]}, "are no beginnings"),
        ({"input_ids": [5.5, 6, 7, 8]}, "need whole numbers"),
        ({"top_ids": [6, 7, 8, 9]}, "has top_ids: list<.*Needed: input_ids as lists"),
        ({"top_ids": [[4, 9], [1, 2, 7], [8], []]}, "behind token 0 is not among its top_ids"),
    ],
)
def test_what_is_no_labels_is_refused_before_anything_is_written(tmp_path, changes, message):
    dump(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        taken(tmp_path, "d.parquet")
    assert not (tmp_path / "again").exists()


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match="is no file"):
        taken(tmp_path, "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        taken(tmp_path, "broken.parquet")


def test_samples_are_not_taken_for_the_likeliest(tmp_path):
    store = SoftLabelStore(GOLDEN / "version-2-sampled" / "store")
    export_parquet(store, tmp_path / "labels.parquet")
    with pytest.raises(InputError, match="selection='sampled', which are samples, not"):
        taken(tmp_path)


def test_labels_of_another_teacher_do_not_mix(tmp_path):
    dump(tmp_path)
    taken(tmp_path, "d.parquet")
    with pytest.raises(StoreError, match="teacher is a teacher there, another here"):
        taken(tmp_path, "d.parquet", teacher="another")
