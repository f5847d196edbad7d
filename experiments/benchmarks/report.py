"""``fulgurite report``: tables and plots from result files, printed or written into the documents. Imports nothing heavy."""

import csv
import io
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from ...errors import InputError
from ...files import write_atomic
from .plan import EXPERIMENTS, PACKAGE, Benchmark, available, load_benchmark
from .results import load_results

_DOCUMENTS = ("README.md", "docs/*.md")
_MARKER = re.compile(r"(<!-- report:(\S+) -->\n).*?(<!-- /report -->)", re.DOTALL)
_SWEEP = re.compile(r"(<!-- sweep:(\S+) -->\n).*?(<!-- /sweep -->)", re.DOTALL)


@dataclass
class Cell:
    """One value of a table.

    Args:
        mean: Mean over the seeds; None where the variant has no such value.
        spread: Standard deviation over the seeds; None for one seed.
        best: Leads its column by more than the spread.
    """

    mean: float | None
    spread: float | None
    best: bool = False


@dataclass
class Row:
    """One variant.

    Args:
        variant: Its key.
        title: What the table calls it.
        group: Rows of one group are compared with each other.
        count: Number of results.
        cells: Values by column.
    """

    variant: str
    title: str
    group: str
    count: int
    cells: dict[str, Cell]


@dataclass
class Report:
    """A benchmark's table.

    Args:
        columns: {key: its entry in the benchmark's YAML}, relative columns included.
        rows: The variants that have results, in the benchmark's order.
        remarks: What stands under the table.
    """

    columns: dict[str, dict[str, Any]]
    rows: list[Row]
    remarks: list[str]


def make_report(plan: Benchmark, results: list[dict[str, Any]], *, mixed: bool = False) -> Report:
    """Gather results into a table.

    Args:
        plan: The benchmark.
        results: Its results.
        mixed: Allow results of several code versions, of uncommitted changes, and timings of several machines.

    Raises:
        InputError: If there are no results, they are mixed, or a column's metric is in none of them.
    """
    if not results:
        raise InputError(
            f"report {plan.name!r}: there are no results at scale {plan.scale!r} in {plan.results}. Run the benchmark."
        )
    known = [result for result in results if result["run"]["variant"] in plan.spec["variants"]]
    remarks = [_where(plan, known or results)]
    remarks += _mixtures(plan, known, mixed)
    lost = sorted({result["run"]["variant"] for result in results} - set(plan.spec["variants"]))
    if lost:
        remarks.append(f"Left out, for the benchmark has no such variant any more: {', '.join(lost)}.")
    there = {(result["run"]["variant"], result["run"]["seed"]) for result in known}
    missing = [cell.name for cell in plan.cells() if (cell.variant, cell.seed) not in there]
    if missing:
        remarks.append(f"Missing: {', '.join(missing)}.")
    columns = plan.spec["report"]["columns"]
    rows = []
    for variant, entry in plan.spec["variants"].items():
        own = [{**result["cost"], **result["metrics"]["final"]} for result in known if result["run"]["variant"] == variant]
        if own:
            cells = {key: _cell([values[key] for values in own if values.get(key) is not None]) for key in columns}
            rows.append(Row(variant, entry["title"], entry.get("group", ""), len(own), cells))
    for key in columns:
        if all(row.cells[key].mean is None for row in rows):
            raise InputError(f"report {plan.name!r}: no result has the metric {key!r} of report.columns.")
    for key, column in columns.items():
        if "better" in column:
            _mark_best(rows, key, column["better"])
    report = Report(dict(columns), rows, remarks)
    _add_relative(report, plan.spec["report"].get("baseline"))
    return report


def _where(plan: Benchmark, results: list[dict[str, Any]]) -> str:
    environment = results[0]["environment"]
    machine = ", ".join(environment["gpus"]) or f"{environment['cpu']}, {environment['threads']} threads"
    seeds = max(len([r for r in results if r["run"]["variant"] == variant]) for variant in plan.spec["variants"])
    spread = "Mean ± standard deviation over n seeds; bold where the best leads by more than that. " if seeds > 1 else ""
    equal = f"Compared at equal {plan.spec['equal']}. " if len(plan.spec["variants"]) > 1 and "equal" in plan.spec else ""
    return f"{spread}{equal}{results[0]['run'].get('note', '')} Measured on {machine}; commit {str(environment['commit'])[:10]}."


def _mixtures(plan: Benchmark, results: list[dict[str, Any]], mixed: bool) -> list[str]:
    """Refuse what must not stand in one table; return what to say of it where it was allowed."""
    found = []
    environments = [result["environment"] for result in results]
    versions = {environment["code"] or environment["commit"] for environment in environments}
    if len(versions) > 1:
        found.append(f"results of {len(versions)} code versions ({', '.join(sorted(map(str, versions)))})")
    if not all(environment["clean"] for environment in environments):
        found.append("results of a checkout with uncommitted changes")
    machines = {(json.dumps(e["gpus"]) if e["gpus"] else f"{e['cpu']}, {e['threads']} threads") for e in environments}
    if len(machines) > 1:
        timed = [key for key, column in plan.spec["report"]["columns"].items() if column.get("timing")]
        if timed:
            found.append(f"timings ({', '.join(timed)}) of several machines ({'; '.join(sorted(machines))})")
    if found and not mixed:
        raise InputError(
            f"report {plan.name!r} would mix {' and '.join(found)}. Run the benchmark again, or allow it with --mixed true."
        )
    said = [f"Mixed here: {' and '.join(found)}."] if found else []
    if len(machines) > 1 and not any("machines" in part for part in found):
        said.append(f"Measured on several machines: {'; '.join(sorted(machines))}.")
    return said


