"""The benchmark's measurements, on a tiny model: what they return is what they should have measured."""

import json
import random

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.experiments.spans import measure
from fulgurite.modules.pretrained import load_model
from fulgurite.modules.spans import DENSE, SpanPlan, SpanRule
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def documents(long_documents):
    return long_documents


@pytest.fixture
def pruned(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    SpanPlan.same(SpanRule(20), model.config, sink=4).save(tmp_path / "pruned")
    return str(tmp_path / "pruned")


def test_a_key_is_right_where_greedy_decoding_writes_it(documents, monkeypatch):
    model, tokenizer = load_model("random:tiny"), tiny_tokenizer()
    ids = list(range(5, 60))
    written = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    assert measure._would_write(model, ids, written)
    assert not measure._would_write(model, ids, [*written[:-1], (written[-1] + 1) % 259])
    asked = []

    def every_second(model, ids, answer):
        asked.append((ids, tokenizer.decode(answer)))
        return len(asked) % 2

    monkeypatch.setattr(measure, "_would_write", every_second)
    counts = {"documents": {"260": 2, "300": 4}, "sentences": {"260": 1}, "keys": {"500": 2}}
    given = measure.passkeys(seed=0, model="random:tiny", documents=documents, counts=counts)
    assert given["metrics"]["documents"] == pytest.approx(
        (given["metrics"]["documents_260"] + given["metrics"]["documents_300"]) / 2
    )
    assert given["curves"]["documents_300"] == [[0.125, 1.0], [0.375, 0.0], [0.625, 1.0], [0.875, 0.0]]
    texts = [tokenizer.decode(ids) for ids, _ in asked]
    assert all(f"is {answer}." in text for text, (_, answer) in zip(texts, asked))
    assert "The grass is green" in texts[6]
    assert texts[7].count("Remember it.") == 5
    assert [len(ids) <= length for (ids, _), length in zip(asked, [260] * 2 + [300] * 4 + [260] + [500] * 2)] == [True] * 9


def test_a_dense_plan_is_as_close_as_can_be(documents, tmp_path, pruned):
    settings = {
        "source": "random:tiny",
        "documents": documents,
        "text": documents,
        "length": 300,
        "examples": 1,
        "text_tokens": 700,
    }
    far = measure.closeness(seed=0, model=pruned, **settings)
    assert far["answer_kl"] > 1e-3
    assert far["text_kl"] > 1e-3
    model = tiny_model()
    SpanPlan.same(DENSE, model.config, sink=4).save(tmp_path / "pruned")
    near = measure.closeness(seed=0, model=pruned, **settings)
    assert near["answer_kl"] == pytest.approx(0, abs=1e-5)
    assert near["text_agreement"] == 1.0
    window = measure.closeness(seed=0, model=pruned, window=0.1, **settings)
    assert window["cache"] == pytest.approx(0.1)
    assert window["answer_kl"] > 1e-3
    assert near["text_loss"] == pytest.approx(far["text_loss_dense"], abs=1e-4)


def test_speed_measures_both_caches(pruned):
    given = measure.speed(seed=0, model=pruned, batch=2, context=200, tokens=3, rounds=1)
    model = load_model("random:tiny")
    layers, heads, size = 4, 2, 8
    assert given["dense_cache_bytes"] == 2 * layers * heads * size * 4 * 203 * 2
    assert given["spans_cache_bytes"] == pytest.approx(2 * layers * heads * size * 4 * 24 * 2)
    assert given["planned_bytes"] == pytest.approx(given["spans_cache_bytes"])
    assert given["dense_read_bytes"] - given["dense_cache_bytes"] == sum(part.nbytes for part in model.parameters())
    assert all(value > 0 for value in given.values())


def test_heads_are_ranked(documents):
    given = measure.ranking(
        seed=0, source="random:tiny", documents=documents, lengths=[260], examples=1, form="net", rows="all", loss="margin"
    )
    assert -1 <= given["rank_correlation"] <= 1
    assert 0 <= given["worst_ten_in_first_twenty"] <= 10


def test_a_base_model_is_asked_in_plain_text(documents, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    for part in (tokenizer, tiny_model()):
        part.save_pretrained(tmp_path / "base")
    asked = []
    monkeypatch.setattr(measure, "_would_write", lambda model, ids, answer: asked.append(tokenizer.decode([*ids, *answer])) or 0)
    measure.passkeys(seed=0, model=str(tmp_path / "base"), documents=documents, counts={"documents": {"300": 1}})
    assert asked[0].rpartition("The pass key is ")[2].isdigit(), asked[0][-60:]


def test_short_documents_are_refused(tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "short"}))
    with pytest.raises(InputError, match="has no text of more than 300 characters"):
        next(measure._texts("documents", str(tmp_path / "short.jsonl"), random.Random(0)))


def test_documents_come_again_in_another_order(documents):
    texts = measure._texts("documents", documents, random.Random(0))
    first = [next(texts) for _ in range(60)]
    again = [next(texts) for _ in range(60)]
    assert sorted(first) == sorted(again)
    assert first != again


def test_profiling_is_timed():
    given = measure.profiling(seed=0, source="random:tiny", length=400, texts=2, density=0.5)
    assert set(given) == {"length", "profile_seconds", "plan_seconds"}
    assert all(value > 0 for value in given.values())
