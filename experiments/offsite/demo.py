"""``fulgurite owner demo``: an owner and two parties as three processes, on the embedded model and task."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import InputError
from ...files import write_json
from ...modules.offsite import EmulatorManifest, Prefix
from ...modules.offsite.averaging import average_prefixes
from ...modules.offsite.certificates import make_certificates
from ...modules.pretrained import resolve_source
from ..threads import threads_each

PARTIES = ("north", "south")
log = logging.getLogger("fulgurite")
console = Console()


def demo(
    *,
    model: str = "package:smollm2-135m-instruct",
    text: str = "package:python-docs",
    task: str = "package:docstrings",
    candidates: list[str] = ["A", "B", "C", "D"],  # noqa: B006  (read only)
    layers: int = 20,
    cut: int = 4,
    rows: int = 400,
    val_rows: int = 100,
    emulator_steps: int = 20,
    tune_steps: int = 60,
    split_steps: int = 20,
    folder: str = "runs/owner-demo",
    seed: int = 0,
) -> None:
    """Tune a prefix for an owner's model with two parties' rows, and use it, all over the loopback network.

    The owner makes an emulator and serves its layers; each party, a process of its own, fetches the emulator, tunes a prefix on
    its rows, first on the emulator, then through the owner's layers. The mean of both prefixes is measured through the split.
    Every command is shown as a user would type it. What is done stays: killed and started again, the demo goes on.

    Args:
        model: The owner's model.
        text: Text that the emulator is distilled on.
        task: Rows of prompts and responses, one half for each party.
        candidates: The responses to choose from.
        layers: Of the emulator.
        cut: First layer that stays with the owner.
        rows: Of the task to train on.
        val_rows: Of the task to measure on.
        emulator_steps: Optimizer steps of the emulator's distillation.
        tune_steps: Of each party on the emulator.
        split_steps: Of each party through the owner's layers.
        folder: Where everything goes.
        seed: Of all orders.
    """
    begin, root = time.perf_counter(), Path(folder)
    resolve_source(model)
    if not 1 <= cut < layers:
        raise InputError(f"cut={cut}: legal are 1 to {layers - 1}, as the emulator has {layers} layers.")
    papers, emulator = root / "owner", root / "emulator" / "export"
    choices = json.dumps(candidates, ensure_ascii=False)
    if not (papers / "owner.crt").is_file():
        make_certificates(papers, hosts=["localhost"], parties=list(PARTIES))
    common = [f"--runs_folder={root.parent}", f"--experiment={root.name}", f"--seed_everything={seed}"]
    if not emulator.is_dir():
        words = ["fit", "-c", "offsite/emulator", f"--model.source={model}", f"--model.emulator.layers={layers}"]
        words += [f"--model.emulator.identical={cut}", f"--data.train={text}", f"--trainer.max_steps={emulator_steps}"]
        _run("owner", _gone_on([*words, *common, "--run=emulator"], root / "emulator"), root)
    test = [f"--data.train={task}", f"--data.train_rows={rows}", f"--data.val_rows={val_rows}", f"--model.candidates={choices}"]
    owner, address = _serve(model, emulator, papers, root)
    try:
        with ThreadPoolExecutor(len(PARTIES)) as pool:
            work = [
                pool.submit(_party, name, number, address, papers, root, [*test, *common], tune_steps, split_steps)
                for number, name in enumerate(PARTIES)
            ]
            prefixes = [one.result() for one in work]
        fingerprint = EmulatorManifest.load(emulator).model
        loaded = [Prefix.load(prefix, fingerprint) for prefix in prefixes]
        average_prefixes(loaded, [rows // 2] * len(loaded)).save(root / "prefix", fingerprint)
        rungs: dict[str, list[str]] = {
            "no prefix": ["--model.prefix=null"],
            "both parties' mean": [f"--model.start={root / 'prefix'}"],
        }
        for name, prefix in zip(PARTIES, prefixes):
            rungs[f"prefix of {name}"] = [f"--model.start={prefix}"]

        def measured(party: int) -> dict[str, float]:
            """Measure every other rung, one at a time."""
            reach, found = _reach(address, papers, PARTIES[party]), {}
            for number, (title, start) in list(enumerate(rungs.items()))[party :: len(PARTIES)]:
                words = ["validate", "-c", "offsite/split", f"--model.source={emulator}", *reach, *start, *test, *common]
                words += [f"--run=measure-{number}", "--trainer.callbacks=null"]
                found[title] = _accuracy(_run(PARTIES[party], words, root))
            return found

        with ThreadPoolExecutor(len(PARTIES)) as pool:
            found = ChainMap(*pool.map(measured, range(len(PARTIES))))
        figures = {title: found[title] for title in rungs}
    finally:
        owner.send_signal(signal.SIGTERM)
        owner.wait()
    write_json(root / "summary.json", {"accuracy": figures, "seconds": time.perf_counter() - begin})
    _show(figures, root, time.perf_counter() - begin)


def _serve(model: str, emulator: Path, papers: Path, root: Path) -> tuple[subprocess.Popen, str]:
    """Start the owner's process; return it and its address."""
    announced = root / "address.json"
    announced.unlink(missing_ok=True)
    words = ["owner", "serve", f"--model={model}", f"--emulator={emulator}", f"--certificate={papers / 'owner.crt'}"]
    words += [f"--key={papers / 'owner.key'}", f"--tokens={papers / 'tokens.json'}", "--address=localhost:0"]
    _tell("owner", words)
    with open(root / "owner.log", "a") as output:
        process = subprocess.Popen(_command([*words, f"--announce={announced}"]), stdout=output, stderr=output, env=_one_thread())
    while not announced.is_file():
        if process.poll() is not None:
            raise InputError(f"The owner's process ended at once; {root / 'owner.log'} says why.")
        time.sleep(0.1)
    return process, json.loads(announced.read_text())["address"]


