"""What the user gives, and the examples that come of it."""

import collections
import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fulgurite.datamodules import (
    ClassificationTask,
    GenerationTask,
    MultiTaskDataModule,
    RegressionTask,
    TaggingTask,
    TextTask,
)
from fulgurite.datamodules.multitask import TableRows, read_table
from fulgurite.datamodules.multitask.self_supervised import ORDERS
from fulgurite.errors import InputError
from fulgurite.modules.tiny import tiny_tokenizer


def table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def opened(task, name="task"):
    task.open(name, tiny_tokenizer(), 0)
    return task


def text_of(ids):
    return tiny_tokenizer().decode(ids)


SENTIMENTS = [{"text": f"it is {kind} {number}", "label": kind} for number in range(10) for kind in ("good", "bad")]


def test_rows_of_all_files_are_the_same(tmp_path):
    rows = [{"text": 'say "yes", or', "label": "1"}, {"text": "no", "label": "0"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bare.tsv").write_text('say "yes", or\t1\nno\t0\n')
    assert read_table(table(tmp_path / "a.csv", rows), "train") == rows
    assert read_table(str(tmp_path / "a.jsonl"), "train") == rows
    assert read_table(str(tmp_path / "bare.tsv"), "train", ["text", "label"]) == rows


def test_classes_are_those_of_the_training_rows(tmp_path):
    task = opened(ClassificationTask(TableRows(table(tmp_path / "a.csv", SENTIMENTS)), length=32))
    assert task.objectives["task"].classes == ("bad", "good")
    assert task.size("train") + task.size("val") == 20
    assert task.size("val") == task.size("test") == 2
    texts = set()
    for split in ("train", "val"):
        for index in range(task.size(split)):
            (part,) = task.example(split, index, 0)
            assert part.mask == "bidirectional"
            assert ("good" in text_of(part.input_ids)) == (part.targets["task"] == 1)
            texts.add(text_of(part.input_ids))
    assert len(texts) == 20  # what is held out is not trained on


def test_readable_names_stand_for_classes(tmp_path):
    rows = TableRows(table(tmp_path / "a.csv", SENTIMENTS))
    task = opened(ClassificationTask(rows, classes={"good": "positive", "bad": "negative"}))
    assert task.objectives["task"].classes == ("positive", "negative")


def test_a_pair_is_one_text(tmp_path):
    rows = [{"one": "a", "two": f"b{number}", "label": number % 2} for number in range(6)]
    task = opened(ClassificationTask(TableRows(table(tmp_path / "a.tsv", rows, "\t")), text="one", pair="two"))
    assert text_of(task.example("train", 0, 0)[0].input_ids).startswith("a\nb")
    numbers = opened(RegressionTask(TableRows(table(tmp_path / "a.tsv", rows, "\t")), text="one", pair="two"))
    assert isinstance(numbers.example("train", 0, 0)[0].targets["task"], float)


def test_the_first_token_of_a_word_carries_its_tag(tmp_path):
    rows = [{"tokens": ["ab", "c"], "tags": ["X", "Y"]}, {"tokens": "de f", "tags": "X Y"}, {"tokens": "g", "tags": "Y"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(TaggingTask(TableRows(str(tmp_path / "a.jsonl"))))
    found = {
        text_of(part.input_ids): part.targets["task"]
        for split in ("train", "val")
        for index in range(task.size(split))
        for part in task.example(split, index, 0)
    }
    assert found["ab c"] == [0, -100, 1, -100]  # " c" are two bytes
    assert found["g"] == [1]


def test_a_run_goes_on_with_other_rows_to_test_and_to_predict_but_not_to_train(tmp_path):
    rows, more = table(tmp_path / "a.csv", SENTIMENTS), table(tmp_path / "b.csv", SENTIMENTS[2:])

    def content(train, **others):
        data = MultiTaskDataModule({"one": ClassificationTask(TableRows(train, **others))}, tokenizer="random:tiny")
        data.setup()
        return data.train_dataloader().content

    assert content(rows) == content(rows, test=more, predict=more) != content(more)


def test_numbers_are_classes_by_size(tmp_path):
    rows = [{"text": f"{number}", "label": number % 11} for number in range(40)]
    task = opened(ClassificationTask(TableRows(table(tmp_path / "a.csv", rows), val=table(tmp_path / "b.csv", rows))))
    assert task.objectives["task"].classes == tuple(map(str, range(11)))


def test_rows_to_predict_need_no_label_and_keep_their_order(tmp_path):
    labelled, plain = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = [{"text": f"a b{number}", "label": number % 2, "tags": "X Y", "prompt": "p", "response": "r"} for number in range(6)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("".join(json.dumps({"text": f"c {number}", "prompt": f"p{number}"}) + "\n" for number in range(12)))
    data = TableRows(str(labelled), predict=str(plain), val_rows=1)
    makes = {
        "class": ClassificationTask(data),
        "number": RegressionTask(data),
        "tags": TaggingTask(data, words="text"),
        "text": GenerationTask(data),
    }
    found = {name: [opened(task).example("predict", index, 0)[0] for index in range(12)] for name, task in makes.items()}
    assert all(task.size("predict") == 12 and task.size("test") == 1 for task in makes.values())
    for name in ("class", "number", "tags"):
        assert [text_of(part.input_ids) for part in found[name]] == [f"c {number}" for number in range(12)]
    assert {part.targets["task"] for part in found["class"]} == {-100}
    assert all(np.isnan(part.targets["task"]) for part in found["number"])
    assert [target != -100 for target in found["tags"][0].targets["task"]] == [True, True, False]
    assert [text_of(part.input_ids) for part in found["text"]] == [f"p{number}\n" for number in range(12)]
    assert set(found["text"][0].targets["task"]) == {-100}


def test_of_a_long_pair_both_are_kept_and_of_a_long_prompt_its_end(tmp_path):
    rows = [{"text": "a" * 50, "pair": "b" * 50, "label": number % 2, "response": "yes"} for number in range(6)]
    data = TableRows(table(tmp_path / "a.csv", rows))
    pair = opened(ClassificationTask(data, pair="pair", length=20))
    assert text_of(pair.example("train", 0, 0)[0].input_ids) == "a" * 10 + "b" * 10
    prompt = opened(GenerationTask(data, prompt="text", template="Q: {prompt}? A:", length=20))
    assert text_of(prompt.example("train", 0, 0)[0].input_ids) == "a" * 12 + "? A:yes<|end|>"


def test_only_the_response_is_learnt(tmp_path):
    rows = [{"prompt": "2+2", "response": "four"}, {"prompt": "x" * 90, "response": "y" * 90}, {"prompt": "1", "response": "one"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(GenerationTask(TableRows(str(tmp_path / "a.jsonl")), length=40))
    for split in ("train", "val"):
        for index in range(task.size(split)):
            (part,) = task.example(split, index, 0)
            learnt = [token for token in part.targets["task"] if token != -100]
            assert part.mask == "causal"
            assert len(part.input_ids) == len(part.targets["task"]) <= 40
            assert part.input_ids[-len(learnt) :] == learnt
            assert len(learnt) >= 4  # also where the prompt alone is longer


DOCUMENT = "The sand lay there. Then lightning struck it! Was it glass? It was. The tube is hollow. It is hard, too."


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": DOCUMENT.replace("s", f"s{number}")} for number in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "texts.jsonl")


def test_text_is_learnt_as_it_stands(texts):
    task = opened(TextTask(texts, length=200, aims=["next_words"]))
    found = {text_of(task.example("train", index, 0)[0].input_ids) for index in range(task.size("train"))}
    written = [" " + json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    assert all(any(whole.endswith(part) for whole in written) for part in found)
    assert sum(whole in found for whole in written) >= 8  # those that are trained on, from their begin


def test_text_sets_its_own_tasks(texts):
    task = opened(TextTask(texts, length=90, val_rows=5))
    assert [own.kind for own in task.objectives.values()] == ["next_token", "masked_token", "sequence", "sequence"]
    assert task.objectives["task/order"].classes == ("1", "12", "21", "123", "132", "213", "231", "312", "321")
    distances, orders = set(), set()
    for draw in range(300):
        causal, understood = task.example("train", draw % task.size("train"), draw)
        assert causal.input_ids == causal.targets["task/next_words"]
        targets = understood.targets
        hidden = [place for place, one in enumerate(targets["task/masked_words"]) if one != -100]
        assert hidden
        assert len(hidden) <= len(understood.input_ids)
        distances.add(targets["task/distance"])
        orders.add(targets["task/order"])
        if targets["task/distance"] in (1, 2):
            assert targets["task/order"] == -100
        assert max(len(causal.input_ids), len(understood.input_ids)) <= 90
    assert distances == {0, 1, 2, -100}
    assert orders == {-100, *range(len(ORDERS))}


def test_documents_that_are_left_out_are_said(texts, caplog):
    caplog.set_level("INFO")
    opened(TextTask(texts, length=90, val_rows=5))
    assert "leaves" not in caplog.text
    task = opened(TextTask(texts, length=90, val_rows=5, train_tokens=500))
    total = len(Path(texts).read_text().splitlines())
    read = len(task.documents["train"]) + len(task.documents["val"])
    assert f"leaves {total - read} of {total} documents of train='{texts}' out, as train_tokens=500" in caplog.text


def test_long_sentences_are_read_to_their_end(tmp_path):
    words = [f"w{number}" for number in range(200)]
    rows = [{"text": f"{' '.join(words)}. The end {number}."} for number in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = opened(TextTask(str(tmp_path / "a.jsonl"), length=60))
    for document in task.documents["train"]:
        assert max(map(len, document)) <= 60 // 3 - 2
        assert all(text_of(segment).startswith(" ") for segment in document)  # parted between words
        assert text_of([token for segment in document for token in segment]).split()[:199] == words[:199]


@pytest.mark.parametrize("aim", ["distance", "order"])
def test_aims_whose_classes_cannot_occur_are_refused(tmp_path, aim):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"short {number}"}) + "\n" for number in range(9)))
    with pytest.raises(InputError, match=f"aims has '{aim}', but train=.* has 8 documents, the longest of 1 segments"):
        opened(TextTask(str(tmp_path / "a.jsonl"), aims=["next_words", aim]))


def test_distance_and_order_are_true(texts):
    task = opened(TextTask(texts, length=200, aims=["distance", "order"]))
    segments = {
        tuple(one): (number, place) for number, own in enumerate(task.documents["train"]) for place, one in enumerate(own)
    }
    for draw in range(300):
        (part,) = task.example("train", draw % task.size("train"), draw)
        ids, found, segment = part.input_ids, [], []
        for token in [*ids, task.between]:
            if token == task.between:
                found.append(segments[tuple(segment)])
                segment = []
            else:
                segment.append(token)
        (first, *rest) = found
        target = part.targets["task/distance"]
        if target == 2:
            assert first[0] != rest[0][0]
        elif target == 1:
            assert first[0] == rest[0][0]
            assert abs(first[1] - rest[0][1]) > 1
        else:
            assert target == (0 if len(found) == 2 else -100), "the number of segments would tell the distance"
            places = [place for _, place in found]
            assert {number for number, _ in found} == {first[0]}
            assert ORDERS[part.targets["task/order"]] == tuple(place - min(places) for place in places)


@pytest.mark.parametrize(("aims", "kinds"), [(["distance", "order"], 5), (["distance"], 3), (["order"], 3)])
def test_few_draws_have_every_kind_alike(texts, aims, kinds):
    task = opened(TextTask(texts, length=90, aims=aims))
    index = next(place for place, (_, start) in enumerate(task.places["train"]) if start == 0)
    found = {aim: collections.Counter() for aim in aims}
    for turn in range(20):
        parts = [task.example("train", index, draw)[0].targets for draw in range(turn * kinds, (turn + 1) * kinds)]
        for aim in aims:
            found[aim].update(own := [targets[f"task/{aim}"] for targets in parts if targets[f"task/{aim}"] != -100])
            assert len(own) == 3
    if "distance" in aims:
        assert found["distance"] == {0: 20, 1: 20, 2: 20}
    if "order" in aims:
        assert found["order"][0] == 20  # one segment; as many have two, and three


def test_whole_words_are_masked(texts):
    task = opened(TextTask(texts, length=60, aims=["masked_words"], masked=0.3))
    masked, words = 0, 0
    for draw in range(200):
        (part,) = task.example("train", draw % task.size("train"), draw)
        original = [
            target if target != -100 else token for token, target in zip(part.input_ids, part.targets["task/masked_words"])
        ]
        hidden = np.array(part.targets["task/masked_words"]) != -100
        for place in range(1, len(original)):
            if task.between not in original[place - 1 : place + 1] and not task.begins[original[place]]:
                assert hidden[place] == hidden[place - 1]  # a word is masked as a whole
        begins = np.array([place == 0 or task.begins[token] for place, token in enumerate(original)])
        words += int(begins.sum())
        masked += int((hidden & begins).sum())
    assert 0.25 < masked / words < 0.42


def test_examples_depend_on_seed_and_draw_alone(texts):
    one, two = (opened(TextTask(texts, length=60)) for _ in range(2))
    assert one.example("train", 3, 7) == two.example("train", 3, 7)
    assert one.example("train", 3, 7) != one.example("train", 3, 8)
    assert one.example("val", 1, 1) == two.example("val", 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: ClassificationTask(TableRows("none.csv")), "train='none.csv' is no file here. Legal: a .csv"),
        (lambda rows: ClassificationTask(TableRows("none.xls")), "train='none.xls' has no rows. Legal: a .csv, .tsv"),
        (lambda rows: ClassificationTask(TableRows(rows), text="body"), "row 1: no column text='body'"),
        (
            lambda rows: ClassificationTask(TableRows(rows), classes=["good", "awful"]),
            "label='bad' is none of the classes good, awful",
        ),
        (lambda rows: ClassificationTask(TableRows(rows), classes=["good", "bad", "odd"]), "no training row has the class 'odd'"),
        (lambda rows: ClassificationTask(TableRows(rows), classes=["good"]), "there have to be two or more"),
        (lambda rows: ClassificationTask(TableRows(rows, val_fraction=1.0)), "val_fraction=1.0 is no share"),
        (lambda rows: ClassificationTask(TableRows(rows, train_rows=0)), "train_rows=0 holds no row"),
        (lambda rows: ClassificationTask(TableRows(rows), length=2), "length=2 holds no text"),
        (lambda rows: ClassificationTask(TableRows(rows, columns=["a"])), "2 columns, not the 1 of a"),
        (
            lambda rows: ClassificationTask(TableRows("hub:a/b", columns=["a"])),
            "columns=['a']: train='hub:a/b' names its columns",
        ),
        (lambda rows: RegressionTask(TableRows(rows)), "label='good' is no number"),
        (lambda rows: ClassificationTask(TableRows(rows, columns=["label", "text"]), text="none"), "no column text='none'"),
        (lambda rows: TaggingTask(TableRows(rows), words="text", tags="label"), "4 words, but 1 tags"),
        (lambda rows: GenerationTask(TableRows(rows), template="Q:"), "does not say where the prompt stands"),
        (lambda rows: TextTask("package:python-docs", aims=["orders"]), "aims: 'orders' is unknown. Legal: next_words"),
        (lambda rows: TextTask("package:python-docs", masked=1.5), "masked=1.5 is no share of the words"),
    ],
)
def test_bad_tasks_are_refused_by_name(tmp_path, make, message):
    rows = table(tmp_path / "a.csv", SENTIMENTS)
    with pytest.raises(InputError) as caught:
        opened(make(rows))
    assert message in str(caught.value)


def test_a_label_that_only_validation_has_is_refused(tmp_path):
    other = table(tmp_path / "b.csv", [{"text": "x", "label": "new"}])
    task = ClassificationTask(TableRows(table(tmp_path / "a.csv", SENTIMENTS), val=other))
    with pytest.raises(InputError, match="a row of val has label='new', which no training row has"):
        opened(task)


def test_a_row_without_text_is_refused(tmp_path):
    rows = table(tmp_path / "a.csv", [*SENTIMENTS, {"text": " ", "label": "good"}])
    with pytest.raises(InputError, match="row 21: no text in the column text='text'"):
        opened(ClassificationTask(TableRows(rows)))


def test_a_row_with_other_columns_is_counted_as_all_are(tmp_path):
    rows = table(tmp_path / "a.csv", SENTIMENTS)
    with open(rows, "a") as file:
        file.write("one alone\n")
    with pytest.raises(InputError, match="row 21: 1 columns, not the 2 of text, label"):
        opened(ClassificationTask(TableRows(rows)))


def test_rows_to_predict_may_name_their_columns_beside_files_that_do_not(tmp_path):
    rows = table(tmp_path / "a.csv", SENTIMENTS)
    bare = tmp_path / "bare.csv"
    bare.write_text(Path(rows).read_text().partition("\n")[2])
    (tmp_path / "ask.csv").write_text("text\nwhat of this\n")
    (tmp_path / "ask.jsonl").write_text('{"text": "what of this"}\n')
    for ask in ("ask.csv", "ask.jsonl"):
        made = TableRows(str(bare), columns=["text", "label"], predict=str(tmp_path / ask))
        task = opened(ClassificationTask(made))
        assert [row["text"] for row in task.rows["predict"]] == ["what of this"]
        assert task.size("train") + task.size("val") == len(SENTIMENTS)


def test_a_row_without_label_is_refused(tmp_path):
    rows = table(tmp_path / "a.csv", [*SENTIMENTS, {"text": "neither", "label": ""}])
    with pytest.raises(InputError, match="row 21: no text in the column label='label', but ''. Leave the row out"):
        opened(ClassificationTask(TableRows(rows)))


def test_columns_named_alike_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,text\na,b,c\n")
    with pytest.raises(InputError, match="the column 'text' is named twice"):
        opened(ClassificationTask(TableRows(str(tmp_path / "a.csv"))))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="tasks.task.data.train=.*holds no rows"):
        opened(ClassificationTask(TableRows(str(tmp_path / "a.csv"))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"batches": "some"}, "batches='some' is unknown. Legal: mixed, task"),
        ({"temperature": 0}, "temperature=0. Legal: above 0"),
        ({"shares": {"texts": 1.0}}, "shares: give one for each task and no other"),
        ({"shares": {"text": 0.0}}, "shares.text=0.0. Legal: above 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MultiTaskDataModule(**settings)


def test_names_that_cannot_be_are_refused(texts):
    with pytest.raises(InputError, match="tasks: 'a.b' cannot be a name"):
        MultiTaskDataModule({"a.b": TextTask(texts)})
    with pytest.raises(InputError, match="batch_size=1: a mixed batch needs an example of each of the 2 tasks"):
        MultiTaskDataModule({"a": TextTask(texts), "b": TextTask(texts)}, batch_size=1)