def _cell(values: list[float]) -> Cell:
    if not values:
        return Cell(None, None)
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _mark_best(rows: list[Row], key: str, better: str) -> None:
    """Mark the best of each group if it leads the next by more than both their spreads.

    A row of one seed is given the largest spread of the column; where no row has more than one seed, nothing is marked.
    """
    spreads = [row.cells[key].spread or 0.0 for row in rows if row.cells[key].spread is not None]
    if not spreads:
        return
    sign = 1 if better == "lower" else -1
    for group in {row.group for row in rows}:
        cells = [row.cells[key] for row in rows if row.group == group and row.cells[key].mean is not None]
        order = sorted(cells, key=lambda cell: sign * (cell.mean or 0.0))
        if len(order) < 2:
            continue
        first, second = order[:2]
        lead = abs((second.mean or 0.0) - (first.mean or 0.0))
        first.best = lead > max(max(spreads) if cell.spread is None else cell.spread for cell in (first, second))


def _add_relative(report: Report, baseline: str | None) -> None:
    """Add a column beside each that asks for one: the ratio to, the difference from, or the speedup over the baseline.

    A group without the baseline is compared with its own first row.
    """
    columns: dict[str, dict[str, Any]] = {}
    for key, column in report.columns.items():
        columns[key] = column
        kind = column.get("relative")
        if not kind or not baseline:
            continue
        name = f"{key}:{kind}"
        how = {"ratio": "/ baseline", "difference": "- baseline", "speedup": "times less than the baseline"}[kind]
        columns[name] = {**column, "title": f"{column['title']} {how}", "sign": kind == "difference"}
        if kind != "difference":
            columns[name].pop("unit", None)
        for row in report.rows:
            group = [other for other in report.rows if other.group == row.group]
            base = next((other for other in group if other.variant == baseline), group[0]).cells[key].mean
            own = row.cells[key].mean
            row.cells[name] = Cell(None if own is None or base is None else _relative(kind, own, base), None)
    report.columns = columns


def _relative(kind: str, own: float, base: float) -> float | None:
    if kind == "difference":
        return own - base
    above, below = (base, own) if kind == "speedup" else (own, base)
    return above / below if below else None


def _text(cell: Cell, column: dict[str, Any], plus_minus: str) -> str:
    if cell.mean is None:
        return ""
    digits = column.get("digits", 0 if abs(cell.mean) >= 100 else 1 if abs(cell.mean) >= 10 else 3)
    text = f"{cell.mean:{'+' if column.get('sign') else ''},.{digits}f}"
    return text if cell.spread is None else f"{text}{plus_minus}{cell.spread:.{digits}f}"


def _heads(report: Report) -> list[str]:
    return [
        f"{column['title']} ({column['unit']})" if "unit" in column else column["title"] for column in report.columns.values()
    ]


def markdown(report: Report) -> str:
    """Return a report's table in Markdown."""
    counted = any(row.count > 1 for row in report.rows)
    lines = ["| " + " | ".join(["", *(["n"] if counted else []), *_heads(report)]) + " |"]
    lines.append("|---|" + "---:|" * (len(report.columns) + counted))
    group = ""
    for row in report.rows:
        if row.group != group:
            group = row.group
            lines.append(f"| *{group}* |" + " |" * (len(report.columns) + counted))
        texts = {key: _text(row.cells[key], column, " ± ") for key, column in report.columns.items()}
        cells = [f"**{text}**" if row.cells[key].best else text for key, text in texts.items()]
        lines.append("| " + " | ".join([row.title, *([str(row.count)] if counted else []), *cells]) + " |")
    return "\n".join([*lines, "", *("\n".join([remark, ""]) for remark in report.remarks)]).rstrip("\n") + "\n"


