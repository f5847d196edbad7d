"""Tasks of classification as prompts and responses."""

import json

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.offsite.tasks import CANDIDATES, write_task


@pytest.fixture
def data(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name in ("train_b", "validation"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text(f'sentence\tlabel\na "fine {name} \t1\ndull \t0\nmore \t1\n')
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "train_5k.csv").write_text('"Sand, sold",2\n"A match",1\n')
    (tmp_path / "ag_news" / "test.csv").write_text('"4","A chip","It is ""small"""\n"1","A war","It ends"\n')
    return tmp_path


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_rows_of_both_tasks(data):
    found = write_task(task="sst2", data=str(data), folder=str(data / "one"), train_rows=2, test_rows=9)
    assert found == {"train_rows": 2, "test_rows": 3}
    first = rows(data / "one", "train")[0]
    assert first == {"prompt": 'a "fine train_b\nSentiment:', "response": " positive"}
    write_task(task="ag_news", data=str(data), folder=str(data / "two"), train_rows=9, test_rows=9)
    assert [row["response"] for row in rows(data / "two", "train")] == [" Business", " Sports"]
    assert [row["response"] for row in rows(data / "two", "test")] == [" Technology", " World"]
    assert rows(data / "two", "test")[0]["prompt"] == 'A chip It is "small"\nTopic:'
    for task, folder in (("sst2", "one"), ("ag_news", "two")):
        assert {row["response"] for row in rows(data / folder, "train")} <= set(CANDIDATES[task])


def test_held_out_rows_are_those_behind_the_rows_to_train_on(data):
    write_task(task="sst2", data=str(data), folder=str(data / "one"), train_rows=1, test_rows=9, held_out=True)
    assert [row["prompt"].split("\n")[0] for row in rows(data / "one", "train")] == ['a "fine train_b']
    assert [row["prompt"].split("\n")[0] for row in rows(data / "one", "test")] == ["dull", "more"]


def test_held_out_rows_share_no_longer_text_with_those_to_train_on(data):
    texts = [
        "a story of sand and glass",
        "of sand and glass",
        "sand",
        "a story of sand and glass twice",
        "of sand and fire",
    ]
    lines = "".join(f"{text} \t1\n" for text in texts)
    (data / "sst2" / "train_b.tsv").write_text(f"sentence\tlabel\n{lines}")
    write_task(task="sst2", data=str(data), folder=str(data / "one"), train_rows=1, test_rows=9, held_out=True)
    assert [row["prompt"].split("\n")[0] for row in rows(data / "one", "test")] == ["sand", "of sand and fire"]


def test_an_unknown_task_is_refused(data):
    with pytest.raises(InputError, match="task='sst' is unknown"):
        write_task(task="sst", data=str(data), folder=str(data), train_rows=1, test_rows=1)
