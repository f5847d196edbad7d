"""Two processes end as one does with the same batches, for every way to combine the tasks."""

import csv
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torchjd.aggregation import UPGrad
from torchjd.scalarization import DWA, FAMO, UW

from fulgurite.datamodules import ClassificationTask, MultiTaskDataModule, RegressionTask
from fulgurite.datamodules.multitask import TableRows
from fulgurite.modules import FeatureWeighting, MultiTask, TransformerBranch
from fulgurite.modules.multitask import LeastSquaresProjector

COMBINATIONS = {
    "sum": lambda: None,
    "uncertainty": lambda: UW(3),
    "dwa": DWA,
    "famo": lambda: FAMO(3),
    "map": lambda: FeatureWeighting(compare="map"),
    "features": lambda: FeatureWeighting(compare="features"),
    "jacobian": lambda: UPGrad(projector=LeastSquaresProjector()),
}


class Keep(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{trainer.world_size}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    devices, name, precision = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    seed_everything(0)
    rows = TableRows("rows.csv")
    tasks = {
        "parity": ClassificationTask(rows, label="parity", length=32),
        "third": ClassificationTask(rows, label="third", length=32),
        "number": RegressionTask(rows, label="number", length=32),
    }
    data = MultiTaskDataModule(tasks, batch_size=12 // devices, shares={name: 1.0 for name in tasks}, seed=0)
    branches = {name: TransformerBranch(1, dropout=0.0) for name in tasks}
    model = MultiTask(
        "random:tiny",
        branches=branches,
        combination=COMBINATIONS[name](),
        period=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
    )
    trainer = Trainer(
        max_steps=6, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[Keep()],
        precision=precision, accumulate_grad_batches=2, gradient_clip_val=0.5, limit_val_batches=1, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
    )
    trainer.fit(model, data)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 4e-3)])
@pytest.mark.parametrize("name", ["sum", "uncertainty", "dwa", "famo", "map", "features", "jacobian"])
def test_two_ranks_end_alike_and_as_one_does(tmp_path, name, precision, tolerance):
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "parity", "third", "number"])
        writer.writerows([f"number {place}", place % 2, "abc"[place % 3], place / 90] for place in range(90))
    (tmp_path / "script.py").write_text(SCRIPT)
    for devices in ("2", "1"):
        words = [sys.executable, "script.py", devices, name, precision]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second, alone = (torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("2-0", "2-1", "1-0"))
    for key, tensor in first.items():
        if key.startswith(("trunk.", "branches.")):
            assert torch.equal(tensor, second[key]), key
            torch.testing.assert_close(tensor, alone[key], atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.slow
def test_branches_without_a_gradient_are_refused_where_ddp_would_wait(tmp_path):
    (tmp_path / "rows.csv").write_text("text,parity,third,number\n" + "".join(f"n {n},{n % 2},{n % 3},{n}\n" for n in range(90)))
    (tmp_path / "script.py").write_text(SCRIPT.replace("batch_size=12", 'batches="task", batch_size=12'))
    words = [sys.executable, "script.py", "2", "sum", "32-true"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "data.batches='task' leaves branches without a gradient" in done.stderr
