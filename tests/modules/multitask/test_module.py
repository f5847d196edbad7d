"""The whole system: combinations, predictions, export, schedules."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torchjd.scalarization import FAMO, UW, Mean
from transformers import AutoModelForCausalLM

from fulgurite.callbacks import ExportBranches, TaskSchedule, TextWriter, TokenRate
from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.modules import FeatureWeighting, MultiTask, TransformerBranch
from fulgurite.modules.multitask.trunk import load_trunk
from fulgurite.modules.optimizers import MuonAdamW

from .system import COMBINATIONS, NAMES, QUIET, fit, model


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_trains_trunk_and_branches(data, name):
    module = model(COMBINATIONS[name](), period=2)
    made = data()
    trainer = fit(module, made, 4, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed", log_every_n_steps=1)
    start = model(period=2)
    start._build(made.objectives, load_trunk("random:tiny", "float32"))
    moved = {key for key, tensor in module.trunk.state_dict().items() if not torch.equal(tensor, start.trunk.state_dict()[key])}
    assert len(moved) == len(start.trunk.state_dict())
    found = {key for key in trainer.callback_metrics if key.startswith("val_loss/")}
    assert found == {f"val_loss/{task}" for task in NAMES}
    assert {f"val_{kind}/parity" for kind in ("accuracy", "f1", "matthews")} <= set(trainer.callback_metrics)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    if name in ("features", "upgrad"):
        assert {f"weight/{task}" for task in NAMES} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["cosine/text/distance~text/order"].abs() <= 1


def test_nothing_is_logged_where_nothing_is_asked_for(data):
    assert fit(model(FeatureWeighting()), data(), 1, log_every_n_steps=0).global_step == 1


def test_first_batches_of_validation_have_a_share_of_each_task(data):
    trainer = fit(model(), data(), 1, limit_val_batches=2, val_check_interval=1)
    assert {f"val_loss/{task}" for task in NAMES} <= set(trainer.callback_metrics)


def test_branches_of_divided_weights_are_not_exported(data):
    trainer = mock.Mock(strategy=FSDPStrategy())
    with pytest.raises(InputError, match="ExportBranches needs whole weights, which FSDPStrategy may divide"):
        ExportBranches().on_fit_start(trainer, model())


def test_tasks_are_learnt(data):
    trainer = fit(model(rate=3e-3), data(batch_size=12), 100, callbacks=[TokenRate()])
    found = trainer.callback_metrics
    assert found["val_accuracy/parity"] > 0.9
    assert found["tokens_per_second"] > 0
    assert found["val_perplexity/text/next_words"] < 20  # of 259 bytes


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5), MuonAdamW])
def test_what_a_combination_learns_has_a_rate_of_its_own_and_no_decay(data, optimizer):
    module = MultiTask("random:tiny", combination=UW(5), combination_rate=0.05, optimizer=optimizer)
    trainer = fit(module, data(), 4)
    *others, own = trainer.optimizers[0].param_groups
    assert own["params"] == [module.combination.log_var]
    assert (own["lr"], own["weight_decay"]) == (0.05, 0.0)
    assert all(one is not module.combination.log_var for group in others for one in group["params"])
    assert sum(len(group["params"]) for group in others) == sum(1 for _ in module.parameters()) - 1
    assert module.combination.log_var.abs().max() > 0.15  # AdamW goes by its rate a step where losses are far from 1


def test_branches_can_have_a_rate_of_their_own(data):
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5)
    module = MultiTask("random:tiny", combination=UW(5), branch_rate=0.02, optimizer=optimizer)
    trunk, weights, branches = fit(module, data(), 1).optimizers[0].param_groups
    found = [(group["lr"], group["weight_decay"]) for group in (trunk, weights, branches)]
    assert found == [(1e-3, 0.5), (0.025, 0.0), (0.02, 0.5)]
    assert {id(one) for one in branches["params"]} == {id(one) for one in module.branches.parameters()}
    assert {id(one) for one in trunk["params"]} == {id(one) for one in module.trunk.parameters()}


def test_a_combination_that_learns_nothing_changes_no_optimizer(data):
    for combination in (None, FAMO(5)):
        assert len(fit(model(combination), data(), 1).optimizers[0].param_groups) == 1


def test_losses_behind_a_step_are_found_as_those_before_it(data, monkeypatch):
    """A step that changes nothing leaves FAMO's losses as they were, in the precision of training."""
    pairs = []
    monkeypatch.setattr(FAMO, "update", lambda self, after: pairs.append((self._prev_losses, after)))
    module = model(FAMO(5), rate=0.0, branches={name: TransformerBranch(1, dropout=0.0) for name in NAMES})
    fit(module, data(), 3, precision="bf16-mixed", accumulate_grad_batches=2)
    assert len(pairs) == 2
    for before, after in pairs:
        torch.testing.assert_close(before, after, rtol=0, atol=0)


