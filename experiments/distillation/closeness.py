"""Does half a teacher's stored labels bring a student closer to it than hard labels alone? One result file a cell.

    python -m fulgurite.experiments.distillation.closeness --train TEXT --test TEXT [--seeds 0,1,2]

Every cell trains a student of 22 of SmolLM2's 30 layers on the same tokens in the order of its seed, exports it, and compares
the exported model with its teacher on the full vocabulary over the test text. A cell that has a result is not run again.
"""

import json
import logging
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from ...files import write_json
from ..cli import quiet, run
from ..environment import environment
from .compare import Comparison, compare

log = logging.getLogger("fulgurite")

TEACHER = "package:smollm2-135m-instruct"
ROWS = {"hard": ("hard labels", 0.0), "half": ("hard and stored soft labels, half and half", 0.5)}


def closeness(
    train: str,
    test: str,
    *,
    seeds: str = "0,1,2",
    train_tokens: int = 36864,
    test_tokens: int = 32768,
    work: str = "runs/closeness",
    results: str = str(Path(__file__).parent / "results"),
) -> None:
    """Run all cells that have no result yet.

    Args:
        train: Text to train on.
        test: Text for the figures.
        seeds: Seeds of the training order, separated by commas.
        train_tokens: Tokens to train on.
        test_tokens: Tokens for the figures.
        work: Folder for runs and the store.
        results: Folder for the result files.
    """
    folder = Path(work)
    store = folder / "labels"
    text = [f"--data.train={train}", "--data.val_fraction=0", f"--data.train_tokens={train_tokens}"]
    held_out = [f"--data.train={test}", f"--data.val={test}", f"--data.val_tokens={test_tokens}"]
    quiet = ["--runs_folder", str(folder)]
    run(["predict", "-c", "distillation/capture", *text, f"--trainer.callbacks.store={store}", *quiet])
    for seed in map(int, seeds.split(",")):
        for key, (row, weight) in ROWS.items():
            result = Path(results) / f"closeness-{key}-{seed}.json"
            if result.is_file():
                log.info("%s is there already", result)
                continue
            name = f"{key}-{seed}"
            words = ["fit", "-c", "distillation/student", f"--data.store={store}", "--data.val_fraction=0", *quiet]
            words += [f"--model.soft_weight={weight}", f"--seed_everything={seed}", "--run", name]
            words += ["--trainer.callbacks=ExportPretrained", "--trainer.logger=false"]
            cli = run(words)
            export = folder / "distillation-student" / name / "export"
            figures = compare(str(export), TEACHER, held_out, folder / "compare", name)
            write_json(result, _result(row, seed, words, cli, figures, (train, test), train_tokens, test_tokens))


def _result(
    row: str,
    seed: int,
    words: list[str],
    cli: Any,
    figures: Comparison,
    texts: tuple[str, str],
    train_tokens: int,
    test_tokens: int,
) -> dict[str, Any]:
    rate = cli.token_rate
    config = json.loads(json.dumps(cli.config["fit"].as_dict(), default=str))
    del config["config"]  # where the packaged config lies on this machine
    return {
        "row": row,
        "seed": seed,
        "note": (
            f"Students of 22 of the 30 layers of SmolLM2-135M-Instruct, trained on {train_tokens:,} tokens of "
            f"{_title(texts[0])}, figures on {test_tokens:,} tokens of {_title(texts[1])}."
        ),
        "figures": {
            "loss (nats/token)": figures.loss,
            "perplexity": figures.perplexity,
            "KL to the teacher (nats)": figures.kl,
            "top-1 agreement": figures.agreement,
        },
        "cost": {"train_tokens": rate.tokens, "train_seconds": rate.seconds},
        "run": {"command": words, "config": config},
        "environment": environment(seed=seed, data=cli.datamodule.hashes(), command=words),
    }


def _title(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


if __name__ == "__main__":
    quiet()
    auto_cli(closeness, as_positional=False)
