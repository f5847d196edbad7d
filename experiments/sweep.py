"""``fulgurite sweep``: a search by Optuna over settings of the command line (extra ``sweep``).

A trial is an ordinary run with some settings chosen by the study. Several processes and machines may work on one study: they
meet in its storage, a journal file unless another is named.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from ..errors import InputError, nearest
from .cli import parse, quiet
from .configs import resolve_config
from .parsing import Parser
from .study import Choice, Range, Study, console, optuna, setting_word
from .threads import threads_each


def sweep(
    name: str,
    fit: list[str],
    space: dict[str, Range | list[Choice]],
    *,
    metric: str = "val_loss",
    direction: Literal["minimize", "maximize"] = "minimize",
    trials: int = 20,
    sampler: str = "TPESampler",
    sampler_args: dict[str, Any] | None = None,
    pruner: str = "NopPruner",
    pruner_args: dict[str, Any] | None = None,
    storage: str | None = None,
    seed: int = 0,
    workers: int = 1,
    folder: str = "runs/sweeps",
) -> None:
    """Search for good settings of ``fulgurite fit``. Stopped or killed, the same command goes on.

    Args:
        name: Name of the study and of its folder.
        fit: Words of the command line behind ``fit`` that all trials share: ``[-c, distillation/student, --data.store=labels]``.
        space: What to choose: {dotted key of the command line: a range (low, high, log, step, integer) or a list of choices}.
        metric: Logged figure to optimise, as it is when a trial ends.
        direction: ``minimize`` or ``maximize``.
        trials: Trials of the study in all, those of earlier starts and of other processes included.
        sampler: Class of ``optuna.samplers`` that chooses settings.
        sampler_args: Its arguments.
        pruner: Class of ``optuna.pruners`` that stops trials which do worse than others at the same step.
        pruner_args: Its arguments.
        storage: Where the study is kept: any URL of Optuna; null is a journal file in its folder, good for several processes and,
            on a shared disk, machines.
        seed: Seed of the sampler; the trials' own is ``--seed_everything`` in ``fit``.
        workers: Processes that work at the same time on this machine.
        folder: Folder of all sweeps.
    """
    if optuna is None:
        raise InputError("sweep needs the extra sweep: pip install 'fulgurite[sweep,report]'.")
    settings = {key: value for key, value in locals().items() if key not in ("workers", "seed", "trials", "folder", "storage")}
    if trials < 1 or workers < 1:
        raise InputError(f"trials={trials}, workers={workers}: legal is 1 or more of each.")
    words = ["fit", *fit]
    _check_space(words, space)
    place = Path(folder) / name
    work = Study(place, words, space, metric, trials)
    work.open(
        json.loads(json.dumps(settings, default=vars)),
        _maker(optuna.samplers, "sampler", sampler, sampler_args),
        _maker(optuna.pruners, "pruner", pruner, pruner_args),
        direction=direction,
        storage=storage,
        seed=seed,
    )
    helpers = [_helper(place / "sweep.json", trials, storage, seed, workers) for _ in range(workers - 1)]
    try:
        work.run()
        for helper in helpers:
            helper.wait()
        work.run()  # what a helper that was killed has left
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.")
        sys.exit(130)
    finally:
        for helper in helpers:
            helper.terminate()
    work.conclude()


def _helper(settings: Path, trials: int, storage: str | None, seed: int, workers: int) -> subprocess.Popen[bytes]:
    """Start another process that works on the same study."""
    words = ["sweep", "--config", str(settings), f"--folder={settings.parent.parent}", f"--trials={trials}", f"--seed={seed}"]
    words += [f"--storage={storage}"] if storage else []
    code = "import sys; from fulgurite.experiments.main import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *words], env={**os.environ, **threads_each(workers)})


def _check_space(words: list[str], space: dict[str, Range | list[Choice]]) -> None:
    """Refuse keys that the command line does not have, and values that it does not take, before anything is made."""
    if not space:
        raise InputError("space is empty. Give at least one dotted key of `fulgurite fit` with a range or a list of choices.")
    known = parse(words)  # the shared words by themselves are right
    for key, choices in space.items():
        if isinstance(choices, Range):
            choices.check(key)
            values: list[Any] = [int(choices.low), int(choices.high)] if choices.integer else [choices.low, choices.high]
        elif len(choices) < 2:
            raise InputError(f"space.{key}={choices!r} leaves nothing to choose. Give at least two values, or put it into fit.")
        else:
            values = list(choices)
        for value in values:
            try:
                parse([*words, setting_word(key, value)])
            except InputError as error:
                keys = [name.removesuffix(".class_path") for name in dict(known.items())]
                near = "" if key in keys else nearest(key, keys)
                raise InputError(f"space.{key}: fit does not take --{key}={value}.{near} ({error})") from None


def _maker(package: Any, what: str, name: str, arguments: dict[str, Any] | None) -> Any:
    legal = [key for key in package.__all__ if key.lower().endswith(what) and not key.startswith("Base")]
    if name not in legal:
        raise InputError(f"{what}={name!r} is unknown.{nearest(name, legal)}")

    # These walk through one order that all processes share.
    shared = name in ("GridSampler", "QMCSampler", "BruteForceSampler")
    first: list[int] = []

    def make(number: int | None) -> Any:
        kind = getattr(package, name)
        given = dict(arguments or {})
        if number is not None and "seed" in inspect.signature(kind).parameters:
            first.append(number)
            given.setdefault("seed", first[0] if shared else number)
        try:
            return kind(**given)
        except (TypeError, ValueError) as error:
            raise InputError(f"{what}_args={arguments!r} do not fit {name}: {error}") from error

    return make


def main(arguments: list[str]) -> None:
    """Run ``sweep`` with the words of a command line."""
    quiet()
    words = list(arguments)
    for place, word in enumerate(words):
        if word in ("-c", "--config") and place + 1 < len(words):
            words[place : place + 2] = ["--config", resolve_config(words[place + 1])]
    auto_cli(sweep, args=words, prog="fulgurite sweep", as_positional=False, parser_class=Parser)
