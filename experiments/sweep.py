"""``fulgurite sweep``: a search by Optuna over settings of the command line (extra ``sweep``).

A trial is an ordinary run with some settings chosen by the study. Several processes and machines may work on one study: they
meet in its storage, a journal file unless another is named.
"""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from ..errors import InputError, nearest
from ..files import write_atomic, write_json
from .benchmarks.plots import draw_bars, picture
from .cli import parse, quiet, run
from .configs import resolve_config
from .environment import environment

try:
    import optuna
except ImportError:  # an extra; the command says so
    optuna = None  # type: ignore[assignment]

console = Console()
Choice = str | int | float | bool
_INTERRUPTED = "interrupted"


@dataclass
class Range:
    """An interval of numbers to choose from.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Choose evenly on a logarithmic scale.
        step: Distance of neighbouring values; null for any value.
        integer: Choose whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    def check(self, key: str) -> None:
        """Raise an InputError if the interval is empty or its scale impossible."""
        if not self.low < self.high:
            raise InputError(f"space.{key}: low={self.low} is not below high={self.high}.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise InputError(f"space.{key}: a logarithmic scale needs low above 0 (here {self.low}) and no step.")

    def suggest(self, trial: "optuna.Trial", key: str) -> float | int:
        """Return a trial's value."""
        if self.integer:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)


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
        direction,
        _maker(optuna.samplers, "sampler", sampler, sampler_args),
        _maker(optuna.pruners, "pruner", pruner, pruner_args),
        storage,
        seed,
    )
    work.remember(json.loads(json.dumps(settings, default=vars)))
    helpers = [_helper(place / "sweep.json", trials, storage, seed) for _ in range(workers - 1)]
    try:
        work.run()
        for helper in helpers:
            helper.wait()
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.")
        sys.exit(130)
    finally:
        for helper in helpers:
            helper.terminate()
    work.conclude()


def _helper(settings: Path, trials: int, storage: str | None, seed: int) -> subprocess.Popen[bytes]:
    """Start another process that works on the same study."""
    words = ["sweep", "--config", str(settings), f"--folder={settings.parent.parent}", f"--trials={trials}", f"--seed={seed}"]
    words += [f"--storage={storage}"] if storage else []
    code = "import sys; from fulgurite.experiments.main import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *words])


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
                parse([*words, _word(key, value)])
            except InputError as error:
                keys = [name.removesuffix(".class_path") for name in dict(known.items())]
                near = "" if key in keys else nearest(key, keys)
                raise InputError(f"space.{key}: fit does not take --{key}={value}.{near} ({error})") from None


def _word(key: str, value: Any) -> str:
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _maker(package: Any, what: str, name: str, arguments: dict[str, Any] | None) -> Any:
    legal = [key for key in package.__all__ if key.lower().endswith(what) and not key.startswith("Base")]
    if name not in legal:
        raise InputError(f"{what}={name!r} is unknown.{nearest(name, legal)}")

    def make(**more: Any) -> Any:
        try:
            return getattr(package, name)(**{**more, **(arguments or {})})
        except (TypeError, ValueError) as error:
            if more:
                return make()  # it takes no seed
            raise InputError(f"{what}_args={arguments!r} do not fit {name}: {error}") from error

    return make


