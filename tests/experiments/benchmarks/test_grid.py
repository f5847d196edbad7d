import json
import subprocess
import sys

import pytest

from fulgurite.experiments.benchmarks.grid import Grid
from fulgurite.experiments.benchmarks.results import load_results
from fulgurite.experiments.main import main

from .conftest import result


def test_cells_are_run_once_and_a_failed_one_does_not_stop_the_rest(bench, text_file, capsys, tmp_path):
    def wrong(spec):
        spec["variants"] = {
            "wrong": {"title": "wrong", "set": {"model.source": "random:tyni"}, "evaluations": False},
            "fast": spec["variants"]["fast"],
        }
        spec["variants"]["wrong"].pop("evaluations")

    plan = bench(wrong)
    words = ["benchmark", "method", f"--data={text_file.parent}"]
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr()
    assert "1 of the jobs failed" in said.err
    assert "random:tiny" in said.err
    results = load_results(plan.results)
    assert [entry["run"]["variant"] for entry in results] == ["fast"]
    (found,) = results
    assert 0 < found["metrics"]["final"]["loss"] < 10
    assert [step for step, _ in found["metrics"]["curves"]["train_loss"]] == [*range(10)]
    assert found["metrics"]["final"]["early_loss"] == found["metrics"]["curves"]["train_loss"][3][1]
    assert found["cost"]["tokens"] == 1280
    assert found["cost"]["seconds"] > found["cost"]["evaluation_seconds"] > 0
    assert found["run"]["products"].keys() == {"tuned"}
    assert found["environment"]["models"].keys() == {"train", "held-out"}
    assert found["environment"]["data"]["train/train"]
    text = json.dumps(found)
    assert str(tmp_path) not in text, "where things lie on this machine does not belong into a result"
    assert "--model.source={tuned}" in text
    assert len(list((tmp_path / "runs/benchmark/method/cpu/cells").glob("wrong-0-*/failed.json"))) == 1

    bench(lambda spec: spec["variants"].pop("slow"))
    before = next(plan.results.glob("*.json")).stat().st_mtime_ns
    main(words)
    assert "1 cells, 1 done" in capsys.readouterr().out
    assert next(plan.results.glob("*.json")).stat().st_mtime_ns == before


def test_trainings_before_another_have_its_seed_and_give_what_they_exported(bench, text_file):
    def change(spec):
        first = {key: value for key, value in spec["common"]["set"].items() if key != "model.source"}
        entry = {"command": "fit", "config": "language_model/finetune", "set": {**first, "model.source": "random:tiny"}}
        second = {**entry, "set": {**entry["set"], "model.source": "{first}"}}
        spec["variants"] = {"third": {"title": "three", "seeds": [1], "before": {"first": entry, "second": second}}}
        spec["common"]["let"] = {"start": "{second}"}
        del spec["products"]

    plan = bench(change)
    main(["benchmark", "method", f"--data={text_file.parent}"])
    (found,) = load_results(plan.results)
    commands = [dict(word.removeprefix("--").split("=", 1) for word in words[3:]) for words in found["run"]["commands"]]
    assert [command["model.source"] for command in commands] == ["random:tiny", "{first}", "{second}", "{model}"]
    assert [command.get("seed_everything") for command in commands] == ["1", "1", "1", None]
    assert found["environment"]["models"].keys() == {"first", "second", "train", "held-out"}
    assert len(set(found["environment"]["models"].values())) == 3  # what is evaluated is what was trained last
    assert found["cost"]["tokens"] == 3 * 1280


def test_a_metric_that_is_not_produced_is_refused_by_name(bench, text_file, capsys):
    def change(spec):
        spec["variants"].pop("slow")
        spec["common"]["let"] = {"start": "random:tiny"}
        spec["evaluations"]["held-out"]["metrics"] = {"loss": "val_los"}

    bench(change)
    with pytest.raises(SystemExit):
        main(["benchmark", "method", f"--data={text_file.parent}"])
    assert "metric 'loss': validate gives no 'val_los'. It gives: " in capsys.readouterr().err


def test_dry_run_tells_what_is_left_and_how_long_it_takes(bench, text_file, capsys):
    plan = bench()
    plan.results.mkdir(parents=True)
    (plan.results / "slow-0.json").write_text(json.dumps(result("slow", 0, 3.0)))
    main(["benchmark", "method", f"--data={text_file.parent}", "--dry_run", "true"])
    text = capsys.readouterr().out
    assert "stale" in text
    assert "4 jobs are left; they will take 1 min 00 s" in text  # three cells of 20 seconds, and a product of unknown time
    assert "For 1 of them no time is known" in text
    assert not (text_file.parent / "runs").exists()


def test_one_benchmark_at_a_time_in_a_folder(bench, text_file, capsys):
    import fcntl

    bench()
    folder = text_file.parent / "work"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            main(["benchmark", "method", f"--data={text_file.parent}", f"--work={folder}"])
    assert "another process runs this benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "--seeds '0,x' is no list of whole numbers"),
        (["--workers", "0"], "--workers 0 runs nothing"),
        (["--only", "none"], "--only 'none' matches no variant"),
        (["--scale", "huge"], "--scale 'huge'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(bench, text_file, capsys, words, message):
    bench()
    with pytest.raises(SystemExit):
        main(["benchmark", "method", f"--data={text_file.parent}", *words])
    assert message in capsys.readouterr().err
    assert not (text_file.parent / "runs").exists()


def test_results_of_other_settings_go_to_the_work_folder(bench, text_file, tmp_path):
    plan = bench()
    seen = []
    run = Grid.run
    try:
        Grid.run = lambda self, workers: seen.append(self.results)
        main(["benchmark", "method", f"--data={text_file.parent}", "--set.tokens=640"])
        main(["benchmark", "method", f"--data={text_file.parent}"])
    finally:
        Grid.run = run
    assert str(seen[0]).startswith("runs/benchmark/method/cpu/results-")
    assert seen[1] == plan.results


def test_the_command_itself_imports_nothing_heavy():
    code = (
        "import sys; from fulgurite.experiments.main import main; main(['benchmark', 'distillation/memory', '--dry_run=true']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Peak memory of the loss" in done.stdout
