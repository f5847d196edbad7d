"""Stages on two processes: each new stage's gradients are averaged too."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from fulgurite.callbacks import TrainUntilCondition
from fulgurite.datamodules import TextDataModule
from fulgurite.modules import FusionCompression
from fulgurite.modules.fusion import FusionShape, LearnedFusion


class Keep(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{trainer.world_size}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    seed_everything(0)
    devices = int(sys.argv[1])
    shape = FusionShape(num_hidden_layers=3, intermediate_size=48)
    start = LearnedFusion(calibration_tokens=512)
    steps = partial(torch.optim.SGD, lr=0.3)
    model = FusionCompression("random:tiny", shape=shape, start=start, optimizer=steps, operator_optimizer=steps)
    data = TextDataModule("text.txt", block_size=64, batch_size=2 // devices)
    stop, keep = TrainUntilCondition(max_steps=4), Keep()
    trainer = Trainer(
        max_steps=12, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[stop, keep],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
    )
    trainer.fit(model, data)
"""


@pytest.mark.slow
def test_two_ranks_end_alike_and_as_one_does(tmp_path, text_file):
    (tmp_path / "script.py").write_text(SCRIPT)
    for devices in ("2", "1"):
        words = [sys.executable, "script.py", devices]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0"))
    for name, tensor in first.items():
        if name.startswith("model."):
            assert torch.equal(tensor, second[name]), name
            torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=1e-3, msg=name)
