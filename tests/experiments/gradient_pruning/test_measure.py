import json

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.benchmarks.plan import load_benchmark
from fulgurite.experiments.gradient_pruning import measure
from fulgurite.experiments.gradient_pruning.measure import WARMUP, curve, overlay, run_training, steps_to, whole


def points(*losses, every=10, seconds=1.0):
    return [{"step": every * n, "at": seconds * every * n, "loss": loss} for n, loss in enumerate(losses, 1)]


def log(*losses, warm=2.0, rest=0.5, steps=30):
    times = [warm if n < WARMUP else rest for n in range(steps)]
    rows = [{"at": sum(times[: n + 1]), "seconds": t, "exposed_seconds": t / 2, "prune_rate": 0.9} for n, t in enumerate(times)]
    return {"steps": rows, "validations": points(*losses)}


def test_the_step_at_which_a_loss_is_reached_lies_on_the_line_between_points():
    assert steps_to(2.5, points(4.0, 3.0, 2.0)) == 25
    assert steps_to(2.5, points(4.0, 3.0, 2.0, seconds=0.1), "at") == pytest.approx(2.5)
    assert steps_to(1.0, points(4.0, 3.0, 2.0)) is None
    assert steps_to(3.0, points(4.0, 3.0, 2.0)) == 20


def test_curves_are_laid_over_the_times_of_a_link(tmp_path, monkeypatch):
    runs = []

    def train(method, link, **settings):
        runs.append((method, link, settings["seed"], settings["steps"]))
        return log(4.0, 3.0, 2.0)

    monkeypatch.setattr(measure, "run_training", train)
    file = tmp_path / "curves.json"
    made = curve(method="dense", seeds="0,1", steps=150, out=str(file), ranks=2, fit="")
    assert made == {"final_loss": 2.0}
    assert len(json.loads(file.read_text())) == 2
    figures = overlay(seed=0, method="dense", link="20mbit", curves=str(file), steps=30, target=2.5, ranks=2, fit="")
    assert figures["steps_to_target"] == 25
    assert figures["seconds_to_target"] == pytest.approx(7 * 2.0 + 18 * 0.5)
    assert figures["step_seconds"] == 0.5
    assert figures["waiting"] == 0.5
    assert runs == [("dense", None, 0, 150), ("dense", None, 1, 150), ("dense", "20mbit", 0, 30)]
    missed = overlay(seed=0, method="dense", link="20mbit", curves=str(file), steps=30, target=1.0, ranks=2, fit="")
    assert "seconds_to_target" not in missed


@pytest.mark.parametrize("link", ["flapping", "outages"])
def test_no_curve_is_laid_over_a_link_that_changes(monkeypatch, link):
    monkeypatch.setattr(measure, "run_training", lambda *arguments, **settings: pytest.fail("trained"))
    with pytest.raises(InputError, match=f"link='{link}' changes while it runs.*Legal: 1gbit, 100mbit, 20mbit.*whole"):
        overlay(seed=0, method="dense", link=link, curves="", steps=30, target=2.5, ranks=2, fit="")


def test_the_packaged_benchmark_runs_whole_what_a_changing_link_matters_to():
    changing = {f"--link={link}" for link, (_, act, _) in measure.LINKS.items() if act}
    for cell in load_benchmark("gradient_pruning").cells():
        for words in (step.words() for step in cell.steps):
            assert "gradient_pruning.measure:overlay" not in words or not changing & set(words), cell.name


def test_a_whole_run_gives_its_curves(monkeypatch):
    monkeypatch.setattr(measure, "run_training", lambda method, link, **settings: log(4.0, 3.0, 2.0))
    given = whole(seed=0, method="adaptive", link="flapping", steps=30, target=2.5, ranks=2, fit="")
    assert given["metrics"]["steps_to_target"] == 25
    assert given["metrics"]["final_loss"] == 2.0
    assert len(given["curves"]["prune_rate"]) == 30
    assert given["curves"]["val_loss"][0] == [10.0, 4.0]


def test_unknown_methods_and_links_are_refused():
    with pytest.raises(InputError, match="method='dens'.*adaptive"):
        run_training("dens", None, ranks=2, steps=1, seed=0, options=[])
    with pytest.raises(InputError, match="link='10mbit'.*flapping"):
        run_training("dense", "10mbit", ranks=2, steps=1, seed=0, options=[])
