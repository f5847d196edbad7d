import json
from importlib.metadata import version
from pathlib import Path

import pytest

from fulgurite.errors import InputError
from fulgurite.experiments.benchmarks import plan as plans
from fulgurite.experiments.benchmarks import report
from fulgurite.experiments.benchmarks.plots import draw
from fulgurite.experiments.benchmarks.results import load_results
from fulgurite.experiments.benchmarks.tables import comma_separated, latex, make_table, markdown, shortened

from .conftest import result

TWO = [result("slow", 0, 3.0), result("slow", 1, 3.2), result("fast", 0, 2.0)]


def test_mean_spread_count_and_difference_to_the_baseline(bench):
    text = markdown(make_table(bench(), TWO))
    assert "|  | n | loss (nats) | loss - baseline (nats) | speed (tokens/s) |" in text
    assert "| small rate | 2 | 3.100 ± 0.141 | +0.000 | 100 ± 0 |" in text
    assert "| large rate | 1 | **2.000** | -1.100 | 100 |" in text
    assert "1,280 tokens. Measured on x, 2 threads; commit cccccccccc." in text
    assert "Compared at equal tokens." in text


def test_a_short_table_has_the_rows_and_columns_that_it_names(bench):
    short = {"rows": ["fast"], "columns": ["tokens_per_second"]}
    plan = bench(lambda spec: spec["report"].update(short=short))
    text = markdown(shortened(make_table(plan, TWO), plan))
    assert "Compared at equal tokens. 1,280 tokens. Measured on x" in text
    assert "|  | speed (tokens/s) |\n|---|---:|\n| large rate | 100 |\n" in text
    plan.spec["report"]["short"]["note"] = "A shorter one."
    assert "Compared at equal tokens. A shorter one. Measured on x" in markdown(shortened(make_table(plan, TWO), plan))
    plan.spec["report"]["short"]["rows"] = ["fats"]
    with pytest.raises(InputError, match=r"short.rows of benchmark 'method': 'fats' is not there. Did you mean 'fast'"):
        shortened(make_table(plan, TWO), plan)
    with pytest.raises(InputError, match="the benchmark has no report.short"):
        shortened(make_table(plan, TWO), bench())


def test_ratio_to_the_baseline(bench):
    plan = bench(lambda spec: spec["report"]["columns"]["loss"].update(relative="ratio"))
    assert "| large rate | 1 | **2.000** | 0.645 |" in markdown(make_table(plan, TWO))


def recovering(spec):
    spec["variants"]["fast"]["seeds"] = spec["variants"]["slow"]["seeds"] = [0, 1, 2]
    spec["variants"]["part"] = {"title": "a part", "seeds": [0, 1, 2]}
    spec["report"].update(goal="fast")
    spec["report"]["columns"]["loss"]["relative"] = "recovered"


def test_share_of_the_gain_and_its_interval_are_paired_by_seed(bench):
    losses = {"slow": (3.0, 3.2, 3.4), "fast": (2.0, 2.2, 2.4), "part": (2.2, 2.5, 2.5)}
    results = [result(name, seed, loss) for name, own in losses.items() for seed, loss in enumerate(own)]
    text = markdown(make_table(bench(recovering), results))
    assert "| loss (nats) | loss - baseline, 95 % interval (nats) | share of the goal's gain in loss |" in text
    assert "| small rate | 3 | 3.200 ± 0.200 |  |  |" in text
    assert "| -1.000 ± 0.000 | 1.00 |" in text
    # Differences -0.8, -0.7, -0.9: deviation 0.1, times 4.303 / sqrt(3).
    assert "| -0.800 ± 0.248 | 0.80 |" in text
    plan = bench(lambda spec: recovering(spec) or spec["report"]["columns"]["loss"].update(relative="interval"))
    without = markdown(make_table(plan, results))
    assert "| -0.800 ± 0.248 |" in without
    assert "of the goal" not in without


def test_recovered_without_a_goal_is_refused(bench):
    plan = bench(lambda spec: spec["report"]["columns"]["loss"].update(relative="recovered"))
    with pytest.raises(InputError, match=r"report.goal=None of benchmark 'method' is no variant"):
        make_table(plan, TWO)


def test_best_is_bold_only_if_it_leads_by_more_than_the_spread(bench):
    close = [result("slow", 0, 3.0), result("slow", 1, 3.2), result("fast", 0, 3.0)]
    assert "**" not in markdown(make_table(bench(), close))
    single = [result("slow", 0, 3.0), result("fast", 0, 1.0)]
    assert "**" not in markdown(make_table(bench(), single))  # no spread is known


