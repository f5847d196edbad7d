"""The whole system by config: stages, checkpoints within each of them, data of every kind, and the exported model."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from fulgurite.errors import InputError
from fulgurite.experiments.cli import run
from fulgurite.modules import FusionCompression
from fulgurite.modules.pretrained import load_model

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHAPE = ['--model.shape={"num_hidden_layers": 3, "intermediate_size": 48}']
DEPTH = '--model.shape={"num_hidden_layers": 2, "intermediate_size": 64}'
BASE = [
    "fit",
    "-c",
    "fusion/compress",
    "--model.source=random:tiny",
    *SHAPE,
    "--model.start.calibration_tokens=512",
    "--trainer.precision=32",
    *QUIET,
]


def callbacks(steps, every=0):
    save = f", {{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: {every}, save_last: true}}}}" if every else ""
    return (
        f"--trainer.callbacks=[{{class_path: TrainUntilCondition, init_args: {{max_steps: {steps}}}}}{save}, "
        "{class_path: ExportPretrained, init_args: {dtype: float32}}]"
    )


@pytest.fixture
def here(tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [*BASE, f"--data.train={text_file}", "--data.block_size=64"]


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ([], ["width", "depth"]),
        (["--model.start.order=joint", "--model.hidden_weight=0.5"], ["joint"]),
        (["--model.shape.num_hidden_layers=4"], ["width"]),
        (["--model.shape.intermediate_size=64"], ["depth"]),
        (["--model.shape.intermediate_size=64", "--model.start.operators.residual=dense"], ["width", "depth"]),
        (["--model.start=BestSelection"], []),
        (["--model.start=BestSelection", "--model.start.fold=false", "--model.start.refit=false"], []),
        (["--model.start=BestSelection", "--model.start.residual=directions", "--model.shape.hidden_size=24"], []),
        (["--model.start=KeepLayers", DEPTH], []),
        (["--model.start=KeepLayers", "--model.start.by=first_of_pairs", DEPTH], []),
        (["--model.start=AverageLayers", DEPTH], []),
        (["--model.start=LayerCollapse", "--model.start.merged=2", DEPTH], []),
        (["--model.start=ReplacementLayer", "--model.start.steps=3", DEPTH], []),
        (["--model.start=FreshModel"], []),
        (["--model.shape.hidden_size=24", "--model.hidden_weight=1.0"], ["width", "depth"]),
        (["--model.shape.hidden_size=24", "--model.start.operators.neurons=block", "--model.start.operators.block_size=8"], None),
    ],
)
def test_stages_end_and_leave_a_plain_model(here, tmp_path, words, stages):
    cli = run([*here, *words, callbacks(4), "--trainer.max_steps=14", "--run=one"])
    assert cli.model.stages == (["width", "depth"] if stages is None else stages)
    assert cli.model.in_last_stage
    assert cli.trainer.global_step == 14
    assert list(cli.model.held_out) == ["original", "start", "small model"]
    card = (tmp_path / "runs/fusion/one/export/README.md").read_text()
    assert "perplexity on held-out text, original" in card
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/fusion/one/export").eval()
    sizes = cli.model.shape
    assert (exported.config.num_hidden_layers, exported.config.hidden_size) == (sizes.num_hidden_layers, sizes.hidden_size)
    ids = torch.randint(3, 200, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, cli.model.model.eval()(ids).logits)


def test_training_that_ends_within_a_stage_still_leaves_a_plain_model(here, tmp_path, caplog):
    run([*here, callbacks(10, every=1), "--trainer.max_steps=3", "--run=short"])
    assert "Training ended in stage 'width'" in caplog.text
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/fusion/short/export")
    assert exported.config.num_hidden_layers == 3
    # Going on with no steps left trains nothing, and exports the same.
    run(["fit", "--experiment=fusion", "--run=short", "--ckpt_path=last", *QUIET])
    again, said = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/fusion/short/export", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    torch.testing.assert_close(again.state_dict(), exported.state_dict())


def test_a_best_checkpoint_of_a_stage_with_operators_is_not_exported(here, tmp_path, caplog):
    keep = "{class_path: ModelCheckpoint, init_args: {monitor: stage, mode: min, every_n_train_steps: 1}}"
    run([*here, callbacks(2).replace("[", f"[{keep}, "), "--trainer.max_steps=5", "--run=best"])
    assert "is not exported: it is of another stage" in caplog.text
    assert [path.name for path in (tmp_path / "runs/fusion/best").glob("export*")] == ["export"]


@pytest.mark.parametrize("stop", [3, 7, 11])  # in the width stage, in the depth stage, and behind both
def test_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(here, stop):
    words = [*here, callbacks(5, every=1)]
    whole = run([*words, "--trainer.max_steps=14", "--run=whole"])
    run([*words, f"--trainer.max_steps={stop}", "--run=parts", "--model.lr_scheduler.total_steps=4"])
    again = ["fit", "--experiment=fusion", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=14", *QUIET]
    resumed = run(again)
    assert resumed.trainer.global_step == whole.trainer.global_step == 14
    assert resumed.model.stage == 2
    for (name, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        if name.startswith("model."):
            torch.testing.assert_close(one, two, msg=name)


def rates(rate):
    return [f"--model.operator_optimizer.{name}={rate}" for name in ("lr", "adamw_lr")]


@pytest.mark.parametrize(("steps", "stage"), [(3, 0), (7, 1)])
def test_checkpoint_of_a_stage_loads_without_a_trainer(here, tmp_path, steps, stage):
    run([*here, callbacks(5, every=1), f"--trainer.max_steps={steps}", "--run=parts"])
    path = tmp_path / "runs/fusion/parts/checkpoints/last.ckpt"
    found = FusionCompression.load_from_checkpoint(path)
    assert found.stage == stage
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.state_dict().items() if name.startswith("model."))


def test_a_checkpoint_of_the_depth_stage_holds_the_refitted_weights(here, tmp_path):
    """Also where there was no stage before, so that they are not the source's any more."""
    words = [*here, '--model.shape={"num_hidden_layers": 2, "intermediate_size": 64}', callbacks(9, every=1)]
    cli = run([*words, "--trainer.max_steps=3", "--run=deep", *rates(0.0)])
    found = FusionCompression.load_from_checkpoint(tmp_path / "runs/fusion/deep/checkpoints/last.ckpt", map_location="cpu").eval()
    assert found.stages == ["depth"]
    ids = torch.randint(3, 200, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, cli.model.model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_trains_on_stored_labels_and_on_own_answers(here, tmp_path, text_file, documents_file):
    capture = ["predict", "-c", "distillation/capture", "--model.source=random:tiny", f"--data.train={text_file}"]
    run([*capture, "--data.block_size=64", "--trainer.callbacks.store=labels", *QUIET])
    stored = run(
        [*BASE, "--data=SoftLabelDataModule", "--data.store=labels", callbacks(2), "--trainer.max_steps=6", "--run=stored"]
    )
    assert stored.model.teacher_source is None
    assert stored.trainer.callback_metrics["train_kl"] > 0
    own = ["--data=SelfGeneratedCalibration", f"--data.documents={documents_file}", "--data.lengths=[250]"]
    own += ["--data.val_lengths=[300]", "--data.examples=2", "--data.val_examples=1", "--data.answer_tokens=6"]
    answers = run([*BASE, *own, callbacks(1), "--trainer.max_steps=3", "--run=own"])
    assert answers.model.in_last_stage
    assert answers.trainer.callback_metrics["val_kl"] >= 0


@pytest.mark.parametrize("start", ["LearnedFusion", "BestSelection", "KeepLayers"])
def test_an_emulator_keeps_embedding_head_and_first_layers_to_the_bit(here, tmp_path, start):
    shape = '--model.shape={"num_hidden_layers": 3, "intermediate_size": 64, "kept_layers": 2}'
    cli = run([*here, f"--model.start={start}", shape, callbacks(3), "--trainer.max_steps=6", "--run=emulator"])
    source = load_model("random:tiny").state_dict()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/fusion/emulator/export").state_dict()
    around = ("embed_tokens", "model.norm.", "lm_head", ".layers.0.", ".layers.1.")
    kept = [name for name in small if any(part in name for part in around)]
    assert len(kept) > 10
    assert all(torch.equal(small[name], source[name]) for name in kept)
    behind = "model.layers.2.mlp.down_proj.weight"
    assert not any(torch.equal(small[behind], source[behind.replace("2", str(layer))]) for layer in range(4))
    assert cli.trainer.global_step == 6


def test_what_operators_came_to_is_logged_and_exported(here, tmp_path):
    words = [*here, "--model.shape.hidden_size=24", callbacks(4), "--trainer.max_steps=10", "--trainer.log_every_n_steps=1"]
    cli = run([*words, "--run=seen"])
    folder = tmp_path / "runs/fusion/seen"
    learnt = json.loads((folder / "export/fusion.json").read_text())
    assert learnt == cli.model.learnt
    depth = torch.tensor(learnt["depth"])
    assert depth.shape == (3, 4)
    assert [row.nonzero().flatten().tolist() for row in depth[[0, 2]]] == [[cli.model.centres[0]], [cli.model.centres[2]]]
    assert depth[1].count_nonzero() == 3
    sizes = {"residual": 24, "neurons": 48, "activations": 48}
    assert {name: len(values) for name, values in learnt["singular_values"].items()} == sizes
    assert all(values == sorted(values, reverse=True) for values in learnt["singular_values"].values())
    assert (folder / "export/fusion.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder)).Reload()
    assert sorted({event.value for event in events.Scalars("stage")}) == [1, 2, 3]
    start = events.Scalars("val_perplexity")[0]
    assert (start.step, start.value) == (0, pytest.approx(cli.model.held_out["start"]))


def test_operators_learn(here):
    """Nearer to the large model on held-out text than operators that stay where they start."""
    words = [
        *here,
        "--model.start.order=joint",
        "--model.start.fold=false",
        "--model.start.refit=false",
        "--model.soft_weight=1.0",
        callbacks(60),
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=60",
    ]
    still, learnt = (
        run([*words, *rates(rate), f"--run={name}"]).trainer.callback_metrics["val_kl"]
        for name, rate in (("still", 0.0), ("learnt", 0.003))
    )
    assert learnt < 0.9 * still


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.shape.num_hidden_layers=9"], "shape.num_hidden_layers=9: the model has 4"),
        (["--model.shape.num_attention_heads=3"], "shape.num_attention_heads=3 cannot be divided among"),
        (["--model.start.calibration_tokens=0"], "calibration_tokens=0 measures nothing"),
        (["--model.start.field=-1"], "field=-1 is below 0"),
        (["--model.start=KeepLayers"], "KeepLayers only drops layers, but shape.intermediate_size=48 is not the model's 64"),
        (["--model.hidden_weight=1", "--model.teacher=package:smollm2-135m-instruct"], "is another model"),
        (["--model.hidden_weight=-1"], "hidden_weight=-1.0 is below 0"),
        (
            ["--model.shape.kept_layers=1"],
            "kept_layers=1 keeps layers as wide as they are, but shape.intermediate_size=48 is not",
        ),
        (
            [DEPTH, "--model.shape.kept_layers=3"],
            "shape.kept_layers=3: the small model has 2 layers, and one at least is to be fused. Legal: 0 to 1",
        ),
        ([DEPTH, "--model.shape.kept_layers=1", "--model.start=AverageLayers"], "start=AverageLayers changes layers wherever"),
        ([DEPTH, "--model.shape.kept_layers=1", "--model.start.operators.residual=dense"], "changes every layer, but"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(here, tmp_path, capsys, words, message):
    with pytest.raises((InputError, SystemExit)) as caught:
        run([*here, *words, "--run=bad"])
    assert message in " ".join(f"{caught.value} {capsys.readouterr().err}".split())
    assert not (tmp_path / "runs/fusion/bad/checkpoints").exists()
