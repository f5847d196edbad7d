"""``fulgurite demo``: the main job, end to end, on the embedded model and text.

A teacher's soft labels are captured into a store; a student that keeps 22 of its 30 layers is trained twice on the same
tokens, once on hard labels and once half and half with the stored ones; both are compared with the teacher.
"""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..callbacks import SoftLabelWriter
from ..datamodules.soft_labels import SoftLabelStore
from ..errors import InputError
from ..files import write_json
from ..modules.language_model import GenerationSettings
from ..modules.precision import frozen_dtype
from ..modules.pretrained import load_model, load_tokenizer
from .cli import quiet, run
from .distillation.compare import Comparison, compare
from .environment import environment
from .evaluation.generate import continue_text
from .parsing import Parser

STUDENTS = {"hard": ("hard labels", 0.0), "half": ("half soft labels", 0.5)}
PROMPT = "Return a new array of given shape and type,"

log = logging.getLogger("fulgurite")
console = Console()


def demo(
    *,
    source: str = "package:smollm2-135m-instruct",
    text: str = "package:python-docs",
    layers: int = 22,
    train_tokens: int = 40960,
    val_tokens: int = 8192,
    block_size: int = 512,
    folder: str = "runs/demo",
    seed: int = 0,
) -> None:
    """Distil a small model from stored soft labels, and compare it with one trained on hard labels alone.

    Killed and started again, it goes on where it was.

    Args:
        source: The teacher, of which the students are made.
        text: Text to train and to validate on.
        layers: Layers that the students keep, chosen by block influence.
        train_tokens: Tokens to capture and to train on.
        val_tokens: Tokens of held-out text for the figures.
        block_size: Tokens in a block.
        folder: Where everything goes.
        seed: Seed of the training order.
    """
    begin = time.perf_counter()
    root = Path(folder)
    _remember(root, {name: value for name, value in locals().items() if name not in ("begin", "root", "folder")})
    data = [f"--data.train={text}", f"--data.train_tokens={train_tokens}", f"--data.val_tokens={val_tokens}"]
    data += [f"--data.block_size={block_size}"]
    common = ["--runs_folder", str(root.parent), "--experiment", root.name, f"--seed_everything={seed}"]
    common += ["--trainer.enable_model_summary=false"]

    _step(f"1. {source} labels {train_tokens:,} tokens of {text}")
    capture = _capture(root, source, data, common)
    store = root / "labels"

    exports = {}
    seconds: dict[str, float] = {}
    for number, (name, (row, weight)) in enumerate(STUDENTS.items(), 2):
        _step(f"{number}. {row}: {layers} layers, the same tokens")
        exports[name], seconds[name] = _train(root, name, weight, source, layers, store, common)

    _step("4. Both are compared with the teacher on held-out text")
    held_out = [f"--data.train={text}", f"--data.val_tokens={val_tokens}", f"--data.block_size={block_size}"]
    figures = {name: compare(str(export), source, held_out, root / "compare", name) for name, export in exports.items()}
    figures["teacher"] = compare(source, source, held_out, root / "compare", "teacher")
    shutil.rmtree(root / "export", ignore_errors=True)
    shutil.copytree(exports["half"], root / "export")

    samples = {name: _sample(where) for name, where in {"teacher": source, **{n: str(e) for n, e in exports.items()}}.items()}
    summary = {
        "figures": {name: vars(figure) for name, figure in figures.items()},
        "parameters": {name: samples[name][1] for name in samples},
        "samples": {"prompt": PROMPT, **{name: text for name, (text, _) in samples.items()}},
        "labels": {**SoftLabelStore(store).stats().summary(), **capture},
        "train_tokens": train_tokens,
        "train_tokens_per_second": {name: train_tokens / seconds[name] for name in seconds},
        "train_seconds": seconds,
        "seconds": time.perf_counter() - begin,
        "environment": environment(seed=seed),
    }
    write_json(root / "summary.json", summary)
    _show(root, summary)


