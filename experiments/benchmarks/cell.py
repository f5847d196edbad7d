"""The process of one job: runs its steps through the command line's own code and writes what they gave and cost.

Started by ``fulgurite benchmark`` with the path of the job's file. Every step that is done leaves a record beside it, so that a
killed job goes on where it was; the result appears at the very end, whole.
"""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ...datamodules.base import data_hashes
from ...errors import InputError, exit_code
from ...files import write_json
from ...modules.pretrained import model_fingerprint
from ..cli import quiet, run
from ..environment import environment
from .check import measuring
from .fingerprints import code_version
from .plan import fill
from .results import check_result


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job's steps and return its record: the result of a cell, or what a product cost.

    Args:
        job: The content of the job's file: its ``folder``, ``steps``, ``places`` (what names in braces stand for), ``data``
            (hashes) and ``run``.

    Raises:
        InputError: If a step does not give a metric that the benchmark keeps.
    """
    folder = Path(job["folder"])
    begin = time.time()
    places = dict(job["places"])
    records = []
    for number, step in enumerate(job["steps"]):
        noted = folder / f"{number}-{step['name']}.json"
        places["run"] = str(folder / step["name"])
        if not noted.is_file():
            print(f"== {step['name']}", flush=True)
            write_json(noted, _run_step(step, [fill(word, places, "command") for word in step["words"]], folder))
        records.append(json.loads(noted.read_text("utf-8")))
        if number == 0:
            places["model"] = str(folder / step["name"] / "export")
    first = records[0]
    evaluations = records[job["steps"][0]["name"] == "train" :]
    cost = {
        **first["cost"],
        "seconds": begin - job["begun"] + sum(record["seconds"] for record in records),
        "evaluation_seconds": sum(record["seconds"] for record in evaluations),
    }
    if job["disk"]:
        cost["disk_bytes"] = sum(file.stat().st_size for file in Path(job["disk"]).rglob("*") if file.is_file())
        if cost.get("tokens"):
            cost["disk_bytes_per_token"] = cost["disk_bytes"] / cost["tokens"]
    final = {name: value for record in records for name, value in record["metrics"].items()}
    data = job["data"] | {name: value for r in records for name, value in r["data"].items()}
    record = environment(seed=job["run"]["seed"], data=data)
    record |= {"code": job["code"], "models": {name: value for r in records for name, value in r["models"].items()}}
    del record["command"], record["seed"]  # they are in ``run``
    return _without_places(
        {
            "run": {**job["run"], "commands": [step["words"] for step in job["steps"]], "config": first["config"]},
            "metrics": {"final": final, "curves": {name: points for r in records for name, points in r["curves"].items()}},
            "cost": cost,
            "environment": record,
        },
        places,
    )


def _run_step(step: dict[str, Any], words: list[str], folder: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    record: dict[str, Any] = {"metrics": {}, "curves": {}, "cost": {}, "config": None, "data": {}, "models": {}}
    if step["command"] == "measure":
        given = _measure(words, step["name"], record)
    elif step["command"] == "evaluate":
        from ..evaluation.evaluate import evaluate_words  # needs an extra

        given = evaluate_words(words[1:])
        record["cost"] = _memory()
    else:
        given = _command(step, words, folder, record)
        if at_steps := [source for source in (step["metrics"] or {}).values() if "@" in source]:
            given |= _points(folder / step["name"], at_steps)
    record["seconds"] = time.perf_counter() - begin
    wanted = step["metrics"] if step["metrics"] is not None else {name: name for name in given}
    for name, source in wanted.items():
        if source not in given:
            raise InputError(
                f"metric {name!r}: {step['command']} gives no {source!r}. It gives: {', '.join(sorted(given)) or 'nothing'}."
            )
        record["metrics"][name] = given[source] if math.isfinite(given[source]) else None
    return record


def _measure(words: list[str], name: str, record: dict[str, Any]) -> dict[str, float]:
    """Call ``module:function`` of this package with the options as arguments; return its figures.

    A function that gives ``metrics`` may give ``curves``, ``cost`` and hashes of ``models`` beside them.
    """
    function, arguments = measuring(words)
    given = function(**arguments)
    blocks = given if "metrics" in given else {"metrics": given}
    record["curves"] = blocks.get("curves", {})
    record["models"] = {f"{name}/{key}": value for key, value in blocks.get("models", {}).items()}
    record["cost"] = _memory() | {key: float(value) for key, value in blocks.get("cost", {}).items()}
    return {key: float(value) for key, value in blocks["metrics"].items()}


def _command(step: dict[str, Any], words: list[str], folder: Path, record: dict[str, Any]) -> dict[str, float]:
    run_folder = folder / step["name"]
    for checkpoint in run_folder.glob("checkpoints/*.ckpt"):
        if not _is_whole(checkpoint):  # killed while it was copied from another disk
            checkpoint.unlink()
    again = step["command"] == "fit" and any(run_folder.glob("checkpoints/*.ckpt"))
    if not again and step["command"] != "predict":  # a capture goes on by itself
        shutil.rmtree(run_folder, ignore_errors=True)
    places = [f"--runs_folder={folder.parent}", f"--experiment={folder.name}", f"--run={step['name']}"]
    cli = run([*words, *places, *(["--ckpt_path=last"] if again else [])])
    wanted = [source for source in (step["metrics"] or {}).values() if "@" not in source]
    if again and not cli.trainer.callback_metrics.keys() >= {*wanted}:
        print("No step was left to train, and the figures went with the process that was killed: trained anew.", flush=True)
        shutil.rmtree(run_folder)
        return _command(step, words, folder, record)
    record["cost"] = _memory()
    if step["command"] in ("fit", "predict") and cli.token_rate.tokens:
        rate = cli.token_rate
        record["cost"] |= {"tokens": rate.tokens, "work_seconds": rate.seconds, "tokens_per_second": rate.tokens / rate.seconds}
    config = json.loads(json.dumps(cli.config[step["command"]].as_dict(), default=str))
    for name in ("config", "runs_folder", "experiment", "run", "ckpt_path"):
        config.pop(name, None)  # where things lie on this machine
    record["config"] = config
    record["data"] = {f"{step['name']}/{name}": value for name, value in data_hashes(cli.trainer).items()}
    if getattr(cli.model, "model", None) is not None:
        record["models"][step["name"]] = model_fingerprint(cli.model.model)
    if step["curves"]:
        record["curves"] = _curves(run_folder, step["curves"])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def _is_whole(checkpoint: Path) -> bool:
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False
    return True


def _memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak: dict[str, float] = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _curves(folder: Path, names: list[str]) -> dict[str, list[list[float | None]]]:
    """Return scalars that the run logged, as [step, value]; of a step logged twice, because the run went on, the later value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = events.Tags()["scalars"]
    curves = {}
    for name in names:
        if name not in logged:
            raise InputError(f"curve {name!r}: nothing of that name was logged. Logged: {', '.join(logged) or 'nothing'}.")
        points = {event.step: event.value for event in events.Scalars(name)}
        curves[name] = [[step, value if math.isfinite(value) else None] for step, value in sorted(points.items())]
    return curves


