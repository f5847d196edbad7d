"""``fulgurite evaluate``: downstream tasks of a model by the EleutherAI evaluation harness (extra ``eval``)."""

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from ...errors import InputError
from ...files import write_json
from ...modules.precision import FrozenDtype, compute_device, frozen_dtype
from ...modules.pretrained import load_model, load_tokenizer, model_fingerprint, resolve_source
from ..configs import data_folder
from ..environment import environment
from ..parsing import Parser
from .humaneval import NAME, find_problems, human_eval

TASKS = Path(__file__).parent / "tasks"
_NO_HARNESS = "evaluate needs the extra eval: pip install 'fulgurite[eval]'."


def evaluate(
    model: str,
    tasks: str,
    *,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    weights: FrozenDtype = "auto",
    execute: bool = False,
    output: str | None = None,
) -> dict[str, float]:
    """Evaluate a model on tasks; the numbers are those of the harness itself.

    Args:
        model: An exported folder, or any other model source.
        tasks: Names of tasks, separated by commas. Those with a file of examples in ``data`` are read from there; any other task
            of the harness is read from the hub. ``humaneval`` is ours, from HumanEval's own file.
        data: Folder of the examples, ``<task>.jsonl``; null takes ``shared/data/icl_eval`` beside the checkout.
        limit: Take the first examples of every task only.
        batch_size: Requests that are run at the same time.
        max_length: Tokens of context at most; null takes the model's.
        weights: Type of the weights in memory.
        execute: Run what the model writes, which ``humaneval`` needs, in a process with little time and memory. That is no jail:
            only do it with models that you trust.
        output: File for the results as JSON.

    Returns:
        The metrics, by ``<task>.<metric>``.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} takes no example. Legal: 1 or more, or null for all.")
    if output is not None and Path(output).exists():
        raise InputError(f"output={output!r} exists and is left as it is. Give another file.")
    source = resolve_source(model)
    folder = data_folder(data) if data else data_folder(None) / "icl_eval"
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError(f"tasks={tasks!r} names none. With local examples there are: {', '.join([*local_tasks(), NAME])}.")
    if (NAME in names) != execute:
        raise InputError(
            f"tasks={tasks!r}: {NAME} and --execute true go together: generated code is only run on the explicit flag."
        )
    problems = find_problems(folder) if NAME in names else None
    specs = [_task(name, folder) for name in names if name != NAME]
    harness = _harness() if specs else None
    loaded = load_model(source.name, frozen_dtype(weights)).to(compute_device())  # type: ignore[arg-type]
    tokenizer = load_tokenizer(source.name)
    metrics = {} if problems is None else human_eval(loaded, tokenizer, problems, limit)
    if harness is not None:
        causal = harness.wrapper(
            pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, device=str(loaded.device)
        )
        metrics |= _run_harness(harness, causal, specs, limit)
    if output:
        block = {"model": source.title, "fingerprint": model_fingerprint(loaded), "tasks": names, "limit": limit}
        write_json(Path(output), {"run": block, "metrics": metrics, "environment": environment()})
    return metrics


def local_tasks() -> dict[str, Path]:
    """Return the task files that are packaged, by name."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def _task(name: str, folder: Path) -> dict[str, Any] | str:
    examples = folder / f"{name}.jsonl"
    packaged = local_tasks()
    if name not in packaged:
        return name
    if not examples.is_file():
        raise InputError(f"tasks: {name!r} needs {examples}, which is not there. Name the folder of the examples with --data.")
    spec = yaml.safe_load(packaged[name].read_text("utf-8"))
    return {**spec, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(examples)}}, "test_split": "test"}


@dataclass
class _Harness:
    evaluate: Any
    wrapper: Any


def _harness() -> _Harness:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(_NO_HARNESS) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return _Harness(lm_eval.simple_evaluate, HFLM)


def check_harness(tasks: str) -> None:
    """Refuse tasks that need the harness where it is not installed; imports nothing of it.

    Args:
        tasks: As for ``evaluate``.

    Raises:
        InputError: If it is not.
    """
    if {name.strip() for name in tasks.split(",")} - {NAME} and find_spec("lm_eval") is None:
        raise InputError(_NO_HARNESS)


def _run_harness(harness: _Harness, causal: Any, specs: list[Any], limit: int | None) -> dict[str, float]:
    try:
        found = harness.evaluate(model=causal, tasks=specs, limit=limit, bootstrap_iters=1000, log_samples=False)
    except (KeyError, ValueError, ConnectionError, OSError) as error:
        raise InputError(f"tasks: the harness could not run {[s for s in specs if isinstance(s, str)]} ({error}).") from error
    return {
        f"{task}.{metric.removesuffix(',none').replace(',', '.')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and metric != "sample_len"
    }


def evaluate_words(words: list[str]) -> dict[str, float]:
    """Return the metrics for the options of a command line."""
    return auto_cli(evaluate, args=words, prog="fulgurite evaluate", as_positional=False, parser_class=Parser)


def main(arguments: list[str]) -> None:
    """Run ``evaluate`` with the words of a command line, and show its table."""
    metrics = evaluate_words(arguments)
    table = Table()
    table.add_column("task")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(*name.split(".", 1), f"{value:.4f}")
    Console().print(table)
