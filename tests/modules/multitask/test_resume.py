"""Runs that were stopped go on where they were, and checkpoints of others are refused."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchjd.aggregation import NashMTL
from torchjd.scalarization import DWA, FAMO, UW

from fulgurite.datamodules import ClassificationTask, MultiTaskDataModule
from fulgurite.datamodules.multitask import TableRows
from fulgurite.errors import InputError
from fulgurite.modules import FeatureWeighting, MultiTask, TransformerBranch
from fulgurite.modules.multitask.combination import load_combination_state

from .system import COMBINATIONS, NAMES, QUIET, fit, model


@pytest.mark.parametrize(
    ("name", "step", "accumulate"),
    [  # where a checkpoint is behind a validation, too: every third step
        ("dwa", 5, 1),
        ("dwa", 4, 1),
        ("dwa", 4, 2),
        ("features", 4, 1),
        ("features", 6, 1),
        ("upgrad", 5, 1),
    ],
)
def test_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(data, tmp_path, name, step, accumulate):
    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
    whole = model(COMBINATIONS[name](), period=2)
    fit(whole, data(), 8, **settings)
    first, keep = model(COMBINATIONS[name](), period=2), ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=step)
    fit(first, data(), step, callbacks=[keep], enable_checkpointing=True, **settings)
    second = model(COMBINATIONS[name](), period=2)
    fit(second, data(), 8, ckpt_path=tmp_path / "kept.ckpt", **settings)
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[key], msg=key)
    loaded = MultiTask.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert loaded.objectives == first.objectives
    assert all(
        torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in first.state_dict().items() if "metrics" not in key
    )


def test_what_a_combination_remembers_goes_to_the_models_device():
    combination = DWA()
    state = {"_loss_sum": torch.ones(2), "_n_batches": 3, "_previous_averages": [torch.ones(2), torch.ones(2)]}
    load_combination_state(combination, state, torch.device("meta"))
    found = [combination._loss_sum, *combination._previous_averages]
    assert [tensor.device.type for tensor in found] == ["meta"] * 3
    assert combination._n_batches == 3


class Solver(nn.Module):
    """As Nash-MTL's: what it makes at its first step is in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.step = 0.0

    def forward(self, matrix):
        if self.step == 0:
            self.problem = object()
        self.step += 1
        assert self.problem
        return matrix.new_ones(len(matrix))


class Bargain(NashMTL):
    """Nash-MTL without its solver."""

    def __init__(self):
        super(NashMTL, self).__init__(weighting=Solver())

    def __repr__(self):
        return "Bargain()"

    def reset(self):
        self.weighting.step = 0.0


def _nash():
    pytest.importorskip("cvxpy")
    return NashMTL(n_tasks=5)


@pytest.mark.parametrize("make", [Bargain, _nash, lambda: FAMO(5)], ids=["solver", "nash", "famo"])
def test_what_no_checkpoint_can_keep_begins_anew(data, tmp_path, caplog, make):
    fit(model(make()), data(), 2).save_checkpoint(tmp_path / "two.ckpt")
    resumed = model(make())
    assert fit(resumed, data(), 4, ckpt_path=tmp_path / "two.ckpt").global_step == 4
    assert "begins anew but for its weights" in caplog.text
    assert getattr(getattr(resumed.combination, "weighting", None), "step", 2) == 2  # those of this run


def test_a_checkpoint_of_other_tasks_is_refused(data, table, tmp_path):
    fit(model(), data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    other = MultiTaskDataModule({"parity": ClassificationTask(TableRows(table))}, batch_size=6)
    with pytest.raises(InputError, match="the checkpoint is of"):
        fit(model(), other, 2, ckpt_path=tmp_path / "one.ckpt")


def test_another_combination_cannot_go_on(data, tmp_path):
    fit(model(DWA(temperature=3.0)), data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    for other in (DWA(), FeatureWeighting()):
        with pytest.raises(InputError, match=r"combination=.*, but the run that wrote the checkpoint had DWA\(temperature=3.0\)"):
            fit(model(other), data(), 2, ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize("other", [FeatureWeighting, lambda: UW(5), lambda: None])
def test_what_does_not_train_needs_no_combination_of_the_run(data, tmp_path, other):
    module = model(UW(5))
    fit(module, data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    reader, again = Trainer(limit_predict_batches=1, **QUIET), model(other())
    assert reader.predict(again, data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    for name, tensor in again.state_dict().items():
        if not name.startswith("combination."):
            assert torch.equal(tensor, module.state_dict()[name])


def test_a_loaded_model_refuses_data_of_other_classes(data, table, tmp_path):
    fit(model(), data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    loaded = MultiTask.load_from_checkpoint(tmp_path / "one.ckpt")
    same = MultiTaskDataModule({"parity": ClassificationTask(TableRows(table))})
    assert Trainer(limit_val_batches=1, **QUIET).validate(loaded, same, verbose=False)
    other = MultiTaskDataModule({"parity": ClassificationTask(TableRows(table), classes=["yes", "no"])})
    with pytest.raises(
        InputError, match=r"'parity' of the data is sequence \['yes', 'no'\], but the model learns sequence \['no', 'y"
    ):
        Trainer(**QUIET).validate(loaded, other)
    with pytest.raises(InputError, match="the data is of the tasks parity alone; the model has text/next_words"):
        fit(loaded, MultiTaskDataModule({"parity": ClassificationTask(TableRows(table))}), 1)


@pytest.mark.parametrize("settings", [{"batch_size": 7}, {"temperature": 1.0}, {"shares": {"text": 1.0, "parity": 2.0}}])
def test_another_order_of_examples_cannot_go_on(data, tmp_path, settings):
    trainer = Trainer(max_steps=1, enable_checkpointing=False, limit_val_batches=0, **QUIET)
    trainer.fit(model(), data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(InputError, match="The checkpoint's data order cannot be continued"):
        fit(model(), data(**settings), 2, ckpt_path=tmp_path / "one.ckpt")


class Deaf(TransformerBranch):
    """A branch of the user's own."""


def test_a_checkpoint_is_loaded_without_its_combination_but_with_its_branches(data, tmp_path):
    branches = {name: (Deaf if name == "parity" else TransformerBranch)() for name in NAMES}
    module = model(UW(5), branches=branches)
    fit(module, data(), 2).save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="branches: 'parity' was a Deaf. Give load_from_checkpoint the branches of the run"):
        MultiTask.load_from_checkpoint(tmp_path / "two.ckpt")
    fresh = {name: type(branch)() for name, branch in branches.items()}
    loaded = MultiTask.load_from_checkpoint(tmp_path / "two.ckpt", branches=fresh)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in loaded.state_dict().items())
