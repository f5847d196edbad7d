"""What a training was said to need and what it needs, and how long commands take to begin."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ...errors import InputError
from ..cli import run
from ..measuring import extra_memory


class _StepTimes(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


def estimated(*, config: str, steps: int, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Let ``--dry_run`` say what a training needs, and then train.

    Args:
        config: Name of a packaged config.
        steps: Steps to train; the first is not counted.
        seed: Of the training.
        settings: Options of the command line, by name.

    Returns:
        ``memory_said``, ``memory`` (bytes by which the process grew at most) and ``memory_ratio``, said over measured;
        ``seconds_said``, ``seconds`` (median of a step) and ``seconds_ratio``.
    """
    words = ["fit", "-c", config, f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]
    words += [f"--{name}={value}" for name, value in settings.items()]
    needs = run([*words, "--dry_run=true"]).needs
    quiet = ["logger=false", "limit_val_batches=0", "enable_progress_bar=false", "callbacks=null", "enable_checkpointing=false"]
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        words += [f"--runs_folder={folder}", *(f"--trainer.{setting}" for setting in quiet)]
        memory = extra_memory(lambda: run(words, callbacks=[times]), interval=0.01)
    said, seconds = max(need.memory for need in needs), statistics.median(times.seconds[1:])
    return {
        "memory_said": float(said),
        "memory": float(memory),
        "memory_ratio": said / memory,
        "seconds_said": needs[0].seconds,
        "seconds": seconds,
        "seconds_ratio": needs[0].seconds / seconds,
    }


def start_up(*, words: str, rounds: int, seed: int) -> dict[str, float]:
    """Time a command that does nothing but begin.

    Args:
        words: Of the command line, behind ``fulgurite``.
        rounds: Calls that are counted; one before them is not.
        seed: Not used.

    Returns:
        ``seconds`` (median) and ``imported``, how many modules of Python it imports.

    Raises:
        InputError: If the command fails.
    """
    command = [sys.executable, "-c", "from fulgurite.experiments.main import main; main()", *words.split()]
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
        seconds.append(time.perf_counter() - begin)
        if done.returncode:
            raise InputError(f"fulgurite {words} failed: {done.stderr.strip()[-300:]}")
    listed = subprocess.run([command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True).stderr
    return {"seconds": statistics.median(seconds[1:]), "imported": float(listed.count("import time:"))}
