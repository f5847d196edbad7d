"""The whole system: combinations, checkpoints, predictions, export, and what is refused."""

import csv
import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torchjd.aggregation import PCGrad, UPGrad
from torchjd.scalarization import DWA, FAMO, UW, Mean
from transformers import AutoModelForCausalLM

from fulgurite.callbacks import ExportBranches, TaskSchedule, TextWriter, TokenRate
from fulgurite.datamodules import ClassificationTask, MultiTaskDataModule, TextTask
from fulgurite.datamodules.multitask import TableRows
from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.modules import FeatureWeighting, MultiTask, TransformerBranch
from fulgurite.modules.multitask import LeastSquaresProjector
from fulgurite.modules.multitask.trunk import load_trunk

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
NAMES = ["text/next_words", "text/masked_words", "text/distance", "text/order", "parity"]


@pytest.fixture
def table(tmp_path):
    with open(tmp_path / "parity.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"number {place} is {('even', 'odd')[place % 2]}", ("yes", "no")[place % 2]] for place in range(60))
    return str(tmp_path / "parity.csv")


@pytest.fixture
def data(table, long_documents):
    def make(**settings):
        tasks = {
            "text": TextTask(long_documents, length=48, val_rows=8, val_fraction=0.2),
            "parity": ClassificationTask(TableRows(table), length=32),
        }
        return MultiTaskDataModule(tasks, **{"batch_size": 6, "seed": 0, **settings})

    return make


def model(combination=None, rate=1e-3, **settings):
    seed_everything(0)
    return MultiTask(
        "random:tiny", combination=combination, optimizer=lambda parameters: torch.optim.AdamW(parameters, rate), **settings
    )


def fit(module, data, steps=4, **settings):
    callbacks = settings.pop("callbacks", [])
    path = settings.pop("ckpt_path", None)
    defaults = {"enable_checkpointing": False, "val_check_interval": 2, "limit_val_batches": 6}
    trainer = Trainer(max_steps=steps, callbacks=callbacks, **{**QUIET, **defaults, **settings})
    trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
    return trainer


COMBINATIONS = {
    "sum": lambda: None,
    "mean": Mean,
    "uncertainty": lambda: UW(5),
    "dwa": DWA,
    "famo": lambda: FAMO(5),
    "features": FeatureWeighting,
    "upgrad": lambda: UPGrad(projector=LeastSquaresProjector()),
    "pcgrad": PCGrad,
}


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


def test_tasks_are_learnt(data):
    trainer = fit(model(rate=3e-3), data(batch_size=12), 150, callbacks=[TokenRate()])
    found = trainer.callback_metrics
    assert found["val_accuracy/parity"] > 0.9
    assert found["tokens_per_second"] > 0
    assert found["val_perplexity/text/next_words"] < 20  # of 259 bytes


def test_batches_of_one_task_train_too(data):
    trainer = fit(model(Mean()), data(batches="task"), 6)
    assert trainer.callback_metrics["val_loss/parity"].isfinite()


@pytest.mark.parametrize("name", ["dwa", "features", "upgrad"])
def test_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(data, tmp_path, name):
    whole = model(COMBINATIONS[name](), period=2)
    fit(whole, data(), 8)
    first, keep = model(COMBINATIONS[name](), period=2), ModelCheckpoint(tmp_path, filename="five", every_n_train_steps=5)
    fit(first, data(), 5, callbacks=[keep], enable_checkpointing=True)
    second = model(COMBINATIONS[name](), period=2)
    fit(second, data(), 8, ckpt_path=tmp_path / "five.ckpt")
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[key], msg=key)
    loaded = MultiTask.load_from_checkpoint(tmp_path / "five.ckpt")
    assert loaded.objectives == first.objectives
    assert all(
        torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in first.state_dict().items() if "metrics" not in key
    )


def test_a_checkpoint_of_other_tasks_is_refused(data, table, tmp_path):
    fit(model(), data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    other = MultiTaskDataModule({"parity": ClassificationTask(TableRows(table))}, batch_size=6)
    with pytest.raises(InputError, match="The checkpoint is of other tasks: text/next_words"):
        fit(model(), other, 2, ckpt_path=tmp_path / "one.ckpt")


def test_another_combination_cannot_go_on(data, tmp_path):
    fit(model(DWA(temperature=3.0)), data(), 1).save_checkpoint(tmp_path / "one.ckpt")
    for other in (DWA(), FeatureWeighting()):
        with pytest.raises(InputError, match=r"combination=.*, but the run that wrote the checkpoint had DWA\(temperature=3.0\)"):
            fit(model(other), data(), 2, ckpt_path=tmp_path / "one.ckpt")


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


def test_texts_longer_than_an_encoders_positions_are_refused(data):
    module = model()
    module.trunk = load_trunk("random:tiny", "float32")
    module._check_lengths(data())
    module.trunk.is_encoder, module.trunk.model.config.model_type = True, "bert"
    module.trunk.model.config.max_position_embeddings = 40
    with pytest.raises(InputError, match="tasks.text.length=48: source='random:tiny' has positions for 40 tokens"):
        module._check_lengths(data())


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": {"parity": TransformerBranch()}}, "branches has none for task 'text/next_words'"),
        ({"branches": {"other": TransformerBranch()}}, "branches has 'other', which is no task of the data"),
        ({"loss_weights": {"parities": 1.0}}, "loss_weights has 'parities', which is no task of the data"),
        ({"loss_weights": {"parity": -1.0}}, "loss_weights.parity=-1.0 is below 0"),
        ({"branch_layers": -1}, "branch.layers=-1 is below 0"),
        ({"period": 0}, "period=0. Legal: 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 writes nothing"),
        ({"fresh": {"hidden_sizes": 4}}, "fresh has 'hidden_sizes', which the model's config has not"),
    ],
)
def test_bad_settings_are_refused(data, settings, message):
    with pytest.raises(InputError) as caught:
        fit(model(**settings), data(), 1)
    assert message in str(caught.value)


def test_combinations_that_compare_need_all_tasks(data):
    with pytest.raises(InputError, match="combination=UPGrad compares tasks, but data.batches='task' brings one at a time"):
        fit(model(UPGrad(projector=LeastSquaresProjector())), data(batches="task"), 1)
    with pytest.raises(InputError, match="combination=UW needs all tasks from the start, but TaskSchedule adds some later"):
        fit(model(UW(5)), data(), 1, callbacks=[TaskSchedule({"text": 1})])


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({"tekst": 1}, "starts has 'tekst', which is no task of the data"),
        ({"text": 1, "parity": 2}, "no task is there from the start"),
        ({"text": -1}, "starts.text=-1 is below 0"),
    ],
)
def test_bad_schedules_are_refused(data, starts, message):
    with pytest.raises(InputError, match=message):
        fit(model(), data(), 1, callbacks=[TaskSchedule(starts)])


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