class Study:
    """A study's trials: running them until there are enough, and what they say together.

    Args:
        place: The study's folder; each trial is a run folder in it.
        words: Words of the command line that all trials share.
        space: What is chosen.
        metric: Logged figure to optimise.
        trials: Trials in all.
    """

    def __init__(self, place: Path, words: list[str], space: dict[str, Range | list[Choice]], metric: str, trials: int) -> None:
        self.place, self.words, self.space, self.metric, self.trials = place, words, space, metric, trials
        self.me = f"{socket.gethostname()}:{os.getpid()}"

    def open(
        self, direction: Literal["minimize", "maximize"], make_sampler: Any, make_pruner: Any, storage: str | None, seed: int
    ) -> None:
        """Open the study in its storage, and make it where it is not."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.make_sampler, self.seed = make_sampler, seed
        sampler, pruner = make_sampler(seed=seed), make_pruner()
        self.place.mkdir(parents=True, exist_ok=True)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        backend = storage or JournalStorage(JournalFileBackend(str(self.place / "journal.log")))
        try:
            self.study = optuna.create_study(
                study_name=self.place.name,
                storage=backend,
                sampler=sampler,
                pruner=pruner,
                direction=direction,
                load_if_exists=True,
            )
        except Exception as error:  # whatever the storage's own driver raises
            raise InputError(f"storage={storage!r} cannot be opened: {error}") from error

    def remember(self, settings: dict[str, Any]) -> None:
        """Note what is searched.

        Raises:
            InputError: If the study has trials of another search.
        """
        file = self.place / "sweep.json"
        before = json.loads(file.read_text("utf-8")) if file.is_file() else settings
        changed = [key for key, value in settings.items() if before.get(key) != value]
        if changed and any(trial.state.is_finished() and trial.value is not None for trial in self.study.trials):
            raise InputError(
                f"name={settings['name']!r}: {self.place} holds a study with another {', '.join(changed)}. Give another name."
            )
        write_json(file, settings)

    def run(self) -> None:
        """Run trials until the study has enough, those of other processes counted."""
        self._take_over()
        while self._claimed() < self.trials:
            # A sampler of its own for each trial: the same study twice chooses the same, and two processes do not.
            self.study.sampler = self.make_sampler(seed=self.seed + len(self.study.trials))
            self.study.optimize(self._objective, n_trials=1)

    def _claimed(self) -> int:
        """Return how many trials are done or under way; one that was interrupted is run again and not counted."""
        waiting = optuna.trial.TrialState.WAITING
        return sum(trial.state != waiting and _INTERRUPTED not in trial.user_attrs for trial in self.study.trials)

    def _take_over(self) -> None:
        """Queue again the trials of this machine's processes that were killed."""
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            host, _, pid = str(trial.user_attrs.get("process", "")).rpartition(":")
            if host == socket.gethostname() and not Path("/proc", pid).exists():
                self._give_back(trial.number, trial._trial_id, trial.params)
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _give_back(self, number: int, trial_id: int, params: dict[str, Any]) -> None:
        self.study._storage.set_trial_user_attr(trial_id, _INTERRUPTED, True)
        self.study.enqueue_trial(params, user_attrs={"again": number})

    def _objective(self, trial: "optuna.Trial") -> float:
        trial.set_user_attr("process", self.me)
        chosen = {
            key: choices.suggest(trial, key) if isinstance(choices, Range) else trial.suggest_categorical(key, choices)
            for key, choices in self.space.items()
        }
        name = f"trial-{trial.number:04d}"
        console.print(f"{name}: {', '.join(f'{key}={_shown(value)}' for key, value in chosen.items())}", highlight=False)
        words = [*self.words, *(_word(key, value) for key, value in chosen.items())]
        words += [f"--runs_folder={self.place.parent}", f"--experiment={self.place.name}", f"--run={name}"]
        trial.set_user_attr("folder", str(self.place / name))
        try:
            cli = run(words, callbacks=[_Watch(trial, self.metric)])
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
            self._give_back(trial.number, trial._trial_id, trial.params)
            raise KeyboardInterrupt from None
        except _Diverged as error:
            trial.set_user_attr("diverged", str(error))
            return math.nan
        except RuntimeError as error:  # such as: out of memory
            trial.set_user_attr("error", str(error)[:500])
            console.print(f"{name} failed: {error}", highlight=False, markup=False)
            return math.nan
        found = cli.trainer.callback_metrics
        if self.metric not in found:
            trial.set_user_attr(_INTERRUPTED, True)
            raise InputError(f"metric={self.metric!r} was not logged. Logged: {', '.join(sorted(found))}.")
        value = float(found[self.metric])
        if not math.isfinite(value):
            trial.set_user_attr("diverged", f"{self.metric}={value}")
            return math.nan
        return value

    def conclude(self) -> None:
        """Print the trials, best first; write them, the best config, and the importance of the settings."""
        counted = [trial for trial in self.study.trials if trial.state.is_finished() and _INTERRUPTED not in trial.user_attrs]
        done = [trial for trial in counted if trial.state == optuna.trial.TrialState.COMPLETE]
        sign = 1 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        done.sort(key=lambda trial: sign * (trial.value or 0.0))
        importances = self._importances(done)
        record = {
            "study": self.place.name,
            "metric": self.metric,
            "words": self.words,
            "trials": [_record(trial) for trial in [*done, *(trial for trial in counted if trial not in done)]],
            "importances": importances,
            "environment": environment(),
        }
        write_json(self.place / "trials.json", record)
        self._show(record)
        if done:
            best = self.place / "best.yaml"
            copyfile(self.place / f"trial-{done[0].number:04d}" / "config.yaml", best)
            console.print(f"Best config: {best}. Repeat it with: fulgurite fit -c {best} --run NAME")

    def _importances(self, done: list["optuna.trial.FrozenTrial"]) -> dict[str, float]:
        if len(done) < 4 or len({trial.value for trial in done}) < 2:
            return {}
        found = {key: float(value) for key, value in optuna.importance.get_param_importances(self.study).items()}
        for kind in ("png", "svg"):
            drawn = picture(
                lambda axes: draw_bars(axes, [*found], [*found.values()], "share of the variance that it explains"),
                f"What {self.metric} depends on",
                kind,
                1.2 + 0.4 * len(found),
            )
            write_atomic(self.place / f"importances.{kind}", drawn)
        return found

    def _show(self, record: dict[str, Any]) -> None:
        table = Table(title=f"{record['study']}: {self.metric}")
        short = [key.removeprefix("model.").removeprefix("data.").replace("init_args.", "") for key in self.space]
        for column in ("trial", self.metric, *short, "state"):
            table.add_column(column, justify="right")
        for trial in record["trials"]:
            value = "" if trial["value"] is None else f"{trial['value']:.4f}"
            chosen = [_shown(trial["settings"].get(key, "")) for key in self.space]
            table.add_row(str(trial["number"]), value, *chosen, trial["state"])
        console.print(table)
        for key, share in record["importances"].items():
            console.print(f"importance of {key}: {share:.2f}", highlight=False)


def _record(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    state = "diverged" if "diverged" in trial.user_attrs else trial.state.name.lower()
    seconds = trial.duration.total_seconds() if trial.duration else None
    value = trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None
    return {"number": trial.number, "state": state, "value": value, "settings": trial.params, "seconds": seconds}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Diverged(Exception):
    """The loss of a trial is not finite."""


class _Watch(Callback):
    """Ends a trial whose loss is not finite, and lets the pruner see each validation."""

    def __init__(self, trial: "optuna.Trial", metric: str) -> None:
        self.trial, self.metric = trial, metric

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and not torch.isfinite(loss).all():
            raise _Diverged(f"loss {float(loss)} at step {trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric."""
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        if math.isfinite(value):
            self.trial.report(value, trainer.global_step)
            if self.trial.should_prune():
                raise optuna.TrialPruned(f"at step {trainer.global_step}")


def main(arguments: list[str]) -> None:
    """Run ``sweep`` with the words of a command line."""
    quiet()
    words = list(arguments)
    for place, word in enumerate(words):
        if word in ("-c", "--config") and place + 1 < len(words):
            words[place : place + 2] = ["--config", resolve_config(words[place + 1])]
    auto_cli(sweep, args=words, prog="fulgurite sweep", as_positional=False)
