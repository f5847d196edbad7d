import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch.distributed.run import get_args_parser

from fulgurite.errors import InputError
from fulgurite.experiments.cli import FulguriteCLI, parse, run
from fulgurite.experiments.configs import packaged_configs
from fulgurite.modules.offsite import EmulatorManifest, ModelPart
from fulgurite.modules.offsite.certificates import make_certificates
from fulgurite.modules.offsite.owner import OwnerLayers
from fulgurite.modules.offsite.server import OwnerServer
from fulgurite.modules.tiny import tiny_model

from ..conftest import prose

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

LAYERS = "--model.student.keep_layers.count=2"


@pytest.fixture(autouse=True)
def in_an_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offsite(tmp_path, text_file):
    """Words for the configs of offsite tuning: an emulator of the tiny model, whose owner answers in this process."""
    emulator = ["--model.emulator.layers=3", "--model.emulator.identical=1", f"--data.train={text_file}", "--data.block_size=64"]
    run(["fit", "-c", "offsite/emulator", "--model.source=random:tiny", *emulator, "--trainer.max_steps=1", "--run=made", *QUIET])
    folder, papers = tmp_path / "runs/emulator/made/export", tmp_path / "papers"
    make_certificates(papers, hosts=["localhost"], parties=["one"])
    model = tiny_model()
    server = OwnerServer(
        OwnerLayers(ModelPart(model, 1, 4)),
        model=EmulatorManifest.load(folder).model,
        tokens=json.loads((papers / "tokens.json").read_text()),
        certificate=papers / "owner.crt",
        key=papers / "owner.key",
    ).start()
    access = {"address": f"localhost:{server.port}", "token": papers / "one.token", "certificate": papers / "owner.crt"}
    reach = [f"--model.owner.{name}={value}" for name, value in access.items()]
    yield {"emulator": emulator, "tune": [], "plug_in": [], "split": [f"--model.source={folder}", *reach]}
    server.stop(0)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """What the tiny model says of a text of 6 thousand bytes."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "text.txt").write_text(prose(1100))
    words = ["predict", "-c", "distillation/capture", "--model.source=random:tiny", f"--data.train={folder / 'text.txt'}"]
    words += ["--data.block_size=64", f"--trainer.callbacks.store={folder / 'store'}", f"--runs_folder={folder}"]
    run([*words, *QUIET])
    return folder / "store"


@pytest.fixture
def student(labels):
    """Words that make a small student learn from them."""
    return [LAYERS, f"--data.store={labels}"]


@pytest.fixture
def inputs(tmp_path, text_file, documents_file, offsite, labels, student):
    """Words that point each packaged config at the tiny model and at small data."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "response": "ABCD"[n % 4]}) + "\n" for n in range(40)))
    text = [f"--data.train={text_file}", "--data.block_size=64"]
    calibration = (
        f"--data.documents={documents_file}",
        *("--data.lengths=[250]", "--data.val_lengths=[300]", "--data.examples=1", "--data.val_examples=1"),
        "--data.answer_tokens=6",
    )
    tasks = f"--data.tasks={{text: {{class_path: TextTask, init_args: {{train: '{documents_file}', length: 48}}}}}}"
    return {
        "compose/emulator": ['--model.emulator={"layers": 3, "identical": 1, "fused": null}', *text],
        "compose/fuse": [f"--data.store={labels}", '--model.shape={"num_hidden_layers": 3}'],
        "compose/multitask": [tasks],
        "compose/spans": [*calibration],
        "compose/two_ranks": [f"--data.store={labels}", "--trainer.devices=1", "--trainer.strategy=auto"],
        "distillation/capture": [*text, "--trainer.callbacks.store=others"],
        "distillation/student": student,
        "distillation/large": [*student, "--trainer.strategy=auto"],
        "distillation/online": [LAYERS, *text, "--model.teacher=random:tiny"],
        "fusion/compress": [*text, '--model.shape={"num_hidden_layers": 3}'],
        "fusion/large": [*text, '--model.shape={"num_hidden_layers": 3}', "--trainer.strategy=auto"],
        "gradient_pruning/train": [*text, "--trainer.max_epochs=1"],
        "language_model/finetune": text,
        "language_model/instruct": [f"--data.train={rows}"],
        "offsite/emulator": offsite["emulator"],
        "multitask/train": [tasks],
        **{f"offsite/{name}": [f"--data.train={rows}", *offsite[name]] for name in ("tune", "plug_in", "split")},
        "spans/compress": [*calibration],
    }


