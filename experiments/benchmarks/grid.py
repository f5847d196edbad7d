"""The cells of a benchmark: what is done, what is left, and running it. Imports nothing heavy."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...errors import InputError
from ...files import write_json
from ..threads import threads_each
from .fingerprints import code_version
from .plan import Benchmark, Job, fill, in_order
from .results import load_results

console = Console()
_TAIL = 4096  # bytes of a log's end, in which its last line is looked for
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    begin: float
    bar: TaskID
    slot: int


class Grid:
    """The cells of a benchmark: what is done, what is left, and running it.

    Args:
        plan: The benchmark.
        jobs: Its products and cells.
        folder: Work folder.
        results: Folder of the results.
    """

    def __init__(self, plan: Benchmark, jobs: list[Job], folder: Path, results: Path) -> None:
        self.plan, self.jobs, self.folder, self.results = plan, jobs, folder, results
        self.products = {job.name: job for job in jobs if job.variant is None}
        self.known = load_results(results)

    def job_folder(self, job: Job) -> Path:
        """Return where a job runs; other commands, code or data have another folder."""
        return self.folder / ("products" if job.variant is None else "cells") / f"{job.name}-{job.fingerprint[:8]}"

    def target(self, job: Job) -> Path:
        """Return the file that is there when a job is done."""
        return self.job_folder(job) / "product.json" if job.variant is None else self.results / f"{job.name}.json"

    def state(self, job: Job) -> str:
        """Return ``done``, ``to do``, or ``stale`` for a result of other commands, code or data."""
        target = self.target(job)
        if not target.is_file():
            return "to do"
        if job.variant is None:
            return "done"
        return "done" if json.loads(target.read_text("utf-8"))["run"]["fingerprint"] == job.fingerprint else "stale"

    def to_do(self) -> list[Job]:
        """Return the cells without a result, each after the products that it still needs."""
        cells = [job for job in self.jobs if job.variant is not None and self.state(job) != "done"]
        needed = [*self.products.values(), *cells]
        return [job for job in in_order(needed) if self.state(job) != "done"]

    def seconds(self, job: Job) -> tuple[float | None, str]:
        """Return how long a job will take, and how that is known."""
        if job.variant is None:
            made = {path.parent.name: json.loads(path.read_text("utf-8")) for path in self.folder.glob("products/*/product.json")}
            own = [
                record["cost"]["seconds"]
                for name, record in made.items()
                if _of_any_seed(name.rpartition("-")[0]) == _of_any_seed(job.name)
            ]
            own = own or [
                seconds
                for result in self.known
                for name, seconds in result["run"]["products"].items()
                if _of_any_seed(name) == _of_any_seed(job.name)
            ]
            times = [seconds for result in self.known for seconds in result["run"]["products"].values()]
        else:
            own = [result["cost"]["seconds"] for result in self.known if result["run"]["variant"] == job.variant]
            times = [result["cost"]["seconds"] for result in self.known]
        if own:
            return statistics.fmean(own), f"mean of {len(own)} measured"
        return (statistics.fmean(times), "mean of the others") if times else (None, "not measured")

    def estimate(self, jobs: list[Job], workers: int) -> tuple[float, int]:
        """Return the seconds that jobs will take together, and for how many of them nothing was measured."""
        seconds = [self.seconds(job)[0] for job in jobs]
        return sum(part for part in seconds if part is not None) / workers, seconds.count(None)

    def show(self, workers: int) -> None:
        """Print the cells, their states and what is left to do."""
        table = Table(title=f"{self.plan.spec['title']} ({self.plan.scale})")
        for column in ("", "state", "time", "known from"):
            table.add_column(column, justify="right" if column == "time" else "left")
        waiting = {job.name for job in self.to_do()}
        for job in self.jobs:
            seconds, source = self.seconds(job)
            kind = "product " if job.variant is None else ""
            state = self.state(job)
            if job.variant is None and state == "to do" and job.name not in waiting:
                state = "not needed"
            table.add_row(f"{kind}{job.name}", state, "" if seconds is None else _duration(seconds), source)
        console.print(table)
        total, unknown = self.estimate(self.to_do(), workers)
        which = "those of known time" if unknown else "they"
        takes = f"; {which} will take {_duration(total)} with {workers} worker(s)" if unknown < len(waiting) else ""
        console.print(f"{len(waiting)} jobs are left{takes}.")
        if unknown:
            console.print(
                f"For {unknown} of them no time is known: run one with --only first, and ask again. Times come from "
                f"{self.results} and {self.folder}."
            )
        cpus = {result["environment"]["cpu"] for result in self.known}
        if cpus:
            console.print(f"Times were measured on {', '.join(sorted(cpus))}.")

    def run(self, workers: int) -> None:
        """Run what is left, with progress; end with what failed.

        Raises:
            InputError: If a cell failed; the message names each with its error and log.
        """
        waiting = self.to_do()
        cells = [job for job in self.jobs if job.variant is not None]
        console.print(f"{len(cells)} cells, {sum(self.state(job) == 'done' for job in cells)} done; results in {self.results}")
        if not waiting:
            return
        self._check(waiting)
        failed: dict[str, str] = {}
        with _progress() as progress:
            total = progress.add_task("", total=len(waiting))
            running: list[_Running] = []
            try:
                while waiting or running:
                    self._start(waiting, running, failed, workers, progress)
                    time.sleep(0.2)
                    for entry in list(running):
                        self._watch(entry, progress)
                        if entry.process.poll() is not None:
                            running.remove(entry)
                            self._finish(entry, failed, progress)
                            progress.advance(total)
                    left, unknown = self.estimate([*waiting, *(entry.job for entry in running)], workers)
                    left -= sum(time.perf_counter() - entry.begin for entry in running) / workers
                    more = " or more" if unknown else ""
                    progress.update(total, description=f"{len(waiting) + len(running)} left, {_duration(max(left, 0))}{more}")
            finally:
                for entry in running:
                    with suppress(ProcessLookupError):
                        os.killpg(entry.process.pid, signal.SIGKILL)  # what it started too
                    entry.process.wait()
        if failed:
            report = "".join(f"\n  {name}: {error}" for name, error in failed.items())
            raise InputError(
                f"{len(failed)} of the jobs failed; the others have their results. Start again to retry them.{report}"
            )

    def _check(self, jobs: list[Job]) -> None:
        """Refuse what is wrong or missing now, not hours later in its turn."""
        console.print("Checking the command lines ...")
        names = ["data", "run", "model", *(job.place for job in self.products.values())]
        places = {name: str(self.folder / name) for name in names}
        words = {job.name: [[fill(word, places, job.name) for word in step.words()] for step in job.steps] for job in jobs}
        checking = [sys.executable, "-m", f"{__package__}.check"]
        done = subprocess.run(checking, input=json.dumps(words), stdout=subprocess.PIPE, text=True, check=True)
        if wrong := json.loads(done.stdout.splitlines()[-1]):
            report = "".join(f"\n  {name}: {error}" for name, error in wrong.items())
            raise InputError(f"{len(wrong)} of the jobs cannot be run; nothing was started.{report}")

    def _start(
        self, waiting: list[Job], running: list[_Running], failed: dict[str, str], workers: int, progress: Progress
    ) -> None:
        for job in list(waiting):
            lost = [name for name in job.needs if name in failed]
            if lost:
                failed[job.name] = f"needs {', '.join(lost)}, which failed"
                waiting.remove(job)
                progress.advance(TaskID(0))
            elif len(running) < workers and all(self.state(self.products[name]) == "done" for name in job.needs):
                waiting.remove(job)
                slot = min({*range(workers)} - {entry.slot for entry in running})
                running.append(self._spawn(job, slot, workers, progress))

    def _spawn(self, job: Job, slot: int, workers: int, progress: Progress) -> _Running:
        folder = self.job_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        write_json(folder / "job.json", self._job_file(job))
        log = folder / "log.txt"
        # The log is no terminal, but its last line is shown: progress bars are to be drawn into it, a line each.
        environment = {**os.environ, "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "200"}
        if workers > 1:
            environment |= threads_each(workers)
        devices = _gpus()
        if devices:  # one each, or the Trainer would take all and count the tokens of one
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        # The other end of the pipe closes when this process ends, however it does; the cell ends with it.
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.cell", str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        expected = self.seconds(job)[0]
        bar = progress.add_task(job.name, total=expected)
        return _Running(job, process, log, time.perf_counter(), bar, slot)

    def _job_file(self, job: Job) -> dict[str, Any]:
        places = {"data": self.plan.constants["data"]}
        for name in job.needs:
            product = self.products[name]
            places[product.place] = str(self.job_folder(product) / product.steps[0].name / product.gives)
        return {
            "folder": str(self.job_folder(job)),
            "target": str(self.target(job)),
            "places": places,
            "disk": places[job.disk] if job.disk else None,
            "code": code_version(),
            "data": job.data,
            "begun": time.time(),
            "steps": [
                {"name": s.name, "command": s.command, "words": s.words(), "metrics": s.metrics, "curves": s.curves}
                for s in job.steps
            ],
            "run": {
                "benchmark": self.plan.name,
                "scale": self.plan.scale,
                "variant": job.variant,
                "title": job.title,
                "note": self.plan.note,
                "seed": job.seed,
                "fingerprint": job.fingerprint,
                "products": {name: self.seconds(self.products[name])[0] for name in job.needs},
            },
        }

    def _watch(self, entry: _Running, progress: Progress) -> None:
        line = escape((_last_lines(entry.log) or [""])[-1][:60])
        progress.update(entry.bar, completed=time.perf_counter() - entry.begin, description=f"{entry.job.name} [dim]{line}[/dim]")

    def _finish(self, entry: _Running, failed: dict[str, str], progress: Progress) -> None:
        job, target = entry.job, self.target(entry.job)
        seconds = time.perf_counter() - entry.begin
        progress.remove_task(entry.bar)
        if entry.process.returncode == 0:
            if job.variant is not None:
                self.known = [result for result in self.known if result["run"]["fingerprint"] != job.fingerprint]
                self.known.append(json.loads(target.read_text("utf-8")))
                shutil.rmtree(self.job_folder(job))
            progress.console.print(f"{job.name}: {_duration(seconds)}", highlight=False)
            return
        code = entry.process.returncode
        if code == 128 + signal.SIGTERM:
            code = -signal.SIGTERM
        error = f"killed by signal {-code}" if code < 0 else _error(entry.log) or f"exit code {code}"
        failed[job.name] = f"{error} ({entry.log})"
        write_json(entry.log.parent / "failed.json", {"job": job.name, "exit_code": entry.process.returncode, "error": error})
        progress.console.print(f"{job.name} failed after {_duration(seconds)}: {error}", highlight=False, markup=False)


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part for part in visible.split(",") if part]
    return [str(index) for index in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def _of_any_seed(product: str) -> str:
    """Return the name of a product without the seed, if it has one."""
    return product.partition("@")[0]


def _last_lines(log: Path) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = _CONTROL.sub("", file.read().decode("utf-8", "replace")).replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _error(log: Path) -> str:
    """Return the message with which a job ended, whole, or its last line."""
    lines = _last_lines(log)
    begin = next((place for place in reversed(range(len(lines))) if lines[place].startswith("error: ")), -1)
    return "\n".join(lines[begin:])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _progress() -> Progress:
    return Progress(
        BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"), console=console, refresh_per_second=2
    )
