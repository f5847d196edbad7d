import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.text import Text

from fulgurite.experiments.benchmarks import command
from fulgurite.experiments.benchmarks.cell import _run_step
from fulgurite.experiments.benchmarks.fingerprints import content_hash
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


@pytest.mark.slow
def test_each_seed_has_its_own_products_and_a_model_that_is_there_is_only_evaluated(bench, text_file):
    def change(spec):
        spec["products"]["tuned"]["seeded"] = True
        spec["seeds"] = [1]
        spec["evaluations"]["seen"] = spec["evaluations"]["held-out"] | {"metrics": {"seen": "val_loss"}}
        spec["variants"] = {
            "again": {"title": "trained further", "seeds": [1, 2], "evaluations": ["held-out"]},
            "once": {"title": "not trained", "model": "{tuned}"},
        }

    plan = bench(change)
    main(["benchmark", "method", f"--data={text_file.parent}"])
    first, second, once = load_results(plan.results)
    assert [list(found["run"]["products"]) for found in (first, second, once)] == [["tuned@1"], ["tuned@2"], ["tuned@1"]]
    assert [list(found["metrics"]["final"]) for found in (first, once)] == [["early_loss", "loss"], ["loss", "seen"]]
    assert first["metrics"]["final"]["loss"] < once["metrics"]["final"]["loss"] == once["metrics"]["final"]["seen"]
    assert len({found["environment"]["models"]["held-out"] for found in (first, second, once)}) == 3
    assert once["run"]["commands"][0][3] == "--model.source={tuned}"
    assert "tokens" not in once["cost"]


@pytest.mark.slow
def test_what_functions_read_by_themselves_stands_in_the_result(bench, text_file, tmp_path):
    step = {"command": "measure", "function": "offsite.tasks:write_task"}
    settings = {"data": "{data}", "folder": "{run}/rows", "train_rows": 2, "test_rows": 1}

    def change(spec):
        spec["products"] = {"rows": {**step, "gives": "rows", "reads": ["{data}/sst2"], "set": {**settings, "task": "sst2"}}}
        own = {"task": "ag_news", "folder": "{rows}/../more"}
        spec["variants"] = {"more": {**step, "title": "m", "reads": ["{data}/{name}"], "set": {**settings, **own}}}
        spec["variants"]["more"] |= {"metrics": {"rows": "train_rows"}, "evaluations": [], "let": {"name": "ag_news"}}
        spec["common"] = {"reads": ["{data}/nowhere"]}

    for name, row in {"sst2/train_b.tsv": "sentence\tlabel\nA\t1", "sst2/validation.tsv": "sentence\tlabel\nB\t0"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row + "\n")
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/train_5k.csv").write_text("Text,1\n")
    (tmp_path / "ag_news/test.csv").write_text("2,Title,text\n")
    plan = bench(change)
    main(["benchmark", "method", f"--data={text_file.parent}"])
    (found,) = load_results(plan.results)
    assert found["metrics"]["final"] == {"rows": 1.0}
    hashes = {f"{{data}}/{name}": content_hash(tmp_path / name) for name in ("sst2", "ag_news")}
    assert found["environment"]["data"] == hashes


def test_wrong_command_lines_are_refused_before_the_first_job(bench, text_file, capsys, tmp_path):
    def change(spec):
        spec["variants"]["fast"]["set"] = {"model.optimizr": "x"}
        spec["variants"]["timed"] = {"title": "t", "command": "measure", "function": "language_model.measure:startup"}

    bench(change)
    with pytest.raises(SystemExit):
        main(["benchmark", "method", f"--data={text_file.parent}"])
    said = capsys.readouterr().err
    assert "2 of the jobs cannot be run; nothing was started" in said
    assert "fast-0:" in said
    assert "optimizr" in said
    assert "timed-0: function 'language_model.measure:startup': " in said
    assert not list((tmp_path / "runs").rglob("job.json"))


@pytest.mark.slow
def test_a_metric_that_is_not_produced_is_refused_by_name(bench, text_file, capsys):
    def change(spec):
        spec["variants"].pop("slow")
        spec["common"]["let"] = {"start": "random:tiny"}
        spec["evaluations"]["held-out"]["metrics"] = {"loss": "val_los"}

    bench(change)
    with pytest.raises(SystemExit):
        main(["benchmark", "method", f"--data={text_file.parent}"])
    assert "metric 'loss': validate gives no 'val_los'. It gives: " in capsys.readouterr().err


def test_a_training_without_a_step_left_is_done_again_for_its_figures(text_file, tmp_path, capsys):
    """As one is that was killed behind its last checkpoint."""
    words = ["fit", "-c", "language_model/finetune", "--model.source=random:tiny", f"--data.train={text_file}"]
    words += ["--data.block_size=64", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    step = {"name": "train", "command": "fit", "metrics": {"loss": "train_loss"}, "curves": ["train_loss"]}
    first, again = (_run_step(step, words, tmp_path / "runs/cell") for _ in range(2))
    assert "trained anew" in capsys.readouterr().out
    assert again["metrics"] == first["metrics"]
    assert again["cost"]["tokens"] == first["cost"]["tokens"]


def test_what_a_log_says_is_shown_as_it_stands(tmp_path):
    (tmp_path / "log.txt").write_text("answer: 'x [/INST] y [a]'\n")
    shown = []
    entry = SimpleNamespace(log=tmp_path / "log.txt", bar=0, begin=0.0, job=SimpleNamespace(name="cell-0"))
    Grid._watch(None, entry, SimpleNamespace(update=lambda bar, **fields: shown.append(fields["description"])))
    assert Text.from_markup(shown[0]).plain == "cell-0 answer: 'x [/INST] y [a]'"


def test_dry_run_tells_what_is_left_and_how_long_it_takes(bench, text_file, capsys):
    plan = bench()
    plan.results.mkdir(parents=True)
    (plan.results / "slow-0.json").write_text(json.dumps(result("slow", 0, 3.0)))
    main(["benchmark", "method", f"--data={text_file.parent}", "--dry_run", "true"])
    text = capsys.readouterr().out
    assert "stale" in text
    # Three cells of 20 seconds, and a product of unknown time.
    assert "4 jobs are left; those of known time will take 1 min 00 s" in text
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


def test_an_installed_package_keeps_its_own_results(bench, text_file, monkeypatch):
    plan = bench()
    seen = []
    monkeypatch.setattr(Grid, "run", lambda self, workers: seen.append(self.results))
    monkeypatch.setattr(command, "PACKAGE", text_file.parent)  # a wheel has no pyproject.toml
    main(["benchmark", "method", f"--data={text_file.parent}"])
    (text_file.parent / "pyproject.toml").touch()
    main(["benchmark", "method", f"--data={text_file.parent}"])
    assert seen == [Path("runs/benchmark/method/cpu/results"), plan.results]


def test_the_command_itself_imports_nothing_heavy():
    code = (
        "import sys; from fulgurite.experiments.main import main; main(['benchmark', 'distillation/memory', '--dry_run=true']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Peak memory of the loss" in done.stdout
