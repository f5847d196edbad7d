"""A capture that is killed at random moments ends with the store of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fulgurite.datamodules.soft_labels import SoftLabelStore

KILLS = 20


def capture(text_file, store, cache):
    words = ["predict", "-c", "distillation/capture", "--model.source=random:tiny", f"--data.train={text_file}"]
    words += ["--data.block_size=32", "--data.batch_size=1", f"--trainer.callbacks.store={store}", "--trainer.accelerator=cpu"]
    code = "from fulgurite.experiments.main import main; main()"
    environment = {**os.environ, "FULGURITE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words, "--trainer.enable_progress_bar=false"],
        cwd=store.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_captures_resume(tmp_path, text_file):
    whole = tmp_path / "whole"
    process = capture(text_file, whole, tmp_path / "cache")
    assert process.wait(300) == 0, process.stderr.read()
    store = tmp_path / "killed"
    moments = random.Random(0)
    journal = store / "journal-00000.jsonl"
    for _ in range(KILLS):
        written = journal.stat().st_size if journal.is_file() else -1
        process = capture(text_file, store, tmp_path / "cache")
        if moments.random() < 0.7:  # while it writes; else at any moment of the start
            while process.poll() is None and (not journal.is_file() or journal.stat().st_size <= written):
                time.sleep(0.001)
            time.sleep(moments.random() * 0.05)
        else:
            time.sleep(moments.random() * 8)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (store / "header.json").is_file():
            SoftLabelStore(store)  # readable at any moment
    process = capture(text_file, store, tmp_path / "cache")
    assert process.wait(300) == 0, process.stderr.read()
    opened = SoftLabelStore(store)
    assert len(list(opened.verify())) == len(SoftLabelStore(whole))
    for file in whole.iterdir():
        assert (store / file.name).read_bytes() == file.read_bytes(), file.name
