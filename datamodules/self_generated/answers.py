"""Answers of a model to many prompts: written in batches of equal length, by several processes, and kept in the cache."""

import json
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress, track
from transformers import PreTrainedModel

from ...files import cache_folder, digest, write_json
from ...modules.linear_loss import linear_loss
from ...modules.pretrained import head_weight, model_identity
from ..packing import left_padded


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Args:
        ids: Tokens, the end of the turn included.
        cut: Whether the limit ended it, and not the model.
    """

    ids: tuple[int, ...]
    cut: bool


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are written.

    Args:
        max_tokens: Tokens of an answer at most.
        min_tokens: Tokens before which the model may not end it.
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the smallest set with this probability mass.
        batch_size: Prompts that are answered together.
        seed: Of the drawing.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 4
    seed: int = 0


class AnswerCache:
    """The answers of a model to some prompts: a file a process, a line a batch; a line that a kill cut off is written anew.

    Batches are the same however many processes write them and however often they are stopped, and so are the answers.

    Args:
        model: That answers; evaluation mode.
        prompts: Ids of every prompt.
        settings: How.
        ends: Ids that end an answer.
        pad: Id of the padding.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: AnswerSettings, ends: Sequence[int], pad: int
    ) -> None:
        self.model, self.prompts, self.settings, self.ends, self.pad = model, prompts, settings, list(ends), pad
        how = {} if model.generation_config is None else model.generation_config.to_diff_dict()
        how.pop("transformers_version", None)
        # Without these, the model's own settings or those of transformers would change the distribution; and a document's own
        # words are what an answer has to repeat.
        drawing = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
        self.drawing: dict[str, float] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **drawing}
        how |= self.drawing
        identity = [model_identity(model), how, asdict(settings), list(map(list, prompts)), self.ends, pad]
        self.folder: Path = cache_folder("answers", digest(identity))
        by_length = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        size = settings.batch_size
        self.batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]

    def read(self) -> dict[int, Answer]:
        """Return the answers that are there, by the number of their prompt; lines that a kill cut off count as not there."""
        found: dict[int, Answer] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text("utf-8").splitlines():
                try:
                    rows = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off by a kill
                found.update({row["prompt"]: Answer(tuple(row["ids"]), row["cut"]) for row in rows})
        return found

    def write(self, rank: int = 0, world_size: int = 1) -> None:
        """Write the answers that are missing; of several processes each writes its share."""
        there = self.read()
        mine = [number for number in range(rank, len(self.batches), world_size) if self.batches[number][0] not in there]
        if not mine:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{rank}-{uuid.uuid4().hex[:8]}.jsonl"  # never behind a line that was cut off
        with open(self.folder / name, "w", encoding="utf-8") as file, Progress(disable=rank > 0) as bar:
            task = bar.add_task("The model answers", total=sum(len(self.batches[number]) for number in mine))
            for number in mine:
                rows = self._answer(number)
                file.write(json.dumps(rows) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.advance(task, len(rows))

    @torch.no_grad()
    def _answer(self, number: int) -> list[dict]:
        batch = self.batches[number]
        ids, mask = left_padded([self.prompts[index] for index in batch], self.pad)
        settings = self.settings
        with torch.random.fork_rng(devices=[] if self.model.device.type == "cpu" else None):
            torch.manual_seed(settings.seed * 1_000_003 + number)
            written = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=settings.max_tokens,
                min_new_tokens=settings.min_tokens or None,
                do_sample=bool(settings.temperature),
                pad_token_id=self.pad,
                eos_token_id=self.ends or None,
                **self.drawing,
            )
        rows = []
        for index, row in zip(batch, written[:, ids.shape[1] :].tolist()):
            stops = [place for place, token in enumerate(row) if token in self.ends]
            answer = row[: stops[0] + 1] if stops else row
            rows.append({"prompt": index, "ids": answer, "cut": not stops})
        return rows


@torch.no_grad()
def perplexities(model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Return the perplexity of answers under a model, each measured once and kept in the cache.

    Args:
        model: Evaluation mode.
        pairs: Ids of the prompt and of its answer.
    """
    key = digest([model_identity(model), [[list(prompt), list(answer)] for prompt, answer in pairs]])
    file = cache_folder("answers", f"perplexities-{key}.json")
    known: list[float] = json.loads(file.read_text("utf-8")) if file.is_file() else []
    for prompt, answer in track(pairs[len(known) :], description="Perplexity of the answers", disable=len(known) == len(pairs)):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        known.append(math.exp(min(linear_loss(states, head_weight(model), ids[0, len(prompt) :]).hard.item(), 700.0)))
        write_json(file, known)
    return known
