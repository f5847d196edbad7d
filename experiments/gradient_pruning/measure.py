"""Training over shaped links: what ``benchmark gradient_pruning`` measures."""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import write_json
from ..netlab import NetLab, needs_links
from .baselines import read_log

PRUNING = "fulgurite.callbacks.GradientPruning"
_HOOK = "fulgurite.experiments.gradient_pruning.baselines.CompressionHook"
_LOG = "fulgurite.experiments.gradient_pruning.baselines.StepLog"


WARMUP = 7  # steps without pruning, of 150
# Small buckets let the exchange begin early in the backward pass; PowerSGD works with one large one alone on gloo.
_BUCKET_MB = {"powersgd-1": 25, "powersgd-4": 25}


def _pruning(policy: str, **settings: Any) -> dict[str, Any]:
    own = {"warmup": WARMUP, **{name: settings.pop(name) for name in ("error_feedback", "warmup") if name in settings}}
    return {"class_path": PRUNING, "init_args": {"policy": {"class_path": policy, "init_args": settings}, **own}}


# Each method is one callback, or none.
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "no-exchange": {"class_path": _HOOK, "init_args": {"kind": "none"}},
    "float16": {"class_path": _HOOK, "init_args": {"kind": "float16"}},
    "powersgd-1": {"class_path": _HOOK, "init_args": {"kind": "powersgd", "rank": 1}},
    "powersgd-4": {"class_path": _HOOK, "init_args": {"kind": "powersgd", "rank": 4}},
    **{f"fixed-{rate}": _pruning("FixedRate", rate=rate) for rate in (0.2, 0.5, 0.75, 0.9, 0.96, 0.99, 0.996)},
    "fixed-0.99-no-feedback": _pruning("FixedRate", rate=0.99, error_feedback=False),
    "ramp-0.99": _pruning("FixedRate", rate=0.99, ramp_steps=30, warmup=0.0),
    "published": _pruning("PublishedRule", window=30),
    "adaptive": _pruning("Adaptive"),
}


def _flap(lab: NetLab, turn: int) -> None:
    lab.set_rate(("200mbit", "20mbit")[turn % 2])


def _outage(lab: NetLab, turn: int) -> None:
    # Of every ten seconds, one without network.
    if turn % 10 == 5:
        lab.cut(1)
    elif turn % 10 == 6:
        lab.restore(1)


# link: (rate at the start, what is done to it, every how many seconds)
LINKS: dict[str, tuple[str, Callable[[NetLab, int], None] | None, float]] = {
    "1gbit": ("1gbit", None, 0),
    "100mbit": ("100mbit", None, 0),
    "20mbit": ("20mbit", None, 0),
    "flapping": ("200mbit", _flap, 10.0),
    "outages": ("100mbit", _outage, 1.0),
}


