"""Run folders, and finding the checkpoint that a run goes on from. Imports nothing heavy."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, nearest

_BEGINNINGS = ("config*.yaml", "environment*.json", "hparams.yaml", "events.out.tfevents.*")
DEFAULTS = {"runs_folder": "runs", "experiment": "default"}


def new_run_name(folder: Path) -> str:
    """Make a folder for a run that was given no name, and return its name: the time, which sorts.

    A second later, where another run has it; the folder is made at once, so that no run takes the same.
    """
    while True:
        name = time.strftime("%Y-%m-%dT%H-%M-%S")
        try:
            (folder / name).mkdir(parents=True)
            return name
        except FileExistsError:
            time.sleep(0.1)


def flag_values(words: list[str], *flags: str) -> Iterator[tuple[int, str]]:
    """Yield the place and the value of every ``--flag value`` and ``--flag=value`` among the words of a command line."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags and equals:
            yield place, value
        elif word in flags and place + 1 < len(words):
            yield place, words[place + 1]


def setting(words: list[str], name: str) -> Any:
    """Return a top-level setting of a command line: the last flag, else the last config that has it, else the default."""
    value = DEFAULTS.get(name)
    for _, config in flag_values(words, "-c", "--config"):
        content = yaml.safe_load(Path(config).read_text("utf-8")) or {}
        if isinstance(content, dict) and content.get(name) is not None:
            value = content[name]
    for _, flag in flag_values(words, f"--{name}"):
        value = flag
    return value


def holds_run(folder: Path) -> bool:
    """Return whether a run's folder holds more than what every start of a run writes: the config, the log."""
    return any(file.is_file() and not any(map(file.match, _BEGINNINGS)) for file in folder.rglob("*"))


def resolve_last(words: list[str]) -> list[str]:
    """Replace ``--ckpt_path last`` by the newest checkpoint of a run, and continue that run's folder.

    The run is that of ``--run``, else the newest of the experiment that has a checkpoint. Without ``-c`` the config is the
    one that the run saved.

    Args:
        words: Words of the command line, configs already resolved to files.

    Raises:
        InputError: If there is no such run, or it has no checkpoint.
    """
    places = [place for place, value in flag_values(words, "--ckpt_path") if value == "last"]
    if not places:
        return words
    experiment = Path(setting(words, "runs_folder")) / setting(words, "experiment")
    name = setting(words, "run")
    if name is not None:
        folders = [experiment / name]
        if not folders[0].is_dir():
            existing = sorted(path.name for path in experiment.glob("*/") if path.is_dir())
            raise InputError(f"--run {name!r} is no run of {experiment}.{nearest(name, existing or ['(none there)'])}")
    else:
        folders = [path for path in experiment.glob("*/") if path.is_dir()]
    found = [file for folder in folders for file in (folder / "checkpoints").glob("*.ckpt")]
    if not found:
        raise InputError(
            f"--ckpt_path last: there is no checkpoint in {experiment / name if name else experiment}. "
            + ("Start a run anew, under another name." if name else "Name the run with --experiment and --run.")
        )
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    folder = newest.parent.parent
    words = list(words)
    for place in places:
        if "=" in words[place]:
            words[place] = f"--ckpt_path={newest}"
        else:
            words[place + 1] = str(newest)
    if not list(flag_values(words, "--run")):
        words += ["--run", folder.name]
    if not list(flag_values(words, "-c", "--config")):
        words[1:1] = ["-c", str(folder / "config.yaml")]
    return words
