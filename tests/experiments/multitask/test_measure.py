"""The benchmark's measurements, on a tiny model and tables in the form of the sets'."""

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.multitask import measure


@pytest.fixture
def course(tmp_path, monkeypatch, text_file):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))
    rows = [f"number {place} is {('even', 'odd')[place % 2]}\t{place % 2}" for place in range(40)]
    for folder, names in {"sst2": ("train_a.tsv", "validation.tsv"), "ag_news": ("train_10k_desc.tsv", "test_desc.tsv")}.items():
        (tmp_path / folder).mkdir()
        head = ["sentence\tlabel"] if folder == "sst2" else []
        for name in names:
            (tmp_path / folder / name).write_text("\n".join([*head, *rows]) + "\n")
    (tmp_path / "wikitext2").mkdir()
    for split in ("valid", "test"):
        (tmp_path / f"wikitext2/{split}.raw.txt").write_text(text_file.read_text().replace(" sand", ".\n\nSand"))
    sizes = {"rows": 2, "steps": 2, "rate": 1e-3, "length": 32, "layers": 1, "limit": 6, "seed": 0}
    return {"source": "random:tiny", "data": str(tmp_path), "tasks": "sst2,ag_news", "precision": "32-true", **sizes}


def test_gains_are_over_training_alone(course, monkeypatch):
    alone = measure.training(combination="alone", **course)
    assert alone["gain"] == alone["val_gain"] == alone["gain_sst2"] == 0.0
    runs = []
    real = measure.Course.run
    monkeypatch.setattr(measure.Course, "run", lambda self, *words, **more: runs.append(words) or real(self, *words, **more))
    found = measure.training(combination="features", **course)
    assert runs == [(["sst2", "ag_news"], "features")]  # what was trained alone is kept
    gains = [found[f"test_{name}"] / alone[f"test_{name}"] - 1 for name in ("sst2", "ag_news")]
    assert found["gain"] == pytest.approx(sum(gains) / 2)
    assert found["gain_ag_news"] == pytest.approx(gains[1])
    assert found["tokens"] > 0


def test_words_have_a_loss_and_tasks_can_be_added(course):
    found = measure.training(combination="sum", schedule=True, **{**course, "tasks": "words,sst2", "steps": 4})
    assert found["test_words"] > 1
    assert found["gain"] == found["gain_sst2"]


def test_tasks_that_join_later_come_to_as_many_examples():
    starts = {"one": 0, "two": 3, "three": 10}
    shares = measure.even_shares(starts, 40)
    drawn = dict.fromkeys(starts, 0.0)
    for step in range(40):
        there = [name for name in starts if starts[name] <= step]
        for name in there:
            drawn[name] += shares[name] / sum(shares[other] for other in there)
    assert list(drawn.values()) == pytest.approx([40 / 3] * 3)
    assert set(measure.even_shares(dict.fromkeys(starts, 0), 40).values()) == {1.0}


def test_steps_are_timed_and_weighed(course):
    found = measure.step(combination="upgrad", rounds=1, **course)
    assert found["times_as_long"] == pytest.approx(found["seconds"] / found["sum_seconds"])
    assert measure.one_task_memory(tasks_held=2, **course)["bytes"] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": "sst"}, "tasks has 'sst'"), ({"combination": "max"}, "combination='max' is unknown")],
)
def test_unknown_names_are_refused(course, change, message):
    with pytest.raises(InputError, match=message):
        measure.training(**{"combination": "sum", **course, **change})
