"""The commands of every page of the documentation, in their order and in one folder, on the tiny model and small data."""

import json
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fulgurite.experiments.benchmarks.check import wrong
from fulgurite.experiments.main import main

from .conftest import prose

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))

STAGES = json.dumps(
    [
        {"class_path": "TrainUntilCondition", "init_args": {"max_steps": [1, 1]}},
        {"class_path": "ExportPretrained", "init_args": {"dtype": "float32"}},  # as the tiny model is, for an emulator of it
    ]
)
LARGE = {  # what stands in commands, and what does for the tiny model
    "80000000": "40000",
    '"num_hidden_layers": 20, "kept_layers": 4': '"num_hidden_layers": 3, "kept_layers": 1',
    '"num_hidden_layers": 20, "intermediate_size": 1024': '"intermediate_size": 48',
    '"num_hidden_layers": 20, "parameters"': '"num_hidden_layers": 3, "parameters"',
}
BRANCHES = json.dumps(
    [
        "NewestCheckpoint",
        {"class_path": "ExportBranches"},
    ]
)
FUSED = ['--model.shape={"num_hidden_layers": 3, "parameters": null}', "--model.start.calibration_tokens=512"]
# The embedded text takes a minute to collect; the README's commands and the demo read it.
TEXT = ["--data.train=my_text/"]
TASK_TEXT = "--data.tasks.text.init_args.train=my_text/"
# What makes a command small: by config, then by command. None: only looked at, as it wants other machines, or hours.
SMALL = {
    "distillation/capture": [*TEXT, "--data.block_size=64", "--data.train_tokens=640"],
    "distillation/student": ["--model.student.keep_layers.count=2"],
    "distillation/online": [*TEXT, "--data.block_size=64", "--model.student.keep_layers.count=2", "--model.teacher=random:tiny"],
    "fusion/compress": [*TEXT, "--data.block_size=64", *FUSED],
    "compose/fuse": [*FUSED, f"--trainer.callbacks={STAGES}"],
    "compose/two_ranks": ["--trainer.devices=1", "--trainer.strategy=auto"],
    "compose/emulator": [*TEXT, "--model.emulator.identical=1"],
    "compose/multitask": [TASK_TEXT, "--data.tasks.text.init_args.length=48", "--data.batch_size=2"],
    "multitask/train": [TASK_TEXT, "--data.tasks.text.init_args.length=48", "--data.batch_size=2"],
    "fit multitask/train": [f"--trainer.callbacks={BRANCHES}"],
    "predict multitask/train": ["--trainer.limit_predict_batches=2"],
    "language_model/finetune": [*TEXT, "--data.block_size=64"],
    "offsite/emulator": [*TEXT, "--model.emulator.layers=3", "--model.emulator.identical=1", "--data.block_size=64"],
    "offsite/tune": ["--model.prefix.length=2"],
    "offsite/split": [],
    "offsite/plug_in": [],
    "fit": ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.precision=32"],
    "predict": [],
    "validate": ["--trainer.limit_val_batches=1"],
    "generate": ["--max_new_tokens=2"],
    "evaluate": None,
    "benchmark": ["--dry_run=true", "--data=data"],
    "report": [],
    "labels": [],
    "configs": [],
    "sweep": ["--trials=1"],
    "owner": [],
}
SMALL["spans/compress"] = SMALL["compose/spans"] = [
    *(
        "--data.documents=my_text/",
        "--data.lengths=[250]",
        "--data.val_lengths=[300]",
        "--data.examples=1",
        "--data.val_examples=1",
    ),
    "--data.answer_tokens=4",
]
ELSEWHERE = {  # pages whose commands want hub models, or several machines; and what other tests run
    "large-models": "eight GPUs",
    "new-method": "test_documents.py",
    "gradient-pruning": "several machines",
}


def commands(page):
    """Return the words of the page's commands."""
    text = (DOCS / f"{page}.md").read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line.removeprefix("fulgurite "), comments=True) for line in lines if line.startswith("fulgurite ")]