def test_every_packaged_config_runs(inputs):
    assert inputs.keys() == packaged_configs().keys()
    for name, words in inputs.items():
        command = {"distillation/capture": "predict", "offsite/plug_in": "validate"}.get(name, "fit")
        # As on machines that are fast in it, whatever this one is.
        mixed = ["--trainer.precision=bf16-mixed"] if "precision: auto" in packaged_configs()[name].read_text() else []
        cli = run([command, "-c", name, "--model.source=random:tiny", "--trainer.fast_dev_run=true", *words, *mixed, *QUIET])
        assert cli.trainer.num_val_batches or command == "predict"
        if command == "predict":
            assert cli.config["predict"]["return_predictions"] is False


class Losses(Callback):
    """Keeps the losses of a run."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def fit(words, monkeypatch=None, stop_at=None):
    return run(["fit", "-c", "distillation/student", "--model.source=random:tiny", *words, *QUIET])


CALLBACKS = "--trainer.callbacks=[{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 7, save_last: true}}]"


@pytest.mark.parametrize(  # within the first epoch (22 steps), and in the second
    ("stop", "workers"),
    [(14, 2), (35, 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(7, 0), (7, 2), (14, 0), (35, 2)])],
)
def test_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(student, stop, workers):
    words = [*student, CALLBACKS, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2"]
    words += [f"--data.num_workers={workers}", "--data.batch_size=2", "--model.lr_scheduler.total_steps=100"]
    whole = fit([*words, "--run=whole"])
    fit([*words, "--run=parts", f"--trainer.max_steps={stop}"])
    again = ["fit", "--experiment=distillation-student", "--run=parts", "--ckpt_path=last"]
    resumed = run([*again, "--trainer.max_steps=-1", *QUIET])
    assert resumed.trainer.global_step == whole.trainer.global_step > stop
    for (name, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(one, two), name
    for name, value in whole.trainer.callback_metrics.items():
        if name != "tokens_per_second":
            assert torch.equal(value, resumed.trainer.callback_metrics[name]), name


def test_run_folder_holds_the_record(student, tmp_path):
    cli = fit([*student, "--run=mine", "--seed_everything=3"])
    folder = tmp_path / "runs" / "distillation-student" / "mine"
    assert cli.trainer.default_root_dir == "runs/distillation-student/mine"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "checkpoints", "export"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    record = json.loads((folder / "environment.json").read_text())
    assert record["seed"] == 3
    assert {"tokenizer", "teacher", "store"} <= record["data"].keys()
    assert record["packages"]["lightning"]
    assert "--run=mine" in record["command"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["source"] == "random:tiny"


def test_same_command_twice_gives_the_same_numbers(student):
    runs = [fit([*student, f"--run={name}"]) for name in ("a", "b")]
    figures = [{n: float(v) for n, v in cli.trainer.callback_metrics.items() if n != "tokens_per_second"} for cli in runs]
    assert figures[0] == figures[1]
    other = fit([*student, "--run=c", "--seed_everything=1"])
    assert float(other.trainer.callback_metrics["val_loss"]) != figures[0]["val_loss"]


def test_existing_run_is_left_as_it_is(student):
    fit([*student, "--run=mine"])
    with pytest.raises(InputError, match="'mine'.*holds a run already"):
        fit([*student, "--run=mine"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_another_command_leaves_the_record_of_a_training_as_it_is(text_file, command):
    words = ["-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={text_file}", "--data.block_size=64"]
    words += ["--run=mine", *QUIET]
    run(["fit", *words, "--trainer.max_steps=2", "--trainer.callbacks=[NewestCheckpoint]"])
    folder = Path("runs/finetune/mine")
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "environment.json")}
    for _ in range(2):
        run([command, *words, f"--trainer.limit_{command.replace('validate', 'val')}_batches=1"])
    assert before == {name: (folder / name).read_bytes() for name in before}
    own = {f"config-{command}.yaml", f"config-{command}-1.yaml", f"environment-{command}.json", f"environment-{command}-1.json"}
    assert {path.name for kind in ("config", "environment") for path in folder.glob(f"{kind}*")} == {*before, *own}
    assert json.loads((folder / f"environment-{command}-1.json").read_text())["command"][0] == command
    resumed = run(["fit", "--experiment=finetune", "--run=mine", "--ckpt_path=last", "--trainer.max_steps=3", *QUIET])
    assert resumed.trainer.global_step == 3
    assert yaml.safe_load((folder / "config-1.yaml").read_text())["trainer"]["max_steps"] == 3
    assert (folder / "environment-1.json").is_file()


@pytest.mark.parametrize(
    ("launched", "first"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),  # by torchrun
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1"}, True),  # which orders machines in its own way
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),  # by Lightning, in the process that starts the others
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"NODE_RANK": "1"}, False),  # on the second machine
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_alone_refuses_the_folder_of_another_run(text_file, monkeypatch, launched, first):
    words = ["fit", "-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={text_file}", "--run=mine"]
    folder = Path("runs/finetune/mine")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    monkeypatch.setattr(FulguriteCLI, "_run_subcommand", lambda self, subcommand: None)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    if first:
        with pytest.raises(InputError, match="'mine'.*holds a run already"):
            run([*words, *QUIET])
    else:  # rank 0 has written there since
        assert run([*words, *QUIET]).trainer.default_root_dir == str(folder)


def test_torchrun_takes_the_command_of_the_page_about_large_models():
    page = (Path(__file__).parents[2] / "docs" / "large-models.md").read_text("utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^torchrun (.+)$", page, re.MULTILINE)
    taken = get_args_parser().parse_args(command.split())
    assert taken.no_python
    assert taken.training_script == "fulgurite"
    assert parse(taken.training_script_args).run == "seven_on_two"


def test_command_line_that_contradicts_the_checkpoint_is_refused(student):
    fit([*student, "--run=mine"])
    with pytest.raises(InputError, match=r"model\.soft_weight is 0\.5 there, 0\.9 here"):
        fit([*student, "--run=mine", "--ckpt_path=last", "--model.soft_weight=0.9"])
    words = ["validate", "-c", "distillation/student", "--model.source=random:tiny", *student, *QUIET]
    checkpoint = "runs/distillation-student/mine/checkpoints/best.ckpt"
    with pytest.raises(InputError, match=r"model\.divergence"):
        run([*words, f"--ckpt_path={checkpoint}", "--model.divergence=reverse_kl"])
    validated = run([*words, f"--ckpt_path={checkpoint}", "--model.optimizer.lr=1.0", "--run=v"])
    assert "val_kl" in validated.trainer.callback_metrics


def test_missing_checkpoints_are_refused(student):
    with pytest.raises(InputError, match=r"no checkpoint in runs/distillation-student"):
        fit([*student, "--ckpt_path=last"])
    with pytest.raises(InputError, match=r"'none\.ckpt' is no file"):
        fit([*student, "--ckpt_path=none.ckpt"])


def test_checkpoint_of_the_command_line_loads_in_plain_python(student):
    from fulgurite.modules import SoftLabelDistillation

    cli = fit([*student, "--run=mine"])
    path = "runs/distillation-student/mine/checkpoints/best.ckpt"
    loaded = SoftLabelDistillation.load_from_checkpoint(path, weights_only=True)
    for name, tensor in cli.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_bad_input_of_classes_is_not_wrapped_into_the_parsers_words():
    student = "--model.student.keep_layers.count=2"
    with pytest.raises(InputError, match="^store='none': there is no .*fulgurite predict -c distillation/capture"):
        fit(["--data.store=none", student])
    with pytest.raises(InputError, match=r"^student\.keep_layers\.count=22"):
        fit(["--data.store=none"])


def parsers():
    """Return the parsers of fit and predict with the classes' own parameters."""
    import fulgurite.experiments.cli as module
    from fulgurite import callbacks, datamodules, modules

    return [getattr(package, name) for package in (callbacks, datamodules, modules) for name in package.__all__], module


def test_every_argument_of_every_public_class_has_a_help_text():
    import inspect

    from jsonargparse import ArgumentParser

    classes, _ = parsers()
    checked = 0
    for kind in classes:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "it", skip={"optimizer"} if kind.__name__ == "WarmupCosine" else set())
        names = [name for name in inspect.signature(kind).parameters if (kind.__name__, name) != ("WarmupCosine", "optimizer")]
        helps = {action.dest: action.help for action in parser._actions}
        for name in names:
            text = helps.get(f"it.{name}")
            assert text, f"{kind.__name__}.{name} has no help text"
            assert len(text) > 15, f"{kind.__name__}.{name}: {text!r}"
            checked += 1
        buffer = io.StringIO()
        with redirect_stdout(buffer):
            parser.print_help()
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in names and parameter.default is not inspect.Parameter.empty:
                assert "default: " in buffer.getvalue()
    assert checked > 60