def run_training(method: str, link: str | None, *, ranks: int, steps: int, seed: int, options: list[str]) -> dict[str, Any]:
    """Train with a method over a link and return its log.

    Args:
        method: One of ``METHODS``.
        link: One of ``LINKS``; None trains over the loopback of this machine, unshaped.
        ranks: Number of ranks.
        steps: Optimizer steps.
        seed: Seed of weights and order.
        options: More words for ``fit``.

    Raises:
        InputError: If a name is unknown, or no network can be made here.
        RuntimeError: If a rank fails; the message has the end of its output.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown. Legal: {', '.join(METHODS)}.")
    if link is not None and link not in LINKS:
        raise InputError(f"link={link!r} is unknown. Legal: {', '.join(LINKS)}.")
    callback = METHODS[method]
    callbacks = [callback] if callback else []
    bucket = _BUCKET_MB.get(method, 4)
    return train_over_link("gradient_pruning/train", callbacks, link, ranks, steps, seed, options, bucket_mb=bucket)


def train_over_link(
    config: str,
    callbacks: list[dict[str, Any]],
    link: str | None,
    ranks: int,
    steps: int,
    seed: int,
    options: list[str],
    *,
    bucket_mb: int = 4,
) -> dict[str, Any]:
    """Run ``fit`` on ranks of this machine, each in its namespace of the network, and return its log.

    Args:
        config: Packaged config of ``fit``.
        callbacks: All of the run's callbacks.
        link: One of ``LINKS``, or None.
        ranks: Number of ranks.
        steps: Optimizer steps.
        seed: Seed of weights and order.
        options: More words for ``fit``.
        bucket_mb: Size of DDP's buckets.

    Returns:
        What a ``StepLog`` wrote, and ``sent_bytes``: what the last rank sent in all, headers included.

    Raises:
        InputError: If no network can be made here.
        RuntimeError: If a rank fails; the message has the end of its output.
    """
    folder = Path(tempfile.mkdtemp(prefix="fulgurite-link-"))
    try:
        log = folder / "log.json"
        callbacks = [*callbacks, {"class_path": _LOG, "init_args": {"file": str(log)}}]
        words = ["fit", "-c", config, f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]
        strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "dict_kwargs": {"bucket_cap_mb": bucket_mb}}
        words += [f"--trainer.num_nodes={ranks}", "--trainer.devices=1", "--trainer.accelerator=cpu"]
        words += [f"--trainer.strategy={json.dumps(strategy)}"]
        words += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        words += ["--trainer.enable_checkpointing=false", f"--trainer.callbacks={json.dumps(callbacks)}", "--run=link", *options]
        script = folder / "rank.py"
        script.write_text(
            f"import json, sys\nsys.path[:0] = {sys.path!r}\nif __name__ == '__main__':\n"
            f"    from fulgurite.experiments.main import main\n    main(json.loads({json.dumps(json.dumps(words))}))\n"
        )
        sent = _run_ranks(script, link, ranks, folder)
        return {**read_log(log), "sent_bytes": sent}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_ranks(script: Path, link: str | None, ranks: int, folder: Path) -> int:
    rate, act, every = LINKS[link] if link else ("10gbit", None, 0)
    with NetLab(ranks, rate) as lab:
        processes = [
            lab.start(rank, [sys.executable, str(script)], folder=folder, log=folder / f"{rank}.txt") for rank in range(ranks)
        ]
        with lab.changing(act, every) if act else nullcontext():
            codes = [process.wait() for process in processes]
        sent = lab.sent_bytes(ranks - 1)
    ends = {rank: (folder / f"{rank}.txt").read_text()[-1500:] for rank, code in enumerate(codes) if code}
    if ends:  # the others end for one that does
        first = next((rank for rank, text in ends.items() if "exchange of gradients failed" not in text), min(ends))
        raise RuntimeError(f"rank {first} ended with exit code {codes[first]}: {ends[first]}")
    return sent


def steps_to(target: float, validations: list[dict[str, float]], key: str = "step") -> float | None:
    """Return the step, or the seconds, at which the validation loss first reaches a target, on straight lines between points.

    Args:
        target: Loss in nats per token.
        validations: Points of a ``StepLog``.
        key: ``step`` or ``at``.
    """
    for before, after in pairwise(validations):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return before[key] + max(0.0, share) * (after[key] - before[key])
    return None


@needs_links()
def curve(*, method: str, seeds: str, steps: int, out: str, ranks: int, fit: str) -> dict[str, float]:
    """Take the loss curves of a method whose numbers do not depend on the link, once for all links.

    Args:
        method: One of ``METHODS``.
        seeds: Seeds, separated by commas.
        steps: Optimizer steps.
        out: File for the curves.
        ranks: Number of ranks.
        fit: Words for ``fit`` that name model and data, separated by spaces.

    Returns:
        The mean loss at the end.
    """
    options = fit.split()
    curves = [
        run_training(method, None, ranks=ranks, steps=steps, seed=number, options=options)["validations"]
        for number in map(int, str(seeds).split(","))
    ]
    write_json(Path(out), curves)
    return {"final_loss": statistics.fmean(points[-1]["loss"] for points in curves)}


@needs_links()
def overlay(
    *, seed: int, method: str, link: str, curves: str, steps: int, target: float, ranks: int, fit: str
) -> dict[str, float]:
    """Lay curves that were taken once over the step times on a link.

    Args:
        seed: Seed of the timed run.
        method: One of ``METHODS`` whose numbers do not depend on the link.
        link: One of ``LINKS`` that does not change.
        curves: File of ``curve``.
        steps: Steps that are timed.
        target: Validation loss to reach.
        ranks: Number of ranks.
        fit: As in ``curve``.

    Raises:
        InputError: If the link changes while it runs.
    """
    if link in LINKS and LINKS[link][1]:
        steady = ", ".join(name for name, (_, act, _) in LINKS.items() if not act)
        raise InputError(
            f"link={link!r} changes while it runs: the times of some steps say nothing of the others. Legal: {steady}. Or run "
            "the method whole: function ``whole``."
        )
    log = run_training(method, link, ranks=ranks, steps=steps, seed=seed, options=fit.split())
    # The first steps of some methods are dense; each part of the run has its own pace.
    times = [step["seconds"] for step in log["steps"][1:]]
    warm, rest = statistics.fmean(times[: WARMUP - 1]), statistics.median(times[WARMUP:])
    taken = json.loads(Path(curves).read_text("utf-8"))
    reached = [steps_to(target, points) for points in taken]
    seconds = [warm * min(step, WARMUP) + rest * max(0.0, step - WARMUP) for step in reached if step is not None]
    figures = {"final_loss": statistics.fmean(points[-1]["loss"] for points in taken), **_pace(log)}
    if len(seconds) == len(reached):
        figures["seconds_to_target"] = statistics.fmean(seconds)
        figures["steps_to_target"] = statistics.fmean(step for step in reached if step is not None)
    return figures


@needs_links()
def whole(*, seed: int, method: str, link: str, steps: int, target: float, ranks: int, fit: str) -> dict[str, Any]:
    """Run a method whole over a link, as one that adapts has to be.

    Args:
        seed: Seed of the run.
        method: One of ``METHODS``.
        link: One of ``LINKS``.
        steps: Optimizer steps.
        target: Validation loss to reach.
        ranks: Number of ranks.
        fit: As in ``curve``.

    Returns:
        Figures, and the curves of rate, step time and bandwidth over the seconds of the run.
    """
    log = run_training(method, link, ranks=ranks, steps=steps, seed=seed, options=fit.split())
    figures = {"final_loss": log["validations"][-1]["loss"], **_pace(log)}
    seconds = steps_to(target, log["validations"], "at")
    if seconds is not None:
        figures["seconds_to_target"] = seconds
        figures["steps_to_target"] = steps_to(target, log["validations"]) or 0.0
    curves = {
        name: [[step["at"], step[name]] for step in log["steps"] if name in step]
        for name in ("seconds", "prune_rate", "bandwidth_mbit")
    }
    curves["val_loss"] = [[point["at"], point["loss"]] for point in log["validations"]]
    return {"metrics": figures, "curves": curves}


@needs_links()
def packing(*, seed: int, method: str, steps: int, ranks: int, fit: str) -> dict[str, float]:
    """Measure what selecting, packing, unpacking and summing take of a step that only computes.

    Args:
        seed: Seed of both runs.
        method: One of ``METHODS`` that prunes.
        steps: Optimizer steps.
        ranks: Number of ranks.
        fit: As in ``curve``.
    """
    settings: dict[str, Any] = {"ranks": ranks, "steps": steps, "seed": seed, "options": fit.split()}
    plain = run_training("no-exchange", None, **settings)["steps"][WARMUP:]
    packed = run_training(method, None, **settings)["steps"][WARMUP + 1 :]
    compute = statistics.median(step["seconds"] for step in plain)
    seconds = statistics.median(step["packing_seconds"] for step in packed)
    return {"compute_seconds": compute, "packing_seconds": seconds, "packing_share": seconds / compute}


def _pace(log: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the median step and, where it was logged, the share of it that was spent waiting."""
    steps = log["steps"][WARMUP:]
    figures = {"step_seconds": statistics.median(step["seconds"] for step in steps)}
    waits = [step["exposed_seconds"] / step["seconds"] for step in steps if "exposed_seconds" in step]
    return {**figures, "waiting": statistics.median(waits)} if waits else figures
