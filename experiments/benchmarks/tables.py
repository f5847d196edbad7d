"""Tables of results: means, spreads, comparisons, and their forms in Markdown, LaTeX and CSV. Imports nothing heavy."""

import csv
import io
import json
import re
import statistics
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, nearest
from .plan import Benchmark


@dataclass
class Cell:
    """One value of a table.

    Args:
        mean: Mean over the seeds; None where the variant has no such value.
        spread: Standard deviation over the seeds; None for one seed.
        count: Number of seeds that have the value.
        best: Leads its column by more than the spread.
    """

    mean: float | None
    spread: float | None
    count: int = 0
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
        compared: Whether it can be the best; a bound that no method can reach is not.
    """

    variant: str
    title: str
    group: str
    count: int
    cells: dict[str, Cell]
    compared: bool = True


@dataclass
class Table:
    """A benchmark's table.

    Args:
        columns: {key: its entry in the benchmark's YAML}, relative columns included.
        rows: The variants that have results, in the benchmark's order.
        remarks: What stands under the table.
    """

    columns: dict[str, dict[str, Any]]
    rows: list[Row]
    remarks: list[str]


def make_table(plan: Benchmark, results: list[dict[str, Any]], *, mixed: bool = False) -> Table:
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
        own = [_figures(result) for result in known if result["run"]["variant"] == variant]
        if own:
            cells = {key: _cell([values[key] for values in own if values.get(key) is not None]) for key in columns}
            rows.append(Row(variant, entry["title"], entry.get("group", ""), len(own), cells, entry.get("compared", True)))
            part = [columns[key]["title"] for key, cell in cells.items() if 0 < cell.count < len(own)]
            if part:
                remarks.append(
                    f"{entry['title']}: not every seed has {', '.join(part)}; such a value is no mean to compare with."
                )
    for key in columns:
        if all(row.cells[key].mean is None for row in rows):
            raise InputError(f"report {plan.name!r}: no result has the metric {key!r} of report.columns.")
    for key, column in columns.items():
        if "better" in column and rows:
            _mark_best([row for row in rows if row.compared], key, column["better"])
    table = Table(dict(columns), rows, remarks)
    _add_paired(table, plan, known)
    _add_relative(table, plan)
    return table


def shortened(table: Table, plan: Benchmark) -> Table:
    """Return the rows and columns of a table that its benchmark names under ``report.short``, with its note, if it has one.

    What is bold stays so.

    Raises:
        InputError: If it names none, or some that are not there.
    """
    short = plan.spec["report"].get("short")
    if short is None:
        raise InputError(f"report:{plan.name} short: the benchmark has no report.short, with the rows and columns to show.")
    rows = {row.variant: row for row in table.rows}
    for key, names, known in (("rows", short["rows"], list(rows)), ("columns", short["columns"], list(table.columns))):
        for name in names:
            if name not in known:
                raise InputError(f"report.short.{key} of benchmark {plan.name!r}: {name!r} is not there.{nearest(name, known)}")
    columns = {key: table.columns[key] for key in short["columns"]}
    note = plan.fill_note(short.get("note", plan.spec["note"]))
    missing = next((remark for remark in table.remarks if remark.startswith("Missing: ")), "")
    left_out = "" if any(f" {name}-" in missing for name in short["rows"]) else missing
    remarks = [remark.replace(plan.note, note) for remark in table.remarks if remark != left_out]
    return Table(columns, [rows[name] for name in short["rows"]], remarks)


def _where(plan: Benchmark, results: list[dict[str, Any]]) -> str:
    environment = results[0]["environment"]
    machine = ", ".join(environment["gpus"]) or f"{environment['cpu']}, {environment['threads']} threads"
    seeds = max(len([r for r in results if r["run"]["variant"] == variant]) for variant in plan.spec["variants"])
    spread = "Mean ± standard deviation over n seeds; bold where the best leads by more than that. " if seeds > 1 else ""
    equal = f"Compared at equal {plan.spec['equal']}. " if len(plan.spec["variants"]) > 1 and "equal" in plan.spec else ""
    commit = statistics.mode(str(result["environment"]["commit"]) for result in results)  # all have the same sources
    return f"{spread}{equal}{plan.note} Measured on {machine}; commit {commit[:10]}."


def _mixtures(plan: Benchmark, results: list[dict[str, Any]], mixed: bool) -> list[str]:
    """Refuse what must not stand in one table; return what to say of it where it was allowed."""
    found = []
    environments = [result["environment"] for result in results]
    versions = {environment["code"] or environment["commit"] for environment in environments}
    if len(versions) > 1:
        found.append(f"results of {len(versions)} code versions ({', '.join(sorted(map(str, versions)))})")
    # The sources of a changed checkout are a commit's where a clean one had the same; settings are compared below.
    committed = {environment["code"] for environment in environments if environment["clean"]}
    changed = {environment["code"] for environment in environments if environment["clean"] is False}
    if not changed <= committed:
        found.append("results of a checkout with uncommitted changes")
    words = {cell.name: [step.words() for step in cell.steps] for cell in plan.cells(sorted({r["run"]["seed"] for r in results}))}
    names = {f"{result['run']['variant']}-{result['run']['seed']}": result["run"]["commands"] for result in results}
    other = [name for name, commands in names.items() if commands and commands != words.get(name)]
    if other:
        found.append(f"results of other settings than the benchmark now has ({', '.join(other)})")
    machines = [json.dumps(e["gpus"]) if e["gpus"] else f"{e['cpu']}, {e['threads']} threads" for e in environments]
    timed: dict[str, set[str]] = {}  # machines by column
    for key, column in plan.spec["report"]["columns"].items():
        own = {machine for machine, result in zip(machines, results) if _figures(result).get(key) is not None}
        if column.get("timing") and len(own) > 1:
            timed[key] = own
    if timed:
        found.append(f"timings ({', '.join(timed)}) of several machines ({'; '.join(sorted(set().union(*timed.values())))})")
    if found and not mixed:
        raise InputError(
            f"report {plan.name!r} would mix {' and '.join(found)}. Run the benchmark again, or allow it with --mixed true."
        )
    said = [f"Mixed here: {' and '.join(found)}."] if found else []
    if len(set(machines)) > 1 and not any("machines" in part for part in found):
        said.append(f"Measured on several machines: {'; '.join(sorted(set(machines)))}.")
    return said


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["cost"], **result["metrics"]["final"]}


def _cell(values: list[float]) -> Cell:
    if not values:
        return Cell(None, None)
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _mark_best(rows: list[Row], key: str, better: str) -> None:
    """Mark the best of each group if it leads the next by more than both their spreads.

    A row of one seed is given the largest spread of the column in its group; where no row of a group has more than one seed,
    nothing is marked there. A value that some seeds of a row lack is never the best.
    """
    sign = 1 if better == "lower" else -1
    for group in {row.group for row in rows}:
        spreads = [row.cells[key].spread or 0.0 for row in rows if row.group == group and row.cells[key].spread is not None]
        if not spreads:
            continue
        cells = [row.cells[key] for row in rows if row.group == group and row.cells[key].mean is not None]
        order = sorted(cells, key=lambda cell: sign * (cell.mean or 0.0))
        if len(order) < 2:
            continue
        first, second = order[:2]
        lead = abs((second.mean or 0.0) - (first.mean or 0.0))
        whole = all(row.count == row.cells[key].count for row in rows if row.cells[key] is first)
        first.best = whole and lead > max(max(spreads) if cell.spread is None else cell.spread for cell in (first, second))


def _add_relative(table: Table, plan: Benchmark) -> None:
    """Add a column beside each that asks for one: the ratio to, the difference from, or the speedup over the baseline.

    A group without the baseline is compared with its own first variant, the first that the benchmark names. Where the one that
    all are compared with has no value, the column stays empty.

    Raises:
        InputError: If the baseline is no variant.
    """
    variants = plan.spec["variants"]
    baseline = plan.spec["report"].get("baseline")
    if baseline is not None and baseline not in variants:
        raise InputError(f"report.baseline={baseline!r} of benchmark {plan.name!r} is no variant.{nearest(baseline, variants)}")
    bases: dict[str, str] = {}
    for variant, entry in variants.items():
        bases.setdefault(entry.get("group", ""), variant)
    if baseline is not None:
        bases[variants[baseline].get("group", "")] = baseline
    means = {row.variant: row.cells for row in table.rows}
    columns: dict[str, dict[str, Any]] = {}
    for key, column in table.columns.items():
        columns[key] = column
        kind = column.get("relative")
        if kind in (None, *_PAIRED) or not baseline:
            continue
        name = f"{key}:{kind}"
        how = {"ratio": " / baseline", "difference": " - baseline", "speedup": ", times less than the baseline"}[kind]
        columns[name] = {**column, "title": f"{column['title']}{how}", "sign": kind == "difference"}
        if kind != "difference":
            columns[name].pop("unit", None)
        for row in table.rows:
            other = bases[row.group]
            own, base = row.cells[key].mean, means[other][key].mean if other in means else None
            row.cells[name] = Cell(None if own is None or base is None else _relative(kind, own, base), None)
    table.columns = columns


_PAIRED = ("interval", "recovered")


def _add_paired(table: Table, plan: Benchmark, results: list[dict[str, Any]]) -> None:
    """Add a column beside each that asks for ``interval``, and a second one beside each that asks for ``recovered``.

    The first is the difference from the baseline, the mean over the seeds that both have, with half its 95 % interval (Student's
    t of the differences seed by seed); the second the share of the difference between the baseline and the goal.

    Raises:
        InputError: If a column asks for it and the baseline or the goal is no variant.
    """
    report, kinds = plan.spec["report"], {column.get("relative") for column in table.columns.values()}
    for name, users in (("baseline", _PAIRED), ("goal", ("recovered",))):
        asking = [kind for kind in users if kind in kinds]
        if asking and report.get(name) not in plan.spec["variants"]:
            raise InputError(
                f"report.{name}={report.get(name)!r} of benchmark {plan.name!r} is no variant, but a column is {asking[0]!r}."
                f"{nearest(str(report.get(name)), plan.spec['variants'])}"
            )
    columns: dict[str, dict[str, Any]] = {}
    for key, column in table.columns.items():
        columns[key] = column
        if column.get("relative") not in _PAIRED:
            continue
        values: dict[str, dict[int, float]] = {}
        for result in results:
            found = _figures(result).get(key)
            if found is not None:
                values.setdefault(result["run"]["variant"], {})[result["run"]["seed"]] = found
        base = values.get(report["baseline"], {})
        difference, share = f"{key}:difference", f"{key}:recovered"
        columns[difference] = {**column, "title": f"{column['title']} - baseline, 95 % interval", "sign": True}
        for row in table.rows:
            cell = _paired(values.get(row.variant, {}), base)
            row.cells[difference] = Cell(None, None) if row.variant == report["baseline"] else cell
        if column["relative"] == "interval":
            continue
        whole = _paired(values.get(report["goal"], {}), base)
        columns[share] = {"title": f"share of the goal's gain in {column['title']}", "digits": 2}
        for row in table.rows:
            own = row.cells[difference].mean
            row.cells[share] = Cell(own / whole.mean if own is not None and whole.mean else None, None)
    table.columns = columns


def _paired(values: dict[int, float], base: dict[int, float]) -> Cell:
    """Return the mean difference over common seeds, and half its 95 % interval in place of the spread."""
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if len(differences) < 2:
        return Cell(differences[0] if differences else None, None, len(differences))
    try:
        from scipy.stats import t  # takes a second
    except ImportError as error:
        raise InputError("An interval needs the extra report: pip install 'fulgurite[report]'.") from error

    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    return Cell(statistics.fmean(differences), half, len(differences))


def _relative(kind: str, own: float, base: float) -> float | None:
    if kind == "difference":
        return own - base
    above, below = (base, own) if kind == "speedup" else (own, base)
    return above / below if below else None


def _text(cell: Cell, column: dict[str, Any], plus_minus: str, count: int) -> str:
    if cell.mean is None:
        return ""
    digits = column.get("digits", 0 if abs(cell.mean) >= 100 else 1 if abs(cell.mean) >= 10 else 3)
    text = f"{cell.mean:{'+' if column.get('sign') else ''}z,.{digits}f}"  # z: no -0.000
    if 0 < cell.count < count:
        text = f"{text} ({cell.count} of {count})"
    return text if cell.spread is None else f"{text}{plus_minus}{cell.spread:.{digits}f}"


def _heads(table: Table) -> list[str]:
    return [f"{column['title']} ({column['unit']})" if "unit" in column else column["title"] for column in table.columns.values()]


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    counted = any(row.count > 1 for row in table.rows)
    lines = ["| " + " | ".join(["", *(["n"] if counted else []), *_heads(table)]) + " |"]
    lines.append("|---|" + "---:|" * (len(table.columns) + counted))
    group = ""
    for row in table.rows:
        if row.group != group:
            group = row.group
            lines.append(f"| *{group}* |" + " |" * (len(table.columns) + counted))
        texts = {key: _text(row.cells[key], column, " ± ", row.count) for key, column in table.columns.items()}
        cells = [f"**{text}**" if row.cells[key].best else text for key, text in texts.items()]
        lines.append("| " + " | ".join([row.title, *([str(row.count)] if counted else []), *cells]) + " |")
    return "\n".join([*lines, "", *("\n".join([remark, ""]) for remark in table.remarks)]).rstrip("\n") + "\n"


def latex(table: Table) -> str:
    """Return a table for LaTeX (package ``booktabs``), its remarks as comments."""
    head = " & ".join(["", "$n$", *map(_escaped, _heads(table))])
    lines = [f"% {remark}" for remark in table.remarks]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.columns) + 1)}}}", r"\toprule", rf"{head} \\", r"\midrule"]
    group = ""
    for row in table.rows:
        if row.group != group:
            group = row.group
            lines.append(rf"\multicolumn{{{len(table.columns) + 2}}}{{l}}{{\textit{{{_escaped(group)}}}}} \\")
        texts = {key: _text(row.cells[key], column, r" $\pm$ ", row.count) for key, column in table.columns.items()}
        cells = [rf"\textbf{{{text}}}" if row.cells[key].best else text for key, text in texts.items()]
        lines.append(rf"{' & '.join([_escaped(row.title), str(row.count), *cells])} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def comma_separated(table: Table) -> str:
    """Return a table's numbers as CSV, mean and spread in columns of their own, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [name for key in table.columns for name in (key, f"{key}_std")]
    writer.writerow(["variant", "title", "group", "n", *names])
    for row in table.rows:
        values = [value for key in table.columns for value in (row.cells[key].mean, row.cells[key].spread)]
        writer.writerow([row.variant, row.title, row.group, row.count, *("" if value is None else value for value in values)])
    return file.getvalue()
