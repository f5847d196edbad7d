"""``fulgurite report``: tables from committed result files, printed or written between markers in the documents."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest

ROOT = Path(__file__).parent
_DOCUMENTS = ("README.md", "docs/*.md")
_MARKER = re.compile(r"(<!-- report:(\S+) -->\n).*?(<!-- /report -->)", re.DOTALL)


def load_results(name: str) -> list[dict[str, Any]]:
    """Return the committed results of a benchmark (``distillation/closeness``), sorted by file name.

    Raises:
        InputError: If there are none, or a file is no JSON.
    """
    method, _, kind = name.partition("/")
    files = sorted((ROOT / method / "results").glob(f"{kind}*.json"))
    if not kind or not files:
        raise InputError(f"report {name!r}: there are no results of that name.{nearest(name, available())}")
    results = []
    for file in files:
        try:
            results.append(json.loads(file.read_text("utf-8")))
        except json.JSONDecodeError as error:
            raise InputError(f"{file} is damaged ({error}). Restore it or run its benchmark again.") from error
    return results


def available() -> list[str]:
    """Return the names of all benchmarks that have results."""
    files = ROOT.glob("*/results/*.json")
    return sorted({f"{file.parent.parent.name}/{re.split(r'[-.]', file.name)[0]}" for file in files})


def table(name: str) -> str:
    """Return a benchmark's table in Markdown.

    A result file has ``row`` (the table's row that it belongs to) and ``figures`` ({column: number or text}); the files of a
    row, one a seed, become mean +- standard deviation. Commits and machines are never mixed.

    Raises:
        InputError: If the results come from several machines or commits.
    """
    results = load_results(name)
    if not all(result["environment"].get("clean", True) for result in results):
        raise InputError(f"report {name!r}: results of a checkout with uncommitted changes belong to no commit. Run it again.")
    for field in ("cpu", "gpus", "commit"):
        values = {json.dumps(result["environment"][field]) for result in results}
        if len(values) > 1:
            raise InputError(f"report {name!r} mixes several {field}: {', '.join(sorted(values))}. Run the benchmark again.")
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result["figures"])
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures[0]))
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, seeds in rows.items():
        cells = [_cell([figures.get(column) for figures in seeds]) for column in columns]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    environment = results[0]["environment"]
    where = ", ".join(environment["gpus"]) or f"{environment['cpu']}, {environment['threads']} threads"
    count = max(len(seeds) for seeds in rows.values())
    spread = f"Mean ± standard deviation over {count} seeds. " if count > 1 else ""
    lines += ["", f"{spread}{results[0]['note']} Measured on {where}; commit {environment['commit'][:10]}."]
    return "\n".join(lines) + "\n"


def _cell(values: list[Any]) -> str:
    if values[0] is None:
        return ""
    if isinstance(values[0], str):
        return values[0]
    mean = statistics.fmean(values)
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 3
    text = f"{mean:,.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def fill(text: str) -> str:
    """Return a document with all its marked tables made anew."""
    return _MARKER.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", text)


def documents() -> list[Path]:
    """Return the documents of the checkout that hold marked tables."""
    root = ROOT.parent
    return [path for pattern in _DOCUMENTS for path in sorted(root.glob(pattern)) if _MARKER.search(path.read_text("utf-8"))]


def main(arguments: list[str]) -> None:
    """Print a table (``report NAME``), or fill all documents (``report --write``)."""
    if arguments in (["-h"], ["--help"]) or len(arguments) != 1:
        print("usage: fulgurite report NAME | --write\n\nPrints a benchmark's table, or fills the tables of README.md and docs/.")
        print("Names: " + ", ".join(available()))
        return
    if arguments == ["--write"]:
        for path in documents():
            text = path.read_text("utf-8")
            path.write_text(fill(text), "utf-8")
        return
    print(table(arguments[0]))
