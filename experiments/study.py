"""A study of Optuna: trials that are runs of the command line, until there are enough, and what they say together."""

import fcntl
import json
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..files import write_atomic, write_json
from .benchmarks.plots import draw_bars, picture
from .cli import parse, run
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
        if self.step is not None and self.step <= 0:
            raise InputError(f"space.{key}: step={self.step} is no distance. Legal: above 0, or null for any value.")
        for name in ("low", "high", "step") if self.integer else ():
            if (number := getattr(self, name)) is not None and number != int(number):
                raise InputError(f"space.{key}: {name}={number} is not whole, but integer is true. Give whole numbers.")

    def suggest(self, trial: "optuna.Trial", key: str) -> float | int:
        """Return a trial's value."""
        if self.integer:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)


def setting_word(key: str, value: Any) -> str:
    """Return the word that sets a key on the command line."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


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

    def open(
        self,
        settings: dict[str, Any],
        make_sampler: Any,
        make_pruner: Any,
        *,
        direction: Literal["minimize", "maximize"],
        storage: str | None,
        seed: int,
    ) -> None:
        """Open the study in its storage, and make it where it is not.

        Args:
            settings: What is searched; kept in the study, so that no other search gets mixed into it.
            make_sampler: Returns a sampler for a seed.
            make_pruner: Returns a pruner.
            direction: ``minimize`` or ``maximize``.
            storage: URL of Optuna, or None for a journal file.
            seed: Seed of the first trial's sampler.

        Raises:
            InputError: If the storage cannot be opened, or the study has trials of another search.
        """
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.make_sampler, self.seed, self.exhausted = make_sampler, seed, False
        sampler, pruner = make_sampler(seed), make_pruner(None)
        self.place.mkdir(parents=True, exist_ok=True)
        backend: Any = storage or JournalStorage(JournalFileBackend(str(self.place / "journal.log")))
        name = self.place.name

        def create() -> "optuna.Study":
            return optuna.create_study(
                study_name=name, storage=backend, sampler=sampler, pruner=pruner, direction=direction, load_if_exists=True
            )

        try:
            with self._alone():
                self.study = create()
                before = self.study.user_attrs.get("settings", settings)
                changed = [key for key, value in settings.items() if before.get(key) != value]
                if changed and any(trial.value is not None for trial in self.study.get_trials(states=(_done(),))):
                    raise InputError(
                        f"name={name!r}: the study of that name searches with another {', '.join(changed)}. Give another name."
                    )
                if changed:  # nothing was found yet: a corrected sweep begins anew
                    optuna.delete_study(study_name=name, storage=backend)
                    self.study = create()
                self.study.set_user_attr("settings", settings)
        except InputError:
            raise
        except Exception as error:  # whatever the storage's own driver raises
            raise InputError(f"storage={storage!r} cannot be opened: {error}") from error
        write_json(self.place / "sweep.json", settings)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process of this folder look at the trials and change them at the same time."""
        with open(self.place / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def run(self) -> None:
        """Run trials until the study has enough, those of other processes counted."""
        while (trial := self._next()) is not None:
            try:
                self._tell(trial)
            finally:
                self._held.close()

    def _next(self) -> "optuna.Trial | None":
        """Return a trial to run, whose lock this process holds while it runs; None when the study has enough."""
        with self._alone():
            self._take_over()
            # Interrupted trials are run again, and not counted.
            counted = [t for t in self.study.trials if t.state != _waiting() and _INTERRUPTED not in t.user_attrs]
            if self.exhausted or len(counted) >= self.trials:
                return None
            # Each trial has a sampler of its own: the same study twice chooses the same, two processes do not choose the same.
            self.study.sampler = self.make_sampler(self.seed + len(self.study.trials))
            trial = self.study.ask()
            self._held = open(self._lock(trial.number), "w")  # noqa: SIM115  (held while the trial runs)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            trial.set_user_attr("host", socket.gethostname())
            return trial

    def _lock(self, number: int) -> Path:
        return self.place / f"trial-{number:04d}.lock"

    def _take_over(self) -> None:
        """Queue again the trials whose process is gone: their lock, in this folder, is free."""
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if (
                trial.user_attrs.get("host", socket.gethostname()) != socket.gethostname()
                and not self._lock(trial.number).is_file()
            ):
                continue  # of a machine that shares the storage and not the folder
            with open(self._lock(trial.number), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                self._give_back(trial.number, trial._trial_id, trial.params)
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _give_back(self, number: int, trial_id: int, params: dict[str, Any]) -> None:
        self.study._storage.set_trial_user_attr(trial_id, _INTERRUPTED, True)
        self.study.enqueue_trial(params, user_attrs={"again": number})

    def _tell(self, trial: "optuna.Trial") -> None:
        """Run a trial and record what came of it."""
        state = optuna.trial.TrialState
        try:
            self._end(trial, state.COMPLETE, self._value(trial))
        except optuna.TrialPruned:
            self._end(trial, state.PRUNED)
        except _Failed as error:
            trial.set_user_attr(error.kind, str(error)[:500])
            self._end(trial, state.FAIL)
        except BaseException:  # stopped by the keyboard, a full disk, wrong settings: it does not count
            with self._alone():
                self._give_back(trial.number, trial._trial_id, trial.params)
                self.study.tell(trial, state=state.FAIL)
            raise

    def _end(self, trial: "optuna.Trial", state: "optuna.trial.TrialState", value: float | None = None) -> None:
        try:
            self.study.tell(trial, value, state=state)
        except RuntimeError as error:  # how a sampler says that it has nothing left to try
            if "Study.stop" not in str(error):
                raise
            self.exhausted = True

    def _value(self, trial: "optuna.Trial") -> float:
        chosen = {
            key: choices.suggest(trial, key) if isinstance(choices, Range) else trial.suggest_categorical(key, choices)
            for key, choices in self.space.items()
        }
        name = f"trial-{trial.number:04d}"
        while (self.place / name).exists():  # of a study that began anew
            name += "-again"
        console.print(f"{name}: {', '.join(f'{key}={_shown(value)}' for key, value in chosen.items())}", highlight=False)
        words = [*self.words, *(setting_word(key, value) for key, value in chosen.items())]
        words += [f"--runs_folder={self.place.parent}", f"--experiment={self.place.name}", f"--run={name}"]
        trial.set_user_attr("folder", str(self.place / name))
        try:
            parse(words)
            found = run(words, callbacks=[_Watch(trial, self.metric)]).trainer.callback_metrics
        except SystemExit:  # Lightning ends the process when the keyboard stops it
            raise KeyboardInterrupt from None
        except _Failed:
            raise
        except (RuntimeError, InputError) as error:  # out of memory; settings that do not go together
            if isinstance(error, InputError) and not self.study.get_trials(states=(_done(),)):
                raise
            console.print(f"{name} failed: {error}", highlight=False, markup=False)
            raise _Failed(str(error), "error") from error
        if self.metric not in found:
            raise InputError(f"metric={self.metric!r} was not logged. Logged: {', '.join(sorted(found))}.")
        value = float(found[self.metric])
        if not math.isfinite(value):
            raise _Failed(f"{self.metric}={value}", "diverged")
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
            self._keep_best(done[0])
        if importances:
            self._draw(importances)

    def _keep_best(self, trial: "optuna.trial.FrozenTrial") -> None:
        best, config = self.place / "best.yaml", Path(trial.user_attrs.get("folder", "")) / "config.yaml"
        if not config.is_file():
            console.print(f"The best trial ran on {trial.user_attrs.get('host')}, in {trial.user_attrs.get('folder')}.")
            return
        copyfile(config, best)
        console.print(f"Best config: {best}. Repeat it with: fulgurite fit -c {best} --run NAME")

    def _importances(self, done: list["optuna.trial.FrozenTrial"]) -> dict[str, float]:
        if len(done) < 4 or len({trial.value for trial in done}) < 2:
            return {}
        found = optuna.importance.get_param_importances(self.study)
        return {key: float(value) for key, value in found.items()}

    def _draw(self, importances: dict[str, float]) -> None:
        keys, shares = [*importances], [*importances.values()]
        for kind in ("png", "svg"):
            drawn = picture(
                lambda axes: draw_bars(axes, keys, shares, "share of the variance that it explains"),
                f"What {self.metric} depends on",
                kind,
                1.2 + 0.4 * len(keys),
            )
            write_atomic(self.place / f"importances.{kind}", drawn)

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
    state = next((kind for kind in ("diverged", "error") if kind in trial.user_attrs), trial.state.name.lower())
    seconds = trial.duration.total_seconds() if trial.duration else None
    value = trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None
    return {"number": trial.number, "state": state, "value": value, "settings": trial.params, "seconds": seconds}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _done() -> "optuna.trial.TrialState":
    return optuna.trial.TrialState.COMPLETE


def _waiting() -> "optuna.trial.TrialState":
    return optuna.trial.TrialState.WAITING


class _Failed(Exception):
    """A trial that gives no value: ``diverged``, or an ``error``."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Watch(Callback):
    """Ends a trial whose loss is not finite, and lets the pruner see each validation."""

    def __init__(self, trial: "optuna.Trial", metric: str) -> None:
        self.trial, self.metric = trial, metric

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and not torch.isfinite(loss).all():
            raise _Failed(f"loss {float(loss)} at step {trainer.global_step}", "diverged")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric."""
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        if math.isfinite(value):
            self.trial.report(value, trainer.global_step)
            if self.trial.should_prune():
                raise optuna.TrialPruned(f"at step {trainer.global_step}")
