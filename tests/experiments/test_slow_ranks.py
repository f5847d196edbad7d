"""Two processes: capture, training and resuming under DDP."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fulgurite.datamodules.soft_labels import SoftLabelStore

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.enable_progress_bar=false"]


# FSDP asks for a GPU before it looks whether it needs one; whole weights cannot be gathered without one.
FSDP_ON_CPU = """
import torch
from torch.distributed.fsdp import fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

def handle(state, *_):
    state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))

fully_sharded_data_parallel._init_device_handle = handle
"""


def fulgurite(folder, *words, before=""):
    code = "from fulgurite.experiments.main import main; main()"
    script = folder / "command.py"
    script.write_text(f'{before}\nif __name__ == "__main__":\n    {code}\n')
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def assert_same_labels(one, two):
    """Of equal probabilities, a codec's tables choose the order, and each rank learns its own tables."""
    assert (one.counts == two.counts).all()
    token = np.repeat(np.arange(len(one.counts)), one.counts)
    first, second = (np.lexsort((labels.ids, -labels.probabilities.astype(np.int64), token)) for labels in (one, two))
    for name, order_one, order_two in (("ids", first, second), ("probabilities", first, second)):
        assert (getattr(one, name)[order_one] == getattr(two, name)[order_two]).all(), name
    for name in ("tail", "realised"):
        assert (getattr(one, name) == getattr(two, name)).all(), name


@pytest.mark.slow
def test_two_ranks_capture_train_and_resume(tmp_path, text_file):
    capture = ["predict", "-c", "distillation/capture", "--model.source=random:tiny", f"--data.train={text_file}"]
    capture += ["--data.block_size=64", "--data.batch_size=1"]
    fulgurite(tmp_path, *capture, "--trainer.callbacks.store=two", *TWO)
    fulgurite(tmp_path, *capture, "--trainer.callbacks.store=one", *TWO, "--trainer.devices=1", "--trainer.strategy=auto")
    one, two = SoftLabelStore(tmp_path / "one"), SoftLabelStore(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("journal-*.jsonl"))) == 2
    assert sorted(one.keys) == sorted(two.keys)
    for key in one.keys:
        assert_same_labels(one.read(key), two.read(key))

    fit = ["fit", "-c", "distillation/student", "--model.source=random:tiny", "--model.student.keep_layers.count=2"]
    fit += ["--data.store=one", "--data.batch_size=1", *TWO, "--trainer.max_epochs=2", "--model.lr_scheduler.total_steps=200"]
    fit += ["--trainer.callbacks=[{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 9, save_last: true}}]"]
    fulgurite(tmp_path, *fit, "--run=whole")
    fulgurite(tmp_path, *fit, "--run=parts", "--trainer.max_steps=27")
    again = ["fit", "--experiment=distillation-student", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=-1"]
    fulgurite(tmp_path, *again)
    folder = tmp_path / "runs" / "distillation-student"
    whole, parts = (torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] > 27
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    assert json.loads((folder / "whole" / "environment.json").read_text())["seed"] == 0
    assert len(list(folder.iterdir())) == 2  # both processes used one run folder


@pytest.mark.slow
def test_divided_weights_are_trained_as_whole_ones(tmp_path, text_file):
    fit = [
        "fit",
        "-c",
        "language_model/finetune",
        "--model.source=random:tiny",
        f"--data.train={text_file}",
        "--data.block_size=64",
    ]
    fit += ["--data.batch_size=1", *TWO, "--trainer.max_steps=6", "--trainer.precision=32-true", "--model.optimizer.lr=0.01"]
    fit += ["--trainer.gradient_clip_val=0.05", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    fit += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.log_every_n_steps=1"]
    losses = []
    for strategy in ("fsdp", "ddp"):
        words = [*fit, f"--trainer.strategy={strategy}", f"--trainer.logger.name={strategy}", f"--run={strategy}"]
        fulgurite(tmp_path, *words, before=FSDP_ON_CPU)
        rows = csv.DictReader((tmp_path / strategy / "version_0/metrics.csv").read_text().splitlines())
        losses.append([float(row["train_loss"]) for row in rows if row["train_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.05