class HalfFrozen(TransformerBranch):
    """A branch of which a part is not trained."""

    def attach(self, trunk, objective):
        super().attach(trunk, objective)
        self.layers.requires_grad_(False)


def test_what_a_branch_freezes_stays_as_it_is_under_an_aggregator(data):
    branches = {name: HalfFrozen() if name == "parity" else TransformerBranch() for name in NAMES}
    module = model(COMBINATIONS["upgrad"](), branches=branches)
    fit(module, data(), 2)
    assert all(parameter.grad is None for parameter in module.branches["parity"].layers.parameters())
    assert module.branches["parity"].head.weight.grad is not None or module.trainer.global_step == 2


def test_batches_of_one_task_train_too(data):
    trainer = fit(model(Mean()), data(batches="task"), 6)
    assert trainer.callback_metrics["val_loss/parity"].isfinite()


def test_predictions_are_readable(data, tmp_path):
    module, made = model(max_new_tokens=5), data()
    fit(module, made, 2)
    trainer = Trainer(callbacks=[TextWriter(str(tmp_path / "said.jsonl"))], **QUIET)
    trainer.predict(module, made, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == set(NAMES)
    by_task = {row["task"]: row for row in rows}
    assert by_task["parity"]["prediction"] in ("yes", "no")
    assert by_task["text/distance"]["prediction"] in ("adjacent", "same document", "different document")
    assert 0 <= by_task["parity"]["probability"] <= 1
    assert len(by_task["text/next_words"]["prediction"].encode()) <= 20
    assert sum(row["task"] == "parity" for row in rows) == made.tasks["parity"].size("test")


def test_generation_branch_is_exported_as_a_plain_model(data, tmp_path, caplog):
    caplog.set_level("INFO")
    module = model()
    fit(module, data(), 2, callbacks=[ExportBranches(str(tmp_path / "out"), dtype="float32")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out/text/next_words").eval()
    assert plain.config.num_hidden_layers == 5
    ids = torch.randint(3, 200, (2, 12))
    view = {"mask": "causal", "input_ids": ids, "position_ids": torch.arange(12).expand(2, -1)}
    branch = module.eval().branches["text/next_words"]
    states = branch.states(module.trunk, module.trunk(view), view)
    torch.testing.assert_close(plain(ids).logits, branch.scores(module.trunk, states, view), atol=1e-5, rtol=1e-4)
    assert "Not exported: parity, since a decoder that sees both directions" in caplog.text
    card = (tmp_path / "out/text/next_words/README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "val_perplexity/text/next_words" in card


def test_tasks_join_as_scheduled(data):
    made = data()
    seen = []

    class Look(TaskSchedule):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append({name for view in batch["views"] for name in view["targets"]})

    fit(
        model(), made, 6, callbacks=[Look({"text": 2})], accumulate_grad_batches=2, limit_train_batches=12, val_check_interval=1.0
    )
    assert seen[:4] == [{"parity"}] * 4
    assert all(one == set(NAMES) for one in seen[4:])
    assert len(seen) == 12
    assert made.schedule == {}  # for another Trainer
    del seen[:]
    fit(model(), made, 6, callbacks=[Look({"text": 4})], max_epochs=2, limit_train_batches=0.05, val_check_interval=1.0)
    assert seen == [{"parity"}] * 4 + [set(NAMES)] * (len(seen) - 4)
    assert len(seen) == 6 > made.trainer.num_training_batches


def test_a_task_is_added_by_yaml_and_a_file_alone(table, long_documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"""
data:
  class_path: MultiTaskDataModule
  init_args:
    tasks:
      text:
        class_path: TextTask
        init_args: {{train: {long_documents}, length: 48}}
      parity:
        class_path: ClassificationTask
        init_args:
          data: {{train: {table}}}
"""
    )
    words = [
        "fit",
        "-c",
        "multitask/train",
        "-c",
        "mine.yaml",
        "--model.source=random:tiny",
        "--trainer.max_steps=50",
        "--run=mine",
    ]
    cli = run([*words, "--trainer.precision=32", "--trainer.enable_progress_bar=false"])
    assert list(cli.model.objectives) == NAMES
    assert "val_accuracy/parity" in cli.trainer.callback_metrics
    assert (tmp_path / "runs/multitask/mine/export/text/next_words/config.json").is_file()
