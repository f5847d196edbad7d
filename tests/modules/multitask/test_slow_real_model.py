"""Trunks that people would take: the embedded sentence encoder and the embedded language model."""

import csv
import json

import pytest
import torch
from transformers import pipeline

from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.modules import TransformerBranch
from fulgurite.modules.multitask import Objective
from fulgurite.modules.multitask.trunk import load_trunk
from fulgurite.modules.pretrained import load_model, load_tokenizer, resolve_source

MINILM, SMOLLM = "package:all-minilm-l6-v2", "package:smollm2-135m-instruct"
PRAISE, BLAME = ["wonderful", "a delight", "superb", "full of charm"], ["dreadful", "a bore", "clumsy", "a waste of time"]
THINGS = ["film", "meal", "book", "concert", "hotel", "play", "garden", "lecture", "song", "museum"]


def installed(source):
    try:
        resolve_source(source)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def reviews(tmp_path):
    rows = [
        (f"The {thing} was {word}.", name)
        for name, words in (("good", PRAISE), ("bad", BLAME))
        for word in words
        for thing in THINGS
    ]
    with open(tmp_path / "reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return str(tmp_path / "reviews.csv")


@pytest.mark.slow
def test_real_model_encoder_learns_two_tasks_and_is_exported(reviews, tmp_path, monkeypatch):
    installed(MINILM)
    monkeypatch.chdir(tmp_path)
    tasks = {
        name: {"class_path": "ClassificationTask", "init_args": {"data": {"train": reviews}, "length": 16}}
        for name in ("mood", "again")
    }
    words = ["fit", "-c", "multitask/train", "--model.source", MINILM, "--data.tasks", json.dumps(tasks), "--run", "one"]
    words += [
        "--data.batch_size=16",
        "--trainer.max_steps=30",
        "--model.optimizer.init_args.lr=2e-4",
        "--trainer.precision=32-true",
    ]
    run(words)
    ask = pipeline("text-classification", "runs/multitask/one/export/mood")
    found = ask(["The dinner was superb.", "The speech was a waste of time."])
    assert [each["label"] for each in found] == ["good", "bad"]


@pytest.mark.slow
def test_real_model_branch_begins_as_the_model_it_comes_from():
    installed(SMOLLM)
    plain, trunk = load_model(SMOLLM, "float32").eval(), load_trunk(SMOLLM, "float32")
    branch = TransformerBranch()
    branch.attach(trunk, Objective("next_token"))
    ids = load_tokenizer(SMOLLM)("Sand melts where lightning strikes it.", return_tensors="pt").input_ids
    view = {"mask": "causal", "input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    with torch.no_grad():
        logits = branch.eval().scores(trunk, branch.states(trunk, trunk.eval()(view), view), view)
        torch.testing.assert_close(logits, plain(ids).logits, atol=1e-3, rtol=1e-4)
