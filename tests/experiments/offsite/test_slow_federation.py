"""Rounds of averaging on Flower: real processes, TLS, a key for each party; the numbers of the same rounds in one process."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from fulgurite.experiments.cli import run
from fulgurite.experiments.configs import resolve_config
from fulgurite.modules.offsite import EmulatorManifest, Prefix, PrefixSettings
from fulgurite.modules.offsite.averaging import average_prefixes
from fulgurite.modules.offsite.prefix import StandsFor, carried_over
from fulgurite.modules.pretrained import load_model, model_fingerprint
from fulgurite.modules.tiny import tiny_model

from .owners import OwnerProcess, command, make_owner

pytest.importorskip("flwr", reason="Flower wants an environment of its own")
pytestmark = pytest.mark.slow
ROUNDS = 2


@pytest.fixture
def start(tmp_path):
    model = tiny_model()
    prefix = Prefix.random(model, PrefixSettings(length=2))
    prefix.save(tmp_path / "start", model_fingerprint(model), StandsFor("f" * 32, 6, (0, 2, 3, 5)))  # as one of an emulator
    return tmp_path / "start"


@pytest.fixture
def configs(tmp_path):
    """Two parties with unlike amounts of data."""
    found = []
    for name, rows in (("south", 6), ("north", 15)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{name} {n}", "response": "AB"[n % 2]}) + "\n" for n in range(rows)))
        settings = yaml.safe_load(Path(resolve_config("offsite/tune")).read_text())
        settings["model"]["init_args"] |= {"source": "random:tiny", "candidates": ["A", "B"], "weights": "float32"}
        settings["data"]["init_args"] |= {"train": str(file), "val_fraction": 0, "batch_size": 3}
        settings["trainer"] |= {"max_steps": -1, "max_epochs": 1, "logger": False, "accelerator": "cpu"}
        settings["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
        found.append(tmp_path / f"{name}.yaml")
        found[-1].write_text(yaml.safe_dump(settings))
    return found


def federate(*words, folder=None):
    return subprocess.run(command("owner", "federate", *words), capture_output=True, text=True, timeout=400, cwd=folder)


def test_rounds_on_flower_are_those_in_one_process(start, configs, tmp_path):
    words = [
        f"--configs={json.dumps([str(config) for config in configs])}",
        f"--start={start}",
        f"--folder={tmp_path / 'rounds'}",
    ]
    done = federate(*words, f"--rounds={ROUNDS}")
    log = tmp_path / "rounds" / "server.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    mean, model, whole = Prefix.read(start)
    for number in range(1, ROUNDS + 1):
        mean.save(tmp_path / "mean", model)
        prefixes, examples = [], []
        for config in sorted(configs):
            given = [f"--model.start={tmp_path / 'mean'}", f"--seed_everything={number}"]
            own = run(["fit", "-c", str(config), *given, f"--runs_folder={tmp_path / 'here'}", f"--run={config.stem}-{number}"])
            prefixes.append(own.model.prefix)
            examples.append(own.token_rate.sequences)
        assert examples == [15, 6]
        mean = average_prefixes(prefixes, examples)
        found = Prefix.load(tmp_path / "rounds" / f"round-{number}", model)
        assert all(torch.equal(one, other) for one, other in zip(found.rows, mean.rows, strict=True))
    assert all(torch.equal(*pair) for pair in zip(Prefix.load(tmp_path / "rounds" / "prefix", model).rows, mean.rows))
    assert all(Prefix.read(tmp_path / "rounds" / name)[2] == whole for name in ("round-0", "round-1", "prefix"))
    again = federate(*words)
    assert again.returncode == 2
    assert "has the prefix of other rounds" in again.stderr


def test_a_round_without_enough_parties_ends_with_what_to_do(start, configs, tmp_path):
    configs[0].write_text(configs[0].read_text().replace("south.jsonl", "nowhere.jsonl"))
    words = [
        f"--configs={json.dumps([str(config) for config in configs])}",
        f"--start={start}",
        f"--folder={tmp_path / 'rounds'}",
    ]
    done = federate(*words, "--rounds=1")
    assert done.returncode == 2
    assert "The rounds did not come to their end" in done.stderr
    assert "it needs 2 (parties)" in (tmp_path / "rounds" / "server.log").read_text()
    enough = federate(*words[:2], f"--folder={tmp_path / 'others'}", "--rounds=1", "--minimum=1")
    assert enough.returncode == 0, enough.stderr
    assert (tmp_path / "others" / "prefix" / "prefix.json").is_file()


def test_rounds_through_the_split_begin_with_a_prefix_of_the_emulator(tmp_path):
    """Each party goes through the owner's layers; paths in its config are from where the command is started."""
    place = make_owner(tmp_path / "owner", 1)
    owner, emulator = OwnerProcess(place), EmulatorManifest.load(place / "emulator")
    model = load_model(str(place / "emulator"), "float32")
    tuned = Prefix.random(model, PrefixSettings(length=2))
    tuned.save(tmp_path / "tuned", model_fingerprint(model), emulator.whole)
    for party in ("p0", "p1"):
        (tmp_path / f"{party}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{party} {n}", "response": "AB"[n % 2]}) + "\n" for n in range(6))
        )
        settings = yaml.safe_load(Path(resolve_config("offsite/split")).read_text())
        settings["model"]["init_args"] |= {"source": "owner/emulator", "candidates": ["A", "B"], "weights": "float32"}
        settings["model"]["init_args"]["owner"] = {
            "address": f"localhost:{owner.port}",
            "token": f"owner/{party}.token",
            "certificate": "owner/owner.crt",
        }
        settings["data"]["init_args"] |= {"train": f"{party}.jsonl", "val_fraction": 0, "batch_size": 3}
        settings["trainer"] |= {"max_steps": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        (tmp_path / f"{party}.yaml").write_text(yaml.safe_dump(settings))
    try:
        done = federate("--configs=[p0.yaml,p1.yaml]", "--start=tuned", "--folder=rounds", "--rounds=2", folder=tmp_path)
    finally:
        owner.kill()
    log = tmp_path / "rounds" / "server.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    first, last = (Prefix.load(tmp_path / "rounds" / name, emulator.model) for name in ("round-0", "prefix"))
    assert all(torch.equal(*pair) for pair in zip(first.rows, carried_over(tuned, emulator.whole, "kept").rows, strict=True))
    assert all(not torch.equal(*pair) for pair in zip(first.rows, last.rows, strict=True))
