"""What models cost that several methods have made, one after another, beside the model that they come from."""

import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache, PreTrainedModel

from ...errors import InputError
from ...modules.precision import compute_device
from ...modules.pretrained import load_model, model_fingerprint
from ...modules.span_attention.rules import SpanPlan, SpanRule
from ...modules.spans import SpanCache, apply_plan, plan_of, remove_plan
from ..gradient_pruning.measure import PRUNING, train_over_link
from ..multitask.measure import Course
from ..netlab import needs_links
from ..offsite.measure import rung
from ..spans.measure import read_and_write

_EXPORT = "fulgurite.callbacks.ExportPretrained"


def running(*, seed: int, model: str, source: str, context: int, tokens: int, rounds: int) -> dict[str, float]:
    """Read a context and write tokens behind it with a model and with its original, in turns, in float32.

    A model without spans, as the original is, runs as ``transformers`` does it and by the spans' own runtime with heads that keep
    everything; the faster one counts.

    Args:
        seed: Of the context's tokens.
        model: Source of the model.
        source: Source of the original.
        context: Tokens before the first that is written.
        tokens: Tokens that are written a turn.
        rounds: Turns that are counted, behind one that is not.

    Returns:
        ``parameters``; ``cache_bytes`` behind the last token; ``tokens_per_second``; ``decode_speedup`` and
        ``prefill_speedup`` against the original (medians of neighbours).
    """
    device = compute_device()
    loaded = {name: load_model(name, "float32").to(device).eval() for name in (model, source)}  # type: ignore[arg-type]
    sizes = [int(each.config.vocab_size) for each in loaded.values()]
    ids = torch.randint(0, min(sizes), (1, context), generator=torch.Generator().manual_seed(seed))
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in loaded}
    for _ in track(range(rounds + 1), description=f"{context} tokens"):
        for name, each in loaded.items():
            turns[name].append(_turn(each, ids, tokens))
    pairs = list(zip(turns[model][1:], turns[source][1:]))
    return {
        "parameters": sum(part.numel() for part in loaded[model].parameters()),
        "cache_bytes": pairs[0][0]["cache_bytes"],
        "tokens_per_second": statistics.median(own["tokens_per_second"] for own, _ in pairs),
        "decode_speedup": statistics.median(own["tokens_per_second"] / other["tokens_per_second"] for own, other in pairs),
        "prefill_speedup": statistics.median(other["prefill_seconds"] / own["prefill_seconds"] for own, other in pairs),
    }


def _turn(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    plan = plan_of(model.config)
    if plan is not None:
        return read_and_write(model, ids, tokens, SpanCache(plan, model.config))
    plain = read_and_write(model, ids, tokens, DynamicCache(config=model.config))
    whole = SpanPlan.same(SpanRule(0, 1.0), model.config)
    apply_plan(model, whole)
    own = read_and_write(model, ids, tokens, SpanCache(whole, model.config))
    remove_plan(model)
    return {
        "prefill_seconds": min(plain["prefill_seconds"], own["prefill_seconds"]),
        "tokens_per_second": max(plain["tokens_per_second"], own["tokens_per_second"]),
        "cache_bytes": plain["cache_bytes"],
    }


@needs_links()
def two_ranks(*, seed: int, pruned: bool, link: str, ranks: int, steps: int, fit: str, folder: str) -> dict[str, float]:
    """Distil a model on ranks whose gradients go over a slow link.

    Args:
        seed: Of the order of the data.
        pruned: Prune the gradients; else all of them are sent.
        link: A key of ``gradient_pruning.measure.LINKS``.
        ranks: Number of ranks.
        steps: Optimizer steps, 4 or more.
        fit: More options for ``fit -c compose/two_ranks``, each beginning with ``--``.
        folder: Where the trained model goes.

    Returns:
        ``step_seconds``, and ``sent_bytes``, what a rank sends, headers and all: medians of the steps behind the warm-up.

    Raises:
        InputError: If no step is behind the warm-up.
    """
    if steps < 4:
        raise InputError(f"steps={steps}: the first three are not counted. Legal: 4 or more.")
    callbacks: list[dict[str, Any]] = [{"class_path": _EXPORT, "init_args": {"folder": folder, "dtype": "float32"}}]
    if pruned:
        settings = {"policy": {"class_path": "Adaptive"}, "warmup": 2}
        callbacks.append({"class_path": PRUNING, "init_args": settings})
    log = train_over_link("compose/two_ranks", callbacks, link, ranks, steps, seed, re.split(r"\s+(?=--)", fit.strip()))
    seconds = [step["seconds"] for step in log["steps"][3:]]
    sent = [after["sent_bytes"] - before["sent_bytes"] for before, after in pairwise(log["steps"])][2:]
    return {"step_seconds": statistics.median(seconds), "sent_bytes": statistics.median(sent)}


def offsite(*, emulator: str | None = None, **settings: Any) -> dict[str, Any]:
    """Tune a prefix on an emulator and plug it into the whole model.

    Args:
        emulator: Folder of the emulator; None measures the whole model without a prefix.
        settings: As for ``offsite.measure.rung``.

    Returns:
        ``accuracy`` of the whole model with the prefix; ``parameters`` of the emulator; ``fetched_bytes``, its files. And the
        emulator's hash.
    """
    found = rung(emulator=emulator or "", kind="plug-in" if emulator else "zero", **settings)
    if emulator is None:
        return {"metrics": {"accuracy": found["accuracy"]}}
    files = sum(file.stat().st_size for file in Path(emulator).iterdir() if file.is_file())
    parameters, fingerprint = _size_and_hash(emulator)
    figures = {"accuracy": found["accuracy"], "parameters": parameters, "fetched_bytes": files}
    return {"metrics": figures, "models": {"emulator": fingerprint}}


def tasks(*, source: str, names: str, **course: Any) -> dict[str, Any]:
    """Train a model on several tasks by feature-level weighting.

    Args:
        source: The trunk.
        names: Names of the tasks, with commas.
        course: As for ``multitask.measure.Course``.

    Returns:
        ``accuracy``, the mean over the tasks' test rows; ``parameters`` of the trunk, with its head. And ``tokens`` of the
        training, and the trunk's hash.
    """
    own = Course(source, tasks=names, **course)
    found = own.run(own.names, "features")
    accuracy = statistics.fmean(found[f"test_{name}"] for name in own.names)
    parameters, fingerprint = _size_and_hash(source)
    figures = {"accuracy": accuracy, "parameters": parameters}
    return {"metrics": figures, "cost": {"tokens": found["tokens"]}, "models": {"trunk": fingerprint}}


def _size_and_hash(source: str) -> tuple[int, str]:
    model = load_model(source, "bfloat16")
    return sum(part.numel() for part in model.parameters()), model_fingerprint(model)