def _points(folder: Path, sources: list[str]) -> dict[str, float]:
    """Return scalars as they were last logged at a step or before it, each named ``<scalar>@<step>``."""
    names = {source: source.rpartition("@") for source in sources}
    curves = _curves(folder, sorted({name for name, _, _ in names.values()}))
    found = {}
    for source, (name, _, step) in names.items():
        until = [value for at, value in curves[name] if at is not None and at <= int(step)]
        if until:
            found[source] = math.nan if until[-1] is None else until[-1]
    return found


def _without_places(value: Any, places: dict[str, str]) -> Any:
    """Put the places back into braces: where things lie on this machine is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_places(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item, places) for item in value]
    if isinstance(value, str):
        for name, path in sorted(places.items(), key=lambda item: -len(item[1])):
            value = value.replace(path, "{" + name + "}")
    return value


def _end_with_parent() -> None:
    """End this process when the one that started it does; it holds the other end of the standard input."""
    while os.read(0, 1):  # not through sys.stdin, which could not be closed while this waits
        pass
    os.killpg(0, signal.SIGKILL)  # the ranks that a step may have started, too


def main() -> None:
    """Run the job whose file is named; write its record, or its error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    quiet()
    try:
        if code_version() != job["code"]:
            raise InputError("the package's code has changed since the benchmark began. Start it again.")
        record = run_job(job)
    except InputError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    except SystemExit as error:
        sys.exit(exit_code(error))
    if job["run"]["variant"] is not None:
        check_result(record, job["target"])
    write_json(Path(job["target"]), record)


if __name__ == "__main__":
    main()
