"""``fulgurite benchmark``: runs a grid of variants and seeds, each cell in its own process. Imports nothing heavy."""

import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import auto_cli

from ...errors import InputError
from ..parsing import Parser
from .fingerprints import PACKAGE
from .grid import Grid, console
from .plan import SMOKE, load_benchmark


def benchmark(
    name: str,
    *,
    scale: str = "cpu",
    seeds: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    workers: int = 1,
    data: str | None = None,
    set: dict[str, str] | None = None,
    work: str | None = None,
) -> None:
    """Run every cell of a benchmark that has no result yet for the same commands, configs, code and data.

    A cell that fails is reported with its error and does not stop the others. A benchmark that was stopped or killed goes on
    when it is started again; a cell that was interrupted has left no result.

    Args:
        name: Name of the benchmark (``distillation``, ``distillation/speed``), or a YAML file of your own.
        scale: ``cpu``, ``gpu``, or ``smoke`` to try everything on a tiny model in a minute. Results of ``smoke`` go to the work
            folder, never among the committed ones, as all do where no checkout is.
        seeds: Seeds for every variant, separated by commas; null takes the benchmark's own.
        only: Cells to run: names of variants or cells, or patterns such as ``fixed-*``, separated by commas.
        dry_run: Only show what would be run and how long it will take, from the times of results that are there.
        workers: Cells to run at the same time; they share the cores, and take one GPU each in turn.
        data: Folder of the data sets; null takes ``shared/data`` beside the checkout.
        set: Other values for settings of the scale (``--set.train my.txt``); their results go to a folder of their own in
            the work folder.
        work: Folder for runs, products and logs; null is ``runs/benchmark/<name>/<scale>``.
    """
    if workers < 1:
        raise InputError(f"--workers {workers} runs nothing. Legal: 1 or more.")
    plan = load_benchmark(name, scale, data=data, settings=set)
    jobs = plan.jobs(_integers("--seeds", seeds), None if only is None else only.split(","))
    folder = Path(work or Path("runs", "benchmark", plan.name, scale))
    installed = plan.file is None and not (PACKAGE / "pyproject.toml").is_file()  # a wheel, which stays as it was installed
    results = folder / "results" if scale == SMOKE or installed else plan.results
    if set:
        mark = hashlib.sha256(json.dumps(sorted(set.items())).encode()).hexdigest()[:8]
        results = folder / f"results-{mark}"
    grid = Grid(plan, jobs, folder.resolve(), results)
    if dry_run:
        grid.show(workers)
        return
    with _only_one(folder):
        grid.run(workers)


def _integers(flag: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text!r} is no list of whole numbers. Legal: 0,1,2.") from None


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process runs this benchmark in {folder}. Wait for it, or give another --work.") from None
        yield


def main(arguments: list[str]) -> None:
    """Run ``benchmark`` with the words of a command line."""
    if arguments[:1] and not arguments[0].startswith("-"):
        arguments = ["--name", *arguments]
    try:
        auto_cli(benchmark, args=arguments, prog="fulgurite benchmark", as_positional=False, parser_class=Parser)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.")
        sys.exit(130)
