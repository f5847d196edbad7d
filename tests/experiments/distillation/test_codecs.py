"""The measurements of what labels cost and cover, on a model that reads in seconds."""

import pytest

from fulgurite.datamodules.soft_labels import SoftLabelStore
from fulgurite.experiments.distillation import codecs
from tests.datamodules.soft_labels.test_aligned import store_of


@pytest.fixture
def measured(tmp_path, monkeypatch, text_file):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))

    def run(**settings):
        given = {"seed": 0, "teacher": "random:tiny", "text": str(text_file), "tokens": 2048, "rounds": 1, **settings}
        return codecs.measure(**given)

    return run


@pytest.mark.parametrize("selection", ["fixed", "adaptive", "sampled"])
def test_every_codec_reads_what_was_selected(measured, selection):
    found = {codec: measured(selection=selection, codec=codec) for codec in ("ranked", "packed", "half")}
    assert found["half"]["kl_most"] < 1e-5
    assert found["packed"]["kl_most"] < 1e-4
    assert found["ranked"]["kl_mean"] < 2e-3
    assert found["ranked"]["beside_per_token"] == 0  # too few tokens to learn from
    assert all(part["labels_per_token"] == found["half"]["labels_per_token"] for part in found.values())
    assert all(part["bytes_per_token"] > 1 and part["decode_tokens_per_second"] > 0 for part in found.values())


def test_the_polynomial_is_small_and_coarse(measured):
    found = measured(selection="fixed", codec="polynomial")
    ids = 50 * 9 / 8  # 259 ids
    assert found["bytes_per_token"] == pytest.approx(ids + 14, abs=0.1)
    assert 0 < found["kl_mean"] < 1


def test_a_text_is_read_once(measured, monkeypatch):
    first = measured(selection="sampled", codec="half")
    monkeypatch.setattr(codecs, "teacher_states", None)
    again = measured(selection="sampled", codec="half")
    assert (again["bytes_per_token"], again["kl_mean"]) == (first["bytes_per_token"], first["kl_mean"])


def test_coverage_counts_positions_and_mass(tmp_path):
    store, _ = store_of(tmp_path / "s", "large", ["the sand was grün 雷", "and the glass was green"])
    settings = {"seed": 0, "store": str(store.folder), "student": "random:tiny"}
    found = codecs.coverage(alignment="vocabulary", **settings)
    assert found["exact_mass"] + found["piece_mass"] + found["tail_mass"] == pytest.approx(1)
    assert 0 < found["positions"] < 0.9  # bytes within the teacher's tokens have no labels
    assert 0 < found["in_chunks"] <= 1
    assert set(codecs.coverage(alignment="positions", **settings)) == {"positions", "in_chunks"}
    assert len(SoftLabelStore(tmp_path / "s")) == 1
