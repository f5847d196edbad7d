"""The wheel, in an empty environment outside the checkout; the sdist."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words, **settings):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=1200, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/distillation.md", "Makefile", "README.md", "LICENSE"} <= names
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    run(binaries / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    away = tmp_path / "away"
    away.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"cwd": away, "env": {**environment, "FULGURITE_CACHE": str(tmp_path / "cache")}}
    assert "usage: fulgurite" in run(binaries / "fulgurite", "--help", **settings)
    assert "distillation/student" in run(binaries / "fulgurite", "configs", **settings)
    (away / "text.txt").write_text("Sand melts where the lightning goes down. " * 100)
    words = ["fit", "-c", "language_model/finetune", "--model.source=random:tiny", "--data.train=text.txt"]
    words += ["--data.block_size=64", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    assert "stopped" in run(binaries / "fulgurite", *words, **settings)