def _remember(root: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a first start; refuse to mix products of others into this one."""
    noted = root / "demo.json"
    if not noted.is_file():
        write_json(noted, settings)
    before = json.loads(noted.read_text())
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise InputError(f"folder={str(root)!r} holds a demo with other settings ({'; '.join(changed)}). Give another folder.")


def _step(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def _capture(root: Path, source: str, data: list[str], common: list[str]) -> dict[str, float]:
    noted = root / "capture.json"
    words = ["predict", "-c", "distillation/capture", "--model.source", source, *data, *common]
    cli = run([*words, f"--trainer.callbacks.store={root / 'labels'}", "--run", "capture"])
    found = cli.trainer.callbacks  # type: ignore[attr-defined]
    captured = next(callback for callback in found if isinstance(callback, SoftLabelWriter)).captured_tokens
    if not noted.is_file() and captured:
        seconds = cli.token_rate.seconds
        write_json(noted, {"capture_seconds": seconds, "capture_tokens_per_second": captured / seconds})
    return json.loads(noted.read_text()) if noted.is_file() else {}


def _train(root: Path, name: str, weight: float, source: str, layers: int, store: Path, common: list[str]) -> tuple[Path, float]:
    folder = root / name
    noted = folder / "trained.json"
    words = ["fit", "-c", "distillation/student", "--model.source", source, f"--model.student.keep_layers.count={layers}"]
    words += [f"--model.soft_weight={weight}", f"--data.store={store}", "--data.val_fraction=0", *common, "--run", name]
    words += ["--trainer.callbacks=[{class_path: NewestCheckpoint, init_args: {every_n_train_steps: 20}}, ExportPretrained]"]
    if not noted.is_file():
        if list(folder.glob("checkpoints/*.ckpt")):
            words.append("--ckpt_path=last")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint
        cli = run(words)
        write_json(noted, {"seconds": cli.token_rate.seconds, "tokens": cli.token_rate.tokens})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "export", json.loads(noted.read_text())["seconds"]


def _sample(source: str) -> tuple[str, int]:
    model, tokenizer = load_model(source, frozen_dtype("auto")), load_tokenizer(source)
    text = continue_text(model, tokenizer, PROMPT, GenerationSettings(max_new_tokens=40))
    return text, sum(parameter.numel() for parameter in model.parameters())


def _show(root: Path, summary: dict[str, Any]) -> None:
    labels = summary["labels"]
    table = Table(
        title="On held-out text",
        caption="loss in nats per token; KL to the teacher in nats; top-1: share of tokens with the teacher's first choice; "
        "tok/s and sec: training",
    )
    table.add_column("")
    columns = ("params", "loss", "ppl", "KL", "top-1", "tok/s", "sec")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in (("teacher", "teacher"), *((name, row) for name, (row, _) in STUDENTS.items())):
        figures = Comparison(**summary["figures"][name])
        trained = [f"{summary[key][name]:,.0f}" for key in ("train_tokens_per_second", "train_seconds") if name in summary[key]]
        table.add_row(
            row,
            f"{summary['parameters'][name] / 1e6:.1f} M",
            f"{figures.loss:.3f}",
            f"{figures.perplexity:.1f}",
            f"{figures.kl:.3f}",
            f"{figures.agreement:.3f}",
            *(trained or ["", ""]),
        )
    console.print(table)
    console.print(
        f"Soft labels: {labels['bytes_per_labelled_token']:.0f} bytes per token, {labels['labels_per_token']['mean']:.0f} labels "
        f"with {labels['mass_kept']['mean']:.1%} of the teacher's mass, captured at "
        f"{labels.get('capture_tokens_per_second', 0):,.0f} tokens per second."
    )
    console.print(f"\n[bold]{PROMPT}[/bold]")
    for name in ("teacher", *STUDENTS):
        console.print(f"[bold]{name}:[/bold]", escape(summary["samples"][name].strip().replace("\n", " ")), highlight=False)
    console.print(
        f"\nAll in {summary['seconds'] / 60:.1f} minutes. The smaller model is in {root}/export, the figures in "
        f"{root}/summary.json, the labels in {root}/labels.\n\nNext:\n"
        f"  .venv/bin/fulgurite generate --model {root}/export --prompt 'def read_file('\n"
        f"  .venv/bin/fulgurite labels stats {root}/labels\n"
        f"  .venv/bin/tensorboard --logdir {root}\n"
        "  .venv/bin/fulgurite fit --help\n",
        highlight=False,
        markup=False,
    )


def main(arguments: list[str]) -> None:
    """Run the demo with the words of a command line."""
    quiet()
    auto_cli(demo, args=arguments, prog="fulgurite demo", as_positional=False, parser_class=Parser)