def made_small(words):
    """Return a command's words for the tiny model and a few steps, or None where it is only looked at."""
    words = [re.sub(r"^package:(?!python-docs).*|^Huggingface.*", "random:tiny", word) for word in words]
    for large, small in LARGE.items():
        words = [word.replace(large, small) for word in words]
    config = words[words.index("-c") + 1] if "-c" in words else ""
    extra = SMALL[words[0]]
    if extra is None:
        return None
    if any("help" in word for word in words):
        return words
    if words[0] in ("fit", "predict", "validate") and config:
        own = config.startswith("compose/") and config not in OWN
        given = next((value for flag, value in zip(words, words[1:]) if flag == "--model.source"), None)
        words += [] if given or own else ["--model.source=random:tiny"]
        words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    return [*words, *SMALL.get(config, []), *SMALL.get(f"{words[0]} {config}", []), *extra]


OWN = ("compose/fuse", "compose/emulator")  # their source is the model that the others come from


def write_texts(folder):
    """Write what the small commands read as the user's own text."""
    (folder / "my_text").mkdir()
    for number in range(4):
        (folder / f"my_text/{number}.txt").write_text(prose(600, number))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the pages take as the user's own."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    for name in ("wikitext2/valid.raw.txt", "wikitext2/test.raw.txt", "icl_eval/lambada_openai.jsonl"):  # of the benchmarks
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "other.txt").write_text(prose(300, 1))
    (tmp_path / "question_about_a_long_text.txt").write_text(prose(100, 2))
    rows = "".join(json.dumps({"prompt": f"Is {n} even?", "response": ("yes", "no")[n % 2]}) + "\n" for n in range(20))
    for name in ("answers.jsonl", "rows.jsonl"):
        (tmp_path / name).write_text(rows)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) and page not in ELSEWHERE and page != "offsite"])
def test_the_commands_of_a_page_work_as_they_stand(page, folder, monkeypatch, capsys):
    if page == "benchmarks":  # whose own YAML takes soft labels that lie there
        main(made_small(["predict", "-c", "distillation/capture", "--data.train", "my_text/"]))
    for words in commands(page):
        small = made_small(words)
        if small is None or "--write" in words:
            continue
        print("fulgurite", *words)
        monkeypatch.setattr(sys, "stdin", open("question_about_a_long_text.txt"))  # noqa: SIM115
        assert not exit_code(small[: small.index("<")] if "<" in small else small), capsys.readouterr().err[-2000:]


def test_the_commands_about_an_owner_and_its_parties_work_as_they_stand(folder, capfd):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def here(word):
        return re.sub(r"(owner\.example\.org|0\.0\.0\.0):7421", address, word).replace("owner.example.org", "localhost")

    server = None
    try:
        for words in (list(map(here, words)) for words in commands("offsite")):
            print("fulgurite", *words)
            if words[:2] == ["owner", "serve"]:
                command = [sys.executable, "-c", "from fulgurite.experiments.main import main; main()", *made_small(words)]
                server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                wait_for(address)
                for name in ("owner.crt", "north.token"):  # what a party gets
                    (folder / name).write_bytes((folder / "papers" / name).read_bytes())
            elif words[:2] != ["owner", "demo"]:
                main(made_small(words))
    finally:
        if server is not None:
            server.kill()
            server.wait()
    assert (folder / "runs/split/through/prefix").is_dir()


def exit_code(words):
    try:
        main(words)
    except SystemExit as end:
        return end.code
    return 0


def wait_for(address):
    host, port = address.split(":")
    for _ in range(600):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the owner does not answer")


@pytest.mark.parametrize("page", ["large-models", "gradient-pruning"])
def test_commands_for_other_machines_parse(page):
    for words in commands(page):
        if words[0] in ("fit", "predict"):
            assert not wrong(words)
