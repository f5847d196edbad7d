import json
import subprocess
import sys
import time

import pytest
import yaml

from fulgurite.errors import InputError
from fulgurite.experiments.configs import packaged_configs
from fulgurite.experiments.main import main
from fulgurite.experiments.sweep import sweep


def spec(text_file, **changes):
    fit = ["-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={text_file}", "--data.block_size=64"]
    fit += ["--trainer.limit_train_batches=4", "--trainer.precision=32-true", "--trainer.logger=false"]
    fit += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.callbacks=null"]
    return {
        "name": "study",
        "fit": fit,
        "space": {
            "model.optimizer.init_args.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "data.batch_size": [1, 2],
        },
        "trials": 4,
        **changes,
    }


@pytest.fixture
def start(tmp_path, monkeypatch, text_file):
    """Run ``sweep -c`` with a YAML of these changes."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec(text_file, **changes)))
        main(["sweep", "-c", "sweep.yaml"])
        return json.loads((tmp_path / "runs" / "sweeps" / changes.get("name", "study") / "trials.json").read_text())

    return run


@pytest.mark.slow
def test_a_study_is_the_same_twice_and_goes_on(start, tmp_path, capsys):
    done = start()
    assert len(done["trials"]) == 4
    values = [trial["value"] for trial in done["trials"]]
    assert values == sorted(values)
    assert done["importances"].keys() <= {"model.optimizer.init_args.lr", "data.batch_size"}
    folder = tmp_path / "runs" / "sweeps" / "study"
    assert (folder / "importances.svg").is_file()
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (
        best["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        == done["trials"][0]["settings"]["model.optimizer.init_args.lr"]
    )
    assert yaml.safe_load((folder / f"trial-{done['trials'][0]['number']:04d}" / "config.yaml").read_text()) == best

    again = start(name="other")
    assert [(t["value"], t["settings"]) for t in again["trials"]] == [(t["value"], t["settings"]) for t in done["trials"]]

    more = start(trials=5)
    assert len(more["trials"]) == 5
    assert "Best config" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        start(metric="val_perplexity", trials=6)
    assert "searches with another metric" in capsys.readouterr().err

    from fulgurite.experiments.cli import run

    repeated = run(["fit", "-c", str(folder / "best.yaml"), "--run=again"])
    assert float(repeated.trainer.callback_metrics["val_loss"]) == more["trials"][0]["value"]


def test_a_diverged_trial_is_recorded_and_a_grid_is_walked_through_once(start):
    rates = {"model.optimizer.init_args.lr": [1e30, 1e-3, 1e-2, 1e-4]}
    done = start(space=rates, trials=4, sampler="GridSampler", sampler_args={"search_space": rates})
    states = {trial["settings"]["model.optimizer.init_args.lr"]: trial["state"] for trial in done["trials"]}
    assert states == {1e30: "diverged", 1e-3: "complete", 1e-2: "complete", 1e-4: "complete"}


def test_settings_that_do_not_go_together_are_recorded_after_a_trial_that_went_well(start, monkeypatch):
    from fulgurite.experiments import study as module

    run, calls = module.run, []

    def refuse(words, **rest):
        calls.append(words)
        if len(calls) == 2:
            raise InputError("these do not go together")
        return run(words, **rest)

    monkeypatch.setattr(module, "run", refuse)
    done = start(trials=3)
    assert sorted(trial["state"] for trial in done["trials"]) == ["complete", "complete", "error"]


@pytest.mark.slow
def test_a_corrected_sweep_begins_anew_while_nothing_was_found(start):
    with pytest.raises(SystemExit):
        start(metric="val_lss")
    done = start(trials=2, direction="maximize")
    values = [trial["value"] for trial in done["trials"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == 2


def test_an_interrupted_trial_is_run_again(start, monkeypatch, tmp_path, capsys):
    from fulgurite.experiments import study as module

    run, calls = module.run, []

    def interrupt(words, **rest):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(words, **rest)

    monkeypatch.setattr(module, "run", interrupt)
    with pytest.raises(SystemExit):
        start()
    assert "The same command goes on" in capsys.readouterr().out
    done = start()
    assert sorted(trial["number"] for trial in done["trials"]) == [0, 2, 3, 4]  # 1 was interrupted
    chosen = [[word for word in words if word.startswith(("--model.optimizer", "--data.batch"))] for words in calls]
    assert chosen[1] == chosen[2]


def test_a_bad_trial_is_pruned(start):
    done = start(trials=2, pruner="ThresholdPruner", pruner_args={"upper": 0.1})
    assert [trial["state"] for trial in done["trials"]] == ["pruned", "pruned"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"model.soft_wieght": [0.1, 0.2]}}, r"space\.model\.soft_wieght: fit does not take --model\.soft_wieght=0\.1"),
        ({"space": {"data.batch_sise": [1, 2]}}, r"space\.data\.batch_sise: .*Did you mean 'data\.\S*batch_size'"),
        ({"space": {"data.batch_size": [1, "many"]}}, r"space\.data\.batch_size: fit does not take --data\.batch_size=many"),
        ({"space": {"data.batch_size": [1]}}, "leaves nothing to choose"),
        ({"space": {"data.batch_size": {"low": 4, "high": 2, "integer": True}}}, r"low=4\S* is not below high=2"),
        ({"space": {"model.optimizer.init_args.lr": {"low": 0, "high": 2, "log": True}}}, "logarithmic scale needs low above 0"),
        ({"space": {"model.optimizer.init_args.lr": {"low": 0, "high": 2, "step": -1}}}, r"step=-1\S* is no distance"),
        ({"space": {"data.batch_size": {"low": 1, "high": 4, "step": 0.5, "integer": True}}}, r"step=0\.5 is not whole"),
        ({"sampler": "TPSSampler"}, "sampler='TPSSampler' is unknown.*TPESampler"),
        ({"pruner": "Median"}, "pruner='Median' is unknown"),
        ({"sampler_args": {"sed": 1}}, "do not fit TPESampler"),
        ({"trials": 0}, "trials=0"),
        ({"storage": "sqlit:///x"}, "storage='sqlit:///x' cannot be opened"),
        ({"metric": "val_lss"}, "metric='val_lss' was not logged. Logged: .*val_loss"),
    ],
)
def test_bad_input_is_refused_by_name(start, changes, message, capsys):
    import re

    with pytest.raises(SystemExit):
        start(**changes)
    assert re.search(message, capsys.readouterr().err)


def test_sweep_without_its_extra(monkeypatch):
    from fulgurite.experiments import sweep as module

    monkeypatch.setattr(module, "optuna", None)
    with pytest.raises(InputError, match="needs the extra sweep"):
        sweep("a", [], {})


def test_packaged_sweeps_name_keys_that_exist():
    from fulgurite.experiments.configs import packaged_sweeps
    from fulgurite.experiments.sweep import Range, _check_space

    found = packaged_sweeps()
    assert "distillation/sweep" in found
    assert not found.keys() & packaged_configs().keys()
    for path in found.values():
        content = yaml.safe_load(path.read_text())
        space = {key: Range(**value) if isinstance(value, dict) else value for key, value in content["space"].items()}
        _check_space(["fit", *content["fit"]], space)


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path, text_file):
    """Twelve trials, one of two choices always diverges, and one process is killed on the way."""
    rates = {"model.optimizer.init_args.lr": [1e30, 1e-3, 1e-2, 3e-3]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec(text_file, space=rates, trials=12)))
    code = "import sys; from fulgurite.experiments.main import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "sweep", "-c", "sweep.yaml"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first, second = subprocess.Popen(words, **quiet), subprocess.Popen(words, **quiet)
    time.sleep(20)
    second.kill()
    second.wait()
    second = subprocess.Popen(words, **quiet)
    assert first.wait(300) == second.wait(300) == 0
    trials = json.loads((tmp_path / "runs" / "sweeps" / "study" / "trials.json").read_text())["trials"]
    assert len(trials) == 12
    assert {trial["state"] for trial in trials} == {"complete", "diverged"}