def test_a_bound_is_never_the_best(bench):
    plan = bench(lambda spec: spec["variants"]["fast"].update(compared=False))
    text = markdown(make_table(plan, TWO))
    assert "| large rate | 1 | 2.000 |" in text
    assert "**" not in text


def test_rows_of_another_group_are_not_compared(bench):
    plan = bench(lambda spec: spec["variants"]["fast"].update(group="other teacher"))
    text = markdown(make_table(plan, TWO))
    assert "| *other teacher* |" in text
    assert "| large rate | 1 | 2.000 | +0.000 |" in text


def test_missing_cells_and_forgotten_variants_are_listed(bench):
    text = markdown(make_table(bench(), [*TWO[:1], TWO[2], result("gone", 0, 1.0)]))
    assert "Missing: slow-1." in text
    assert "no such variant any more: gone" in text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"code": "l"}, "would mix results of 2 code versions"),
        ({"clean": False, "code": "l"}, "uncommitted changes"),
        ({"cpu": "y"}, r"timings \(tokens_per_second\) of several machines \(x, 2 threads; y, 2 threads\)"),
    ],
)
def test_mixtures_are_refused_unless_allowed_and_then_said(bench, other, message):
    results = [*TWO[:2], result("fast", 0, 2.0, **other)]
    with pytest.raises(InputError, match=message):
        make_table(bench(), results)
    assert "Mixed here: " in markdown(make_table(bench(), results, mixed=True))


def test_changes_beside_the_sources_are_no_other_code(bench):
    text = markdown(make_table(bench(), [*TWO[:2], result("fast", 0, 2.0, clean=False)]))
    assert "Mixed here: " not in text


def test_machines_may_differ_where_nothing_is_timed(bench):
    def untimed(spec):
        spec["report"]["columns"].pop("tokens_per_second")
        spec["report"].pop("plots")

    text = markdown(make_table(bench(untimed), [*TWO[:2], result("fast", 0, 2.0, cpu="y")]))
    assert "Measured on several machines: x, 2 threads; y, 2 threads." in text


def test_machines_may_differ_where_one_alone_is_timed(bench):
    plan, other = bench(), result("fast", 0, 2.0, cpu="y")
    del other["cost"]["tokens_per_second"]
    assert "Measured on several machines: x, 2 threads; y, 2 threads." in markdown(make_table(plan, [*TWO[:2], other]))


def test_results_of_other_settings_are_refused(bench):
    plan = bench()
    cells = {cell.name: [step.words() for step in cell.steps] for cell in plan.cells()}
    names = ["slow-0", "slow-1", "fast-0"]
    own = [dict(entry, run={**entry["run"], "commands": cells[name]}) for entry, name in zip(TWO, names)]
    make_table(plan, own)
    own[2]["run"]["commands"][0].append("--data.batch_size=7")
    with pytest.raises(InputError, match=r"other settings than the benchmark now has \(fast-0\)"):
        make_table(plan, own)


def test_a_value_that_some_seeds_lack_is_said_and_never_best(bench):
    lacking = [*TWO[:1], result("fast", 0, 2.0), result("fast", 1, None), result("slow", 1, 3.2)]
    text = markdown(make_table(bench(), lacking))
    assert "| large rate | 2 | 2.000 (1 of 2) |" in text
    assert "large rate: not every seed has loss" in text
    assert "**" not in text


def test_the_baseline_does_not_move(bench):
    text = markdown(make_table(bench(), [result("fast", 0, 2.0)]))
    assert "| large rate | 2.000 |  | 100 |" in text
    wrong = bench(lambda spec: spec["report"].update(baseline="solw"))
    with pytest.raises(InputError, match="report.baseline='solw'.*Did you mean 'slow'"):
        make_table(wrong, TWO)


def test_empty_results_and_unknown_metrics_are_refused(bench):
    with pytest.raises(InputError, match="there are no results at scale 'cpu'"):
        make_table(bench(), [])
    plan = bench(lambda spec: spec["report"]["columns"].update(acurracy={"title": "accuracy"}))
    with pytest.raises(InputError, match="no result has the metric 'acurracy'"):
        make_table(plan, TWO)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "0.json is damaged"),
        ("[]", "0.json is no result of a benchmark"),
        (json.dumps({**TWO[0], "extra": 1}), "'extra' was unexpected"),
        (
            json.dumps({**TWO[0], "metrics": {"final": {"loss": "low"}, "curves": {}}}),
            r"metrics.final.loss: 'low' is not of type",
        ),
    ],
)
def test_damaged_results_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "0.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_results(tmp_path)


