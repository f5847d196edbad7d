import pytest

from fulgurite.callbacks import TrainProgress
from fulgurite.experiments.cli import run


@pytest.fixture
def fit(text_file, tmp_path, monkeypatch):
    """Train on 10 batches an epoch, and return what the bar was told: descriptions and totals."""
    monkeypatch.chdir(tmp_path)
    shown = []

    def add_task(self, total, description, visible=True):
        shown.append((description, total))
        return 0

    monkeypatch.setattr(TrainProgress, "_add_task", add_task)
    monkeypatch.setattr(TrainProgress, "_update", lambda *args, **settings: None)
    words = ["--model.source=random:tiny", f"--data.train={text_file}", "--data.train_tokens=1280", "--data.block_size=64"]
    words += ["--data.val_fraction=0", "--trainer.limit_val_batches=0", "--trainer.enable_model_summary=false", "--run=one"]
    words += ['--trainer.callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3}}]']

    def train(*more):
        shown.clear()
        run(["fit", "-c", "language_model/finetune", "--data.batch_size=2", *words, *more])
        return shown

    return train


def test_the_bar_counts_the_batches_that_a_runs_steps_take(fit):
    steps = ["--trainer.max_epochs=-1", "--trainer.accumulate_grad_batches=2"]
    assert fit(*steps, "--trainer.max_steps=3") == [("Epoch 1", 6)]
    assert fit(*steps, "--trainer.max_steps=4", "--ckpt_path=last") == [("Epoch 1", 8)]


def test_the_bar_counts_the_epochs_that_a_run_has(fit):
    assert fit() == [("Epoch 1 of 1", 10)]
