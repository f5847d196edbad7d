"""``fulgurite report``: tables and plots from result files, printed or written into the documents. Imports nothing heavy."""

import json
import re
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from ...errors import InputError
from ...files import write_atomic
from ..parsing import Parser
from .fingerprints import PACKAGE
from .plan import EXPERIMENTS, available, load_benchmark
from .plots import draw
from .results import load_results
from .tables import comma_separated, latex, make_table, markdown, shortened

_DOCUMENTS = ("README.md", "docs/*.md")
_MARKER = re.compile(r"(<!-- report:(\S+)( short)? -->\n).*?(<!-- /report -->)", re.DOTALL)
_SWEEP = re.compile(r"(<!-- sweep:(\S+) -->\n).*?(<!-- /sweep -->)", re.DOTALL)

_FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def fill(text: str) -> str:
    """Return a document with its marked tables made anew: ``report:<benchmark>`` (or with `` short``) and ``sweep:<method>``."""

    def table(match: re.Match[str]) -> str:
        plan = load_benchmark(match[2])
        whole = make_table(plan, load_results(plan.results))
        return f"{match[1]}\n{markdown(shortened(whole, plan) if match[3] else whole)}\n{match[4]}"

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
        name: Name of the benchmark, or a YAML file of your own.
        format: ``markdown``, ``latex`` (booktabs) or ``csv`` (unrounded).
        scale: Scale of the results.
        plot: Also write the benchmark's plots into this folder, as PNG and SVG.
        mixed: Allow results of several code versions and timings of several machines; the table says so.
        results: Folder of the results; null takes the committed ones, or those beside your own YAML.
    """
    plan = load_benchmark(name, scale)
    if results is not None and not Path(results).is_dir():
        raise InputError(f"--results {results!r} is no folder.")
    found = load_results(Path(results) if results else plan.results)
    print(_FORMATS[format](make_table(plan, found, mixed=mixed)), end="")
    if plot is None:
        return
    for key in plan.spec["report"].get("plots", {}):
        for kind in ("svg", "png"):
            write_atomic(Path(plot) / f"{plan.name.replace('/', '-')}-{key}.{kind}", draw(plan, found, key, kind))


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
    auto_cli(report, args=arguments, prog="fulgurite report", as_positional=False, parser_class=Parser)