def _party(
    name: str, number: int, address: str, papers: Path, root: Path, common: list[str], tune_steps: int, split_steps: int
) -> Path:
    """Do a party's work; return its prefix."""
    emulator = root / name / "emulator"
    if not emulator.is_dir():
        access = [f"--address={address}", f"--token={papers / name}.token", f"--certificate={papers / 'owner.crt'}"]
        _run(name, ["owner", "fetch", f"--folder={emulator}", *access], root)
    start = None
    share = [f"--data.party={number}", f"--data.parties={len(PARTIES)}", f"--model.source={emulator}", *common]
    for phase, steps in (("tune", tune_steps), ("split", split_steps)):
        run = f"{name}-{phase}"
        words = ["fit", "-c", f"offsite/{phase}", *share, f"--trainer.max_steps={steps}", f"--run={run}"]
        if phase == "split":
            words += [f"--model.start={start}", *_reach(address, papers, name)]
        start = root / run / "prefix"
        if not start.is_dir():
            _run(name, _gone_on(words, root / run), root)
    assert start is not None
    return start


def _gone_on(words: list[str], run: Path) -> list[str]:
    """Return a command that goes on where it was killed."""
    return [*words, "--ckpt_path=last"] if list(run.glob("checkpoints/*.ckpt")) else words


def _reach(address: str, papers: Path, name: str) -> list[str]:
    access = {"address": address, "token": f"{papers / name}.token", "certificate": papers / "owner.crt"}
    return [f"--model.owner.{key}={value}" for key, value in access.items()]


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-c", "from fulgurite.experiments.main import main; main()", *words]


def _one_thread() -> dict[str, str]:
    """Return an environment in which processes at work at the same time do not fight for cores."""
    return {**os.environ, **threads_each(len(PARTIES))}


def _tell(who: str, words: list[str]) -> None:
    console.print(f"[bold]{who}:[/bold] fulgurite {escape(shlex.join(words))}", highlight=False, soft_wrap=True)


def _run(who: str, words: list[str], root: Path) -> str:
    """Run a command as a process of its own; return what it printed."""
    _tell(who, words)
    begin = time.perf_counter()
    done = subprocess.run(_command(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_one_thread())
    console.print(f"{who}: {words[0]} took {time.perf_counter() - begin:.0f} s", highlight=False)
    with open(root / f"{who}.log", "a") as output:
        output.write(done.stdout)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"{who} failed with status {done.returncode}. The last line of {root / who}.log: {last}")
    return done.stdout


def _accuracy(printed: str) -> float:
    found = re.search(r"val_accuracy\W+([\d.]+)", re.sub(r"\x1b\[[\d;]*m", "", printed))
    assert found is not None, printed
    return float(found[1])


def _show(figures: dict[str, float], root: Path, seconds: float) -> None:
    table = Table(title="Right answers, through the split model")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    for title, accuracy in figures.items():
        table.add_row(title, f"{accuracy:.3f}")
    console.print(table)
    console.print(
        f"\nAll in {seconds / 60:.1f} minutes. The prefix of both parties is in {root}/prefix, logs are in {root}/*.log.",
        highlight=False,
        markup=False,
    )
