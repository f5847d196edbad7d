"""HumanEval (Chen et al., arXiv 2107.03374): share of functions that a model completes so that their tests pass."""

import gzip
import json
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ...modules.language_model import GenerationSettings
from .code_execution import run_code
from .generate import continue_text
from .templates import TEMPLATES

NAME = "humaneval"


def find_problems(folder: Path) -> Path:
    """Return the file of problems in a data folder, or in ``humaneval`` beside it.

    Raises:
        InputError: If there is none.
    """
    for place in (folder, folder.parent / NAME):
        for file in (place / "HumanEval.jsonl", place / "HumanEval.jsonl.gz"):
            if file.is_file():
                return file
    raise InputError(f"tasks: {NAME!r} needs HumanEval.jsonl or HumanEval.jsonl.gz in {folder}. Name its folder with --data.")


def human_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, limit: int | None, max_new_tokens: int = 256
) -> dict[str, float]:
    """Return ``humaneval.pass_at_1`` of greedy completions.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        file: Problems, one JSON object a line, maybe compressed.
        limit: Take the first problems only.
        max_new_tokens: Tokens of a completion at most.
    """
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    problems: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines() if line.strip()][:limit]
    passed, settings = 0, GenerationSettings(max_new_tokens=max_new_tokens)
    for problem in track(problems, description=NAME):
        text = continue_text(model, tokenizer, problem["prompt"], settings, ends=TEMPLATES["code"].ends)
        program = f"{problem['prompt']}{text}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
        good, _ = run_code(program)
        passed += good
    return {f"{NAME}.pass_at_1": passed / len(problems)}
