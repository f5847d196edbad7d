import json

import pytest
import torch

from fulgurite.datamodules import InstructionDataModule
from fulgurite.errors import InputError
from fulgurite.modules.tiny import tiny_tokenizer
from fulgurite.modules.tokens import render_chat


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Add {n} and {n}.", "response": f"It is {2 * n}."}) + "\n" for n in range(20)))
    return str(path)


def ready(source, **settings):
    data = InstructionDataModule(source, **{"tokenizer": "random:tiny", **settings})
    data.setup()
    return data


def test_only_the_response_carries_loss(rows_file):
    data = ready(rows_file)
    tokenizer = tiny_tokenizer()
    for index in range(len(data.train_set)):
        example = data.train_set[index]
        learned = tokenizer.decode(example["labels"][example["labels"] != -100])
        whole = tokenizer.decode(example["input_ids"])
        assert learned.startswith("It is ")
        assert learned.rstrip().endswith("<|end|>")
        assert whole.startswith("<|start|>user\nAdd ")
        assert whole.endswith(learned)


def test_batches_are_padded_and_prompts_left_padded(rows_file):
    data = ready(rows_file, batch_size=8, val_fraction=0.3)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert bool((batch["labels"][batch["input_ids"] == 0] == -100).all())
    prompts = next(iter(data.predict_dataloader()))
    assert bool((prompts["attention_mask"][:, -1] == 1).all())
    assert torch.equal(prompts["attention_mask"] == 0, prompts["input_ids"] == 0)


def test_long_rows_are_cut_and_longer_prompts_left_out(rows_file):
    data = ready(rows_file, max_length=45, val_fraction=0)
    assert all(len(data.train_set[index]["input_ids"]) <= 45 for index in range(len(data.train_set)))
    with pytest.raises(InputError, match="max_length=5"):
        ready(rows_file, max_length=5)


def test_plain_text_is_taken_as_it_is_written(rows_file):
    data = ready(rows_file, chat=False, val_fraction=0)
    tokenizer = tiny_tokenizer()
    example = data.train_set[0]
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    whole, learned = (tokenizer.decode(ids[:-1]) for ids in (example["input_ids"], example["labels"][example["labels"] != -100]))
    assert learned.startswith("It is ")
    assert whole.startswith("Add ")
    assert whole.endswith(f".{learned}")


def test_a_template_that_takes_a_date_is_given_one_of_the_past():
    tokenizer = tiny_tokenizer()
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = f"{date}: {{{{ messages[0]['content'] }}}}"
    assert render_chat(tokenizer, [{"role": "user", "content": "Yes?"}], prompt=True) == "26 Jul 2024: Yes?"


def test_batches_of_like_length_have_less_padding(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "word " * (1 + number * 7 % 40), "response": "good"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def positions(loader):
        return sum(batch["input_ids"].numel() for batch in loader)

    near, far = (ready(str(path), group_by_length=group, val_fraction=0.5, batch_size=4) for group in (True, False))
    assert positions(near.train_dataloader()) < 0.9 * positions(far.train_dataloader())
    assert positions(near.val_dataloader()) < 0.9 * positions(far.val_dataloader())
    prompts = ready(str(path), group_by_length=True, val=str(path), batch_size=4).predict_dataloader()
    assert [int(mask.sum()) for batch in prompts for mask in batch["attention_mask"]] == [
        len(far._ids(row["prompt"])[0]) for row in rows
    ]


def test_split_is_deterministic(rows_file):
    first, second = ready(rows_file, val_fraction=0.25), ready(rows_file, val_fraction=0.25)
    assert first.val_set.pairs == second.val_set.pairs
    assert len(first.val_set) == 5
    assert not {str(pair) for pair in first.val_set.pairs} & {str(pair) for pair in first.train_set.pairs}


def test_base_model_without_chat_template_is_refused_by_name(rows_file, monkeypatch):
    base = tiny_tokenizer()
    base.chat_template = None
    base.name_or_path = "some-base-model"
    data = InstructionDataModule(rows_file, tokenizer="random:tiny")
    data._tokenizer = base
    with pytest.raises(InputError, match="some-base-model.*no chat template"):
        data.setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_field": "promt"}, "prompt_field='promt'.*Did you mean 'prompt'"),
        ({"max_length": 1}, "max_length=1"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
    ],
)
def test_bad_settings_are_refused_by_name(rows_file, settings, message):
    with pytest.raises(InputError, match=message):
        ready(rows_file, **settings)


def test_running_text_is_refused(text_file):
    with pytest.raises(InputError, match=r"has no rows.*\.jsonl"):
        ready(str(text_file))
