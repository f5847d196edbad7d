"""Rows of parties: every row once, alike or unlike shares, and the embedded task."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.datamodules import PartyDataModule
from fulgurite.datamodules import python_docs as embedded
from fulgurite.datamodules.documents import read_rows
from fulgurite.datamodules.parties import share_of
from fulgurite.errors import InputError


@given(
    rows=st.lists(st.tuples(st.text(max_size=3), st.sampled_from("abc")), max_size=40),
    parties=st.integers(1, 5),
    alpha=st.none() | st.floats(0.05, 50),
    seed=st.integers(0, 99),
)
def test_the_shares_have_each_row_once(rows, parties, alpha, seed):
    shares = [share_of(rows, party, parties, alpha, seed) for party in range(parties)]
    assert Counter(row for share in shares for row in share) == Counter(rows)
    if alpha is None:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_small_alpha_makes_unlike_parties():
    rows = [(str(number), "ab"[number % 2]) for number in range(400)]

    def unlike(alpha):
        counts = [Counter(answer for _, answer in share_of(rows, party, 4, alpha, 0)) for party in range(4)]
        return sum(abs(count["a"] - count["b"]) for count in counts) / len(rows)

    assert unlike(None) < unlike(100.0) + 0.1 < unlike(0.1)


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"is it {n}?", "response": "ab"[n % 2]}) + "\n" for n in range(20)))
    return str(path)


def test_parties_train_on_their_shares_and_validate_on_the_same_rows(rows_file):
    parts = [
        PartyDataModule(rows_file, party=party, parties=2, val=rows_file, train_rows=10, val_rows=6, tokenizer="random:tiny")
        for party in range(2)
    ]
    for part in parts:
        part.setup("fit")
    assert [len(part.train_set) for part in parts] == [5, 5]
    assert [len(part.val_set) for part in parts] == [6, 6]
    assert parts[0].hashes()["train"] != parts[1].hashes()["train"]
    assert parts[0].hashes()["val"] == parts[1].hashes()["val"]


def test_rows_of_a_common_file_are_held_out_before_it_is_shared(rows_file):
    def parts_of(parties):
        parts = [
            PartyDataModule(rows_file, party=party, parties=parties, train_rows=10, val_rows=4, tokenizer="random:tiny")
            for party in range(parties)
        ]
        for part in parts:
            part.setup("fit")
        return parts

    def texts(rows):
        return {tuple(row["input_ids"].tolist()) for row in rows}

    one, two, whole = *parts_of(2), *parts_of(1)
    assert texts(one.val_set) == texts(two.val_set) == texts(whole.val_set)
    assert len(whole.val_set) == 4
    assert texts(one.train_set) | texts(two.train_set) == texts(whole.train_set)
    assert len(whole.train_set) == 10
    assert not texts(whole.train_set) & texts(whole.val_set)
    shared = PartyDataModule(rows_file, train_rows=10, val_fraction=0.3, tokenizer="random:tiny")
    shared.setup("fit")
    assert len(shared.train_set) == 10
    with pytest.raises(InputError, match="val_rows=20: .* has 20 rows. Leave some to train on"):
        PartyDataModule(rows_file, val_rows=20, tokenizer="random:tiny").setup("fit")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"party": 2, "parties": 2}, "party=2, parties=2: legal are parties from 0 to 1"),
        ({"alpha": 0.0}, "alpha=0.0 is no parameter of a Dirichlet"),
        ({"alpha": 1.0}, "alpha=1.0 splits rows among parties, but parties=1"),
        ({"train_rows": 0}, "train_rows=0 leaves no row"),
    ],
)
def test_settings_that_cannot_be_are_refused(rows_file, settings, match):
    with pytest.raises(InputError, match=match):
        PartyDataModule(rows_file, **settings)


def test_a_share_without_rows_is_refused(rows_file):
    data = PartyDataModule(rows_file, party=5, parties=6, alpha=0.01, tokenizer="random:tiny", train_rows=2, val=rows_file)
    with pytest.raises(InputError, match="party=5 of 6 gets no row with alpha=0.01"):
        data.setup("fit")


def test_the_embedded_task_has_as_many_rows_of_each_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))
    files = {name: tmp_path / name / f"{name}.py" for name in ("python", "torch", "transformers", "lightning")}
    for name, file in files.items():
        file.parent.mkdir()
        file.write_text("".join(f'def f{n}():\n    """{name} {n}: {"sand and glass " * 20}"""\n' for n in range(4)))
    monkeypatch.setattr(embedded, "_roots", lambda: {name: [file.parent] for name, file in files.items()})
    rows = list(read_rows("package:docstrings"))
    assert Counter(row["response"] for row in rows) == dict.fromkeys("ABCD", 4)
    assert all(row["prompt"].endswith("Answer with one letter.") for row in rows)
    assert rows == list(read_rows("package:docstrings"))  # from the cache
