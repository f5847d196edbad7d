"""The wheel with all six methods, in an empty environment outside the checkout; the sdist."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from .test_pages import made_small, write_texts

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # the commands of a method, and what they leave
    "distillation": (
        ["predict -c distillation/capture --run labels", "fit -c distillation/student --run small"],
        "runs/distillation-student/small/export",
    ),
    "fusion": (["fit -c fusion/compress --run small"], "runs/fusion/small/export"),
    "spans": (["fit -c spans/compress --run quick"], "runs/spans/quick/export"),
    "gradient pruning": (
        ["fit -c gradient_pruning/train --data.train my_text/ --run small"],
        "runs/gradient-pruning/small/export",
    ),
    "offsite": (
        [
            "fit -c offsite/emulator --run small",
            "fit -c offsite/tune --model.source runs/emulator/small/export --data.train rows.jsonl --run small "
            "--model.candidates null",
            "owner certificates --folder papers --hosts [localhost] --parties [north]",
        ],
        "runs/tune/small/prefix",
    ),
    "multitask": (["fit -c multitask/train --run small"], "runs/multitask/small/export/text/next_words"),
}


def run(*words, **settings):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=1200, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_method_of_the_wheel_works_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/distillation.md", "Makefile", "README.md", "LICENSE"} <= names
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    install = ["install", "--quiet", "--no-compile", "--constraint"]
    run(binaries / "pip", *install, ROOT / "constraints.txt", f"{wheel}[offsite,spans]")
    away = tmp_path / "away"
    away.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"cwd": away, "env": {**environment, "FULGURITE_CACHE": str(tmp_path / "cache")}}
    assert "usage: fulgurite" in run(binaries / "fulgurite", "--help", **settings)
    assert "distillation/student" in run(binaries / "fulgurite", "configs", **settings)
    write_texts(away)
    rows = [json.dumps({"prompt": f"{n}?", "response": "yn"[n % 2]}) + "\n" for n in range(20)]
    (away / "rows.jsonl").write_text("".join(rows))
    commands = [words.split() for commands, _ in METHODS.values() for words in commands]
    small = [made_small(words) for words in commands]
    # In one process, which imports everything once.
    code = f"from fulgurite.experiments.main import main\nfor words in {small!r}:\n    print(words)\n    main(words)"
    run(binaries / "python", "-c", code, **settings)
    for method, (_, found) in METHODS.items():
        assert (away / found).exists(), method
