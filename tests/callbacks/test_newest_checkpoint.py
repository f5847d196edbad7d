"""What a run leaves to go on from."""

from types import SimpleNamespace

import pytest
import torch

from fulgurite.callbacks import NewestCheckpoint
from fulgurite.errors import InputError
from fulgurite.experiments.main import main


def train(text_file, folder, steps, *more):
    words = [
        "fit",
        "-c",
        "language_model/finetune",
        "--model.source=random:tiny",
        f"--data.train={text_file}",
        f"--runs_folder={folder}",
    ]
    words += ["--data.block_size=64", "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--run=short"]
    words += ["--trainer.callbacks=[{class_path: NewestCheckpoint, init_args: {every_n_train_steps: 2}}]"]
    words += ["--model.lr_scheduler=null", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
    main([*words, f"--trainer.max_steps={steps}", *more])
    return torch.load(folder / "finetune/short/checkpoints/newest.ckpt", weights_only=True)


def test_a_run_can_be_trained_on_after_its_last_step(text_file, tmp_path):
    stopped = train(text_file, tmp_path / "one", 3)
    assert stopped["global_step"] == 3
    resumed = train(text_file, tmp_path / "one", 5, "--ckpt_path=last")
    whole = train(text_file, tmp_path / "two", 5)
    assert resumed["global_step"] == whole["global_step"] == 5
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name


def test_the_last_step_of_the_last_epoch_is_kept(text_file, tmp_path):
    found = train(text_file, tmp_path, -1, "--trainer.max_epochs=1", "--trainer.limit_train_batches=5")
    assert found["global_step"] == 5


def test_the_last_step_of_a_run_that_a_validation_ends_is_kept(text_file, tmp_path):
    stop = "{class_path: EarlyStopping, init_args: {monitor: val_loss, mode: max, patience: 1}}"
    keep = "{class_path: NewestCheckpoint, init_args: {every_n_train_steps: 100}}"
    words = [f"--trainer.callbacks=[{stop}, {keep}]", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    found = train(text_file, tmp_path, 50, *words)
    assert 1 < found["global_step"] < 50


def test_nothing_is_saved_within_the_accumulation_of_a_step(tmp_path):
    saved = []
    trainer = SimpleNamespace(
        global_step=4, fast_dev_run=False, should_stop=False, max_steps=9, is_last_batch=False, max_epochs=-1
    )
    trainer.default_root_dir, trainer.current_epoch, trainer.save_checkpoint = tmp_path, 0, saved.append
    first, resumed = NewestCheckpoint(4), NewestCheckpoint(4)
    first.on_train_batch_end(trainer, None, None, None, 7)
    first.on_train_batch_end(trainer, None, None, None, 8)
    resumed.load_state_dict(first.state_dict())
    resumed.on_train_batch_end(trainer, None, None, None, 8)
    assert saved == [tmp_path / "checkpoints" / "newest.ckpt"]


def test_an_interval_below_one_is_refused():
    with pytest.raises(InputError, match="every_n_train_steps=0: legal is 1 or more"):
        NewestCheckpoint(0)
