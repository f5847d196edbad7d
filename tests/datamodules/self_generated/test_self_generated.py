"""Prompts, the model's answers to them, their loss mask, and what becomes of answers that are no good."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from fulgurite.datamodules import SelfGeneratedCalibration
from fulgurite.datamodules.self_generated import datamodule as module
from fulgurite.datamodules.self_generated.answers import AnswerCache, AnswerSettings, perplexities
from fulgurite.datamodules.self_generated.prompts import PromptForm, retrieval, summary
from fulgurite.datamodules.self_generated.texts import Filler, pieces
from fulgurite.errors import InputError
from fulgurite.modules.pretrained import load_model
from fulgurite.modules.tiny import tiny_model, tiny_tokenizer
from tests.conftest import prose


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def documents(long_documents):
    return long_documents


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.", "turns": [f"Say {n}.", "Again."]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(documents, trainer=None, **settings):
    small = {"lengths": [250, 300], "examples": 2, "val_examples": 1, "answer_tokens": 6, "show": 0}
    whose = {"answers_from": "random:tiny", "tokenizer": "random:tiny", "seed": 0}
    data = SelfGeneratedCalibration(documents, **{**small, **whose, **settings})
    data.trainer = trainer
    data.prepare_data()
    data.setup()
    return data


def test_own_answers_are_of_one_model(documents):
    def trainer(name):
        module = SimpleNamespace(source=SimpleNamespace(name=name), tokenizer=tiny_tokenizer())
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        return SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, strategy=strategy)

    data = made(documents, trainer("random:tiny"), answers_from=None)
    data.setup()
    data.trainer = trainer("another")
    with pytest.raises(InputError, match="holds the answers of random:tiny, and the model is now another"):
        data.setup()


def test_the_answers_are_what_the_model_writes_and_they_alone_carry_loss(documents):
    data = made(documents, answer_weights="float32", answer_batch_size=1)
    model = load_model("random:tiny")
    assert [(item.kind, item.length) for item in data.train_set.items] == [
        (kind, length) for kind in ("summary", "retrieval") for length in (250, 250, 300, 300)
    ]
    for item, example in zip(data.train_set.items, (data.train_set[n] for n in range(len(data.train_set)))):
        start = item.answer_start
        assert start <= item.length
        assert bool((example["labels"][:start] == -100).all())
        assert torch.equal(example["labels"][start:], example["input_ids"][start:])
        ids = example["input_ids"][None, :start]
        for token in example["input_ids"][start:]:
            likeliest = model(ids).logits[0, -1].argmax()
            assert token == likeliest
            ids = torch.cat([ids, likeliest[None, None]], 1)


def test_padding_and_batches_change_no_answer(documents):
    one, many = (made(documents, answer_weights="float32", answer_batch_size=size) for size in (1, 4))
    assert one.hashes() == many.hashes()


def test_the_same_settings_give_the_same_set_from_the_cache(documents, monkeypatch):
    first = made(documents, temperature=0.7)
    monkeypatch.setattr(AnswerCache, "_answer", lambda *_: pytest.fail("answers are in the cache"))
    assert made(documents, temperature=0.7).hashes() == first.hashes()
    monkeypatch.undo()
    assert made(documents, temperature=0.7, seed=1).hashes() != first.hashes()


def test_answers_are_drawn_from_the_whole_distribution(documents, monkeypatch):
    given = []
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, **kw: given.append(kw) or generate(self, **kw))
    made(documents, temperature=1.0, kinds=["summary"])
    assert all(settings["top_k"] == 0 for settings in given)
    assert given


def test_training_and_validation_have_no_document_in_common(documents):
    data = made(documents, kinds=["summary"], examples=3)
    texts = [prose(60, number) for number in range(60)]
    decode = tiny_tokenizer().decode
    seen = [
        {number for number, text in enumerate(texts) for item in part.items if text[:60] in decode(list(item.ids))}
        for part in (data.train_set, data.val_set)
    ]
    assert all(seen)
    assert not seen[0] & seen[1]


def test_a_stopped_run_goes_on_and_several_processes_share_the_work():
    model = load_model("random:tiny")
    prompts = [[3 + n] * (5 + n) for n in range(7)]
    settings = AnswerSettings(5, temperature=1.0, batch_size=2)
    whole = AnswerCache(model, prompts, settings, [2], 0)
    whole.write()
    answers = whole.read()
    assert sorted(answers) == list(range(7))
    for file in whole.folder.iterdir():
        file.unlink()
    first = AnswerCache(model, prompts, settings, [2], 0)
    first.write(1, 2)
    (file,) = first.folder.iterdir()
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:20])  # killed in the middle of a line
    assert len(first.read()) == 2
    first.write(0, 2)
    first.write(1, 2)
    assert first.read() == answers


def test_base_models_are_asked_in_plain_text(documents, questions):
    data = made(documents, chat=False, questions=questions)
    prompts = [tiny_tokenizer().decode(list(item.ids[: item.answer_start])) for item in data.train_set.items]
    assert [prompt[-9:] for prompt in prompts[:4]] == ["\nSummary:"] * 4
    assert all("<|start|>assistant" not in prompt for prompt in prompts)
    assert any(prompt.startswith("Question: What is") and prompt.endswith("\nAnswer:") for prompt in prompts)


def test_keys_are_hidden_where_they_should_be():
    form = PromptForm(tiny_tokenizer())
    for depth in (0.0, 0.5, 1.0):
        filler = Filler(iter([prose(300, 1)]), form.tokenizer)
        prompt = retrieval(form, filler, 900, random.Random(0), depth=depth, keys=3)
        assert 880 < len(form.ids(prompt.text)) <= 900
        body = prompt.text.split("Remember it.\n")[1]
        assert abs(body.find(prompt.answer) / body.rfind("\nWhat is") - depth) < 0.12
        assert prompt.text.count("Remember it.") == 4
        asked = prompt.text.rsplit("What is the pass key of ")[-1].split("?")[0]
        assert f"The pass key of {asked} is {prompt.answer}." in prompt.text


def test_long_texts_are_cut_at_the_ends_of_lines():
    text = "".join(f"{n} {prose(12, n)}\n" for n in range(100))
    cut = list(pieces(["short", text, "x" * 500], size=200))
    assert "".join(cut) == f"short{text}{'x' * 500}"
    assert all(len(piece) <= 400 for piece in cut)
    assert all(piece.endswith("\n") for piece in cut[1:-2])


@pytest.mark.parametrize("length", [200, 500])
def test_prompts_have_their_length(length):
    form = PromptForm(tiny_tokenizer())
    prompt = summary(form, Filler((prose(20, n) for n in range(100)), form.tokenizer), length)
    assert length - 12 <= len(form.ids(prompt.text)) <= length


def test_people_answer_and_texts_speak_for_themselves(documents, questions):
    human = made(documents, questions=questions, supervision="human", answers_from=None)
    decode = tiny_tokenizer().decode
    said = [decode(list(item.ids[item.answer_start :])) for item in human.train_set.items]
    assert {item.kind for item in human.train_set.items} == {"retrieval", "question"}
    assert all(answer.endswith("<|end|>") for answer in said)
    keys = [answer.removesuffix("<|end|>") for item, answer in zip(human.train_set.items, said) if item.kind == "retrieval"]
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    text = made(documents, supervision="text", answers_from=None)
    assert all(item.answer_start == 1 and len(item.ids) == item.length for item in text.train_set.items)


def test_lists_of_turns_are_questions(questions):
    data = made(None, questions=questions, question_field="turns")
    assert {item.kind for item in data.train_set.items} == {"question"}
    assert "Say " in tiny_tokenizer().decode(list(data.train_set.items[0].ids))


def test_a_model_may_write_the_documents(documents, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN", 160)
    data = made(documents, documents_from="random:tiny", kinds=["summary"], examples=1, lengths=[250])
    whole = "".join(tiny_tokenizer().decode(list(item.ids)) for item in data.train_set.items)
    assert prose(60, 3)[60:] not in whole
    assert "�" in whole, "bytes of a random model"


def test_answers_that_are_no_good_are_left_out(documents, monkeypatch, caplog):
    with pytest.raises(InputError, match=r"None of the 8 answers can be used: 8 cut off. Raise answer_tokens"):
        made(documents, cut_answers="drop")
    measured = iter(range(100))
    monkeypatch.setattr(module, "perplexities", lambda model, pairs: [next(measured) for _ in pairs])
    data = made(documents, max_perplexity=5.0, val_examples=0)
    assert len(data.train_set) == 6
    assert "Of 8 answers 2 are left out: 2 of a higher perplexity." in caplog.text
    assert "8 of 8 answers are cut off at answer_tokens=6, and kept." in caplog.text
    monkeypatch.setattr(
        AnswerCache, "_answer", lambda self, n: [{"prompt": i, "ids": [2], "cut": False} for i in self.batches[n]]
    )
    with pytest.raises(InputError, match="None of the 8 answers can be used: 8 empty"):
        made(documents, seed=3)


def test_perplexities_are_those_of_the_answers():
    model = load_model("random:tiny")
    pairs = [([3, 4, 5], [6, 7]), ([9], [8, 8, 8])]
    for (prompt, answer), value in zip(pairs, perplexities(model, pairs)):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert value == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).exp()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": None}, "documents and questions are both missing"),
        ({"documents": "nowhere"}, "documents='nowhere' names no text here"),
        ({"kinds": ["question"]}, "kinds: 'question' needs questions, which is missing. Legal here: summary, retrieval"),
        ({"kinds": ["summary"], "supervision": "human"}, "no one has written a summary"),
        ({"kinds": ["sumary"]}, "kinds: 'sumary' is unknown. Did you mean 'summary'"),
        ({"supervision": "ownn"}, "supervision='ownn' is unknown. Did you mean 'own'"),
        ({"lengths": []}, r"lengths=\[\] is no list of lengths"),
        ({"lengths": [0]}, r"lengths=\[0\]"),
        ({"examples": 0}, "examples=0 is too small. Legal: 1 or more"),
        ({"answer_tokens": 0}, "answer_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0 is no probability mass"),
        ({"max_perplexity": 1}, "max_perplexity=1 would leave out every answer"),
        ({"max_perplexity": 9, "supervision": "text"}, "max_perplexity is for answers, and supervision='text' has none"),
        ({"lengths": [40]}, "a prompt of 40 tokens has no room for a text"),
        ({"lengths": [510]}, r"make texts of 51\d tokens; random:tiny takes 512"),
        ({"examples": 500}, "the documents are too few for the prompts asked for"),
        ({"answers_from": None}, "answers_from=None: name the model that answers"),
    ],
)
def test_bad_settings_are_refused(documents, settings, message):
    with pytest.raises(InputError, match=message):
        made(**{"documents": documents, **settings})


def test_long_questions_are_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": prose(100, n)}) + "\n" for n in range(8)))
    with pytest.raises(InputError, match=r"make a text of \d+ tokens; random:tiny takes 512"):
        made(None, questions=str(path))


def test_the_model_that_is_trained_has_to_take_the_texts_too(tmp_path, documents):
    short = tiny_model()
    short.config.max_position_embeddings = 256
    short.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(source=SimpleNamespace(name=str(tmp_path / "short")), tokenizer=tiny_tokenizer()),
        global_rank=0,
        world_size=1,
    )
    with pytest.raises(InputError, match=r"texts of 306 tokens; .*short takes 256"):
        made(documents, trainer)
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": prose(60, n)}) + "\n" for n in range(8)))
    with pytest.raises(InputError, match=r"their answers make a text of \d+ tokens; .*short takes 256"):
        made(None, trainer, questions=str(path), supervision="human")


def test_questions_are_divided_by_what_is_asked_for(questions):
    data = made(None, questions=questions, lengths=[250], val_lengths=[400], examples=6, val_examples=6)
    assert [len(part) for part in (data.train_set, data.val_set)] == [6, 6]


def test_one_long_document_is_divided(tmp_path, caplog):
    (tmp_path / "book.txt").write_text("".join(f"{n} {prose(30, n)}\n" for n in range(400)))
    data = made(str(tmp_path / "book.txt"), kinds=["summary"])
    assert "is one document: its last part is held out" in caplog.text
    decode = tiny_tokenizer().decode
    numbers = [
        {int(word) for item in part.items for word in decode(list(item.ids)).split() if word.isdigit()}
        for part in (data.train_set, data.val_set)
    ]
    assert max(numbers[0]) < min(numbers[1])


def test_bad_rows_are_refused(documents, questions):
    with pytest.raises(InputError, match=r"row 1: no text in question_field='asked'"):
        made(documents, questions=questions, question_field="asked")
    with pytest.raises(InputError, match=r"row 1: no text in answer_field='said'"):
        made(documents, questions=questions, answer_field="said", supervision="human")
    with pytest.raises(InputError, match="has 8 questions for 50 examples|has .* questions for 50 examples"):
        made(None, questions=questions, examples=50)


def test_a_model_with_another_tokenizer_cannot_answer_but_may_write(documents, tmp_path, monkeypatch):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.add_tokens(["lightning"])
    model.resize_token_embeddings(len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has another tokenizer than the model that is trained"):
        made(documents, answers_from=str(tmp_path / "other"))
    monkeypatch.setattr(module, "_WRITTEN", 160)
    data = made(documents, documents_from=str(tmp_path / "other"), kinds=["summary"], examples=1, lengths=[250])
    assert len(data.train_set) == 1