def test_latex_and_csv(bench):
    made = make_table(bench(lambda spec: spec["variants"]["fast"].update(title="50 % & more")), TWO)
    grouped = make_table(bench(lambda spec: spec["variants"]["fast"].update(group="other")), TWO)
    assert r"\multicolumn{5}{l}{\textit{other}} \\" in latex(grouped)
    text = latex(made)
    assert r"small rate & 2 & 3.100 $\pm$ 0.141" in text
    assert r"50 \% \& more & 1 & \textbf{2.000}" in text
    assert r"\toprule" in text
    lines = comma_separated(made).splitlines()
    assert lines[0].startswith("variant,title,group,n,loss,loss_std")
    assert lines[1].startswith("slow,small rate,,2,3.1")


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_plots_are_the_same_bytes_for_the_same_results(bench, kind):
    results = [
        result("slow", 0, 3.0, curve=[(0, 5.0), (1, 4.0), (2, 3.0)]),
        result("slow", 1, 3.2, curve=[(0, 5.0), (1, 4.0), (2, 3.5)]),
        result("fast", 0, 2.0, curve=[(0, 5.0), (1, 3.0), (2, 2.0)], speed=90.0),
    ]
    plan = bench()
    for key in plan.spec["report"]["plots"]:
        once = draw(plan, results, key, kind)
        assert once == draw(plan, results, key, kind)
        assert once[:4] == (b"\x89PNG" if kind == "png" else b"<?xm")
    alone = bench(lambda spec: spec["report"]["plots"]["map"].update(only=["slow"]))
    assert draw(alone, results, "map", kind) != draw(plan, results, "map", kind)
    blank = bench(lambda spec: spec["report"]["plots"]["map"].update(y="lost"))
    with pytest.raises(InputError, match="slow has no curve lost_<length>"):
        draw(blank, results, "map", kind)
    blank = bench(lambda spec: spec["report"]["plots"]["lines"].update(y="lost"))
    with pytest.raises(InputError, match="fast has no curve lost_<name>"):
        draw(blank, results, "lines", kind)
    other = bench(lambda spec: spec["report"]["plots"]["bars"].update(only=["fsat"]))
    with pytest.raises(InputError, match="only: 'fsat' is no variant. Did you mean 'fast'"):
        draw(other, results, "bars", kind)
    with pytest.raises(InputError, match="no result has the curve 'train_loss'"):
        draw(plan, TWO, "curve", kind)
    with pytest.raises(InputError, match="slow has no curve 'train_loss'"):
        draw(plan, TWO, "times", kind)


def test_report_of_the_command_line(bench, tmp_path, capsys):
    from fulgurite.experiments.main import main

    plan = bench()
    plan.results.mkdir(parents=True)
    for number, entry in enumerate(TWO):
        entry["metrics"]["curves"] |= {"train_loss": [[0, 1.0], [1, 0.5]], "val_loss": [[1, 0.7]]}
        (plan.results / f"{number}.json").write_text(json.dumps(entry))
    main(["report", "method", "--plot", str(tmp_path / "plots")])
    assert "| small rate | 2 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"method-curve.svg", "method-front.png"}
    main(["report", "method", "--format", "csv"])
    assert capsys.readouterr().out.startswith("variant,")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "Legal: --write, or one of method" in capsys.readouterr().err


def test_documents_are_up_to_date():
    documents = report.documents()
    assert documents, "README.md holds no generated table"
    for path in documents:
        assert report.fill(path.read_text("utf-8")) == path.read_text("utf-8"), f"run `fulgurite report --write`: {path}"


def test_figures_of_the_documents_are_up_to_date():
    figures = report.figures()
    assert {path.suffix for path in figures} == {".svg", ".png"}
    constraints = (Path(report.__file__).parents[2] / "constraints.txt").read_text("utf-8").split()
    drawn_alike = f"matplotlib=={version('matplotlib')}" in constraints  # other releases draw the same a little differently
    for path, picture in figures.items():
        if path.suffix == ".svg" and drawn_alike:  # the PNG's compression may differ between builds of zlib
            assert path.read_bytes() == picture, f"run `fulgurite report --write`: {path}"
        assert path.is_file()


def test_a_result_changed_by_hand_is_noticed(monkeypatch, tmp_path):
    text = next(path for path in report.documents()).read_text("utf-8")
    name = report._MARKER.search(text)[2]
    plan = plans.load_benchmark(name)
    results = load_results(plan.results)
    key = next(iter(plan.spec["report"]["columns"]))
    block = results[0]["metrics"]["final"] if key in results[0]["metrics"]["final"] else results[0]["cost"]
    block[key] *= 1.1
    monkeypatch.setattr(report, "load_results", lambda folder: results if folder == plan.results else load_results(folder))
    assert report.fill(text) != text