def latex(report: Report) -> str:
    """Return a report's table for LaTeX (package ``booktabs``), its remarks as comments."""
    head = " & ".join(["", "$n$", *map(_escaped, _heads(report))])
    lines = [f"% {remark}" for remark in report.remarks]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(report.columns) + 1)}}}", r"\toprule", rf"{head} \\", r"\midrule"]
    for row in report.rows:
        texts = {key: _text(row.cells[key], column, r" $\pm$ ") for key, column in report.columns.items()}
        cells = [rf"\textbf{{{text}}}" if row.cells[key].best else text for key, text in texts.items()]
        lines.append(rf"{' & '.join([_escaped(row.title), str(row.count), *cells])} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def comma_separated(report: Report) -> str:
    """Return a report's numbers as CSV, mean and spread in columns of their own, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [name for key in report.columns for name in (key, f"{key}_std")]
    writer.writerow(["variant", "title", "n", *names])
    for row in report.rows:
        values = [value for key in report.columns for value in (row.cells[key].mean, row.cells[key].spread)]
        writer.writerow([row.variant, row.title, row.count, *("" if value is None else value for value in values)])
    return file.getvalue()


_FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def fill(text: str) -> str:
    """Return a document with all its marked tables made anew: ``report:<benchmark>`` and ``sweep:<method>``."""

    def table(match: re.Match[str]) -> str:
        plan = load_benchmark(match[2])
        return f"{match[1]}\n{markdown(make_report(plan, load_results(plan.results)))}\n{match[3]}"

    text = _MARKER.sub(table, text)
    return _SWEEP.sub(lambda match: f"{match[1]}\n{sweep_table(match[2])}\n{match[3]}", text)


def sweep_table(method: str) -> str:
    """Return the table of a method's committed sweep (``results/sweep.json``, the ``trials.json`` that a sweep writes).

    Raises:
        InputError: If there is none, or it is damaged.
    """
    file = EXPERIMENTS / method / "results" / "sweep.json"
    try:
        record = json.loads(file.read_text("utf-8"))
        settings = list(dict.fromkeys(key for trial in record["trials"] for key in trial["settings"]))
        lines = ["| trial | " + " | ".join(f"`{key}`" for key in settings) + f" | {record['metric']} |"]
        lines.append("|---:|" + "---:|" * (len(settings) + 1))
        for trial in record["trials"]:
            values = [trial["settings"].get(key, "") for key in settings]
            chosen = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
            value = trial["state"] if trial["value"] is None else f"{trial['value']:.4f}"
            lines.append(f"| {trial['number']} | {' | '.join(chosen)} | {value} |")
        shares = ", ".join(f"`{key}` {share:.0%}" for key, share in record["importances"].items())
        where = f"Measured on {record['environment']['cpu']}; commit {str(record['environment']['commit'])[:10]}."
    except FileNotFoundError:
        raise InputError(f"sweep:{method}: {file} is not there. Copy a sweep's trials.json to it.") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"sweep:{method}: {file} is damaged ({error!r}).") from error
    return "\n".join([*lines, "", f"Share of the variance that each setting explains: {shares}. {where}"]) + "\n"


def documents() -> list[Path]:
    """Return the documents of the checkout that hold marked tables."""
    found = [path for pattern in _DOCUMENTS for path in sorted(PACKAGE.glob(pattern))]
    return [path for path in found if _MARKER.search(text := path.read_text("utf-8")) or _SWEEP.search(text)]


def figures() -> dict[Path, bytes]:
    """Return the pictures of all benchmarks that the documents name, by their file in ``docs/figures``."""
    from .plots import draw  # needs an extra

    names = {match[2] for path in documents() for match in _MARKER.finditer(path.read_text("utf-8"))}
    pictures = {}
    for name in sorted(names):
        plan = load_benchmark(name)
        for key in plan.spec["report"].get("plots", {}):
            for kind in ("svg", "png"):
                file = PACKAGE / "docs" / "figures" / f"{name.replace('/', '-')}-{key}.{kind}"
                pictures[file] = draw(plan, load_results(plan.results), key, kind)
    return pictures


def report(
    name: str,
    *,
    format: Literal["markdown", "latex", "csv"] = "markdown",
    scale: str = "cpu",
    plot: str | None = None,
    mixed: bool = False,
    results: str | None = None,
) -> None:
    """Print a benchmark's table. Without a name, ``report --write`` fills the tables and pictures of README.md and docs/.

    Args:
        name: Name of the benchmark.
        format: ``markdown``, ``latex`` (booktabs) or ``csv`` (unrounded).
        scale: Scale of the results.
        plot: Also write the benchmark's plots into this folder, as PNG and SVG.
        mixed: Allow results of several code versions and timings of several machines; the table says so.
        results: Folder of the results; null takes the committed ones.
    """
    plan = load_benchmark(name, scale)
    if results is not None and not Path(results).is_dir():
        raise InputError(f"--results {results!r} is no folder.")
    found = load_results(Path(results) if results else plan.results)
    print(_FORMATS[format](make_report(plan, found, mixed=mixed)), end="")
    if plot is None:
        return
    from .plots import draw

    for key in plan.spec["report"].get("plots", {}):
        for kind in ("svg", "png"):
            write_atomic(Path(plot) / f"{name.replace('/', '-')}-{key}.{kind}", draw(plan, found, key, kind))


def main(arguments: list[str]) -> None:
    """Run ``report`` with the words of a command line."""
    if arguments == ["--write"]:
        texts = {path: fill(path.read_text("utf-8")) for path in documents()}
        for path, text in texts.items():
            write_atomic(path, text)
        for path, picture in figures().items():
            write_atomic(path, picture)
        return
    if not arguments:
        raise InputError(f"report of what? Legal: --write, or one of {', '.join(available())}.")
    if not arguments[0].startswith("-"):
        arguments = ["--name", *arguments]
    auto_cli(report, args=arguments, prog="fulgurite report", as_positional=False)
