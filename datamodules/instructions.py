"""Prompts with responses, for instruction tuning."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from ..errors import nearest
from ..modules.tokens import render_chat
from .base import TokenDataModule
from .documents import ROWS_PACKAGE, DataError, check_documents, read_rows
from .packing import left_padded


class InstructionDataModule(TokenDataModule):
    """Rows of a prompt and a response, in the model's chat template or as plain text; only the response carries loss.

    Args:
        train: A .jsonl or .parquet file or ``hub:owner/name[/config][:split]`` with one prompt and response a row; or
            ``package:docstrings``, a small embedded task.
        val: Rows to validate on; None holds out a part of the training rows.
        val_fraction: Share of the training rows that is held out when ``val`` is None, in [0, 1).
        prompt_field: Column of the prompt.
        response_field: Column of the response.
        predict_split: What ``predict`` reads: ``prompts`` of the validation rows, left-padded, to be answered; or ``train`` or
            ``val`` rows with their responses, for a capture of soft labels.
        chat: Render rows with the model's chat template. False is for base models, too: the response stands behind the prompt
            as both are written, spaces and all, and the tokenizer's end of text behind it.
        group_by_length: Make batches, except of ``predict``, of rows of like length: less padding to compute.
        max_length: Tokens of a row at most; longer rows are cut at the end, rows whose prompt alone is longer left out.
        batch_size: Rows a batch on each device.
        tokenizer: Source of the tokenizer; None takes the model's own.
        num_workers: Processes that read ahead; 0 reads in the training process.
        seed: Seed of the training order; None takes that of the run (``seed_everything``), or 0 without one.

    Raises:
        InputError: If a file or column is missing, a number out of range, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        train: str,
        *,
        val: str | None = None,
        val_fraction: float = 0.05,
        prompt_field: str = "prompt",
        response_field: str = "response",
        predict_split: Literal["prompts", "train", "val"] = "prompts",
        chat: bool = True,
        group_by_length: bool = False,
        max_length: int = 1024,
        batch_size: int = 4,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, num_workers=num_workers, seed=seed)
        for name, source in (("train", train), ("val", val)):
            if source is None:
                continue
            if source == ROWS_PACKAGE:
                continue
            check_documents(source, name)
            if not source.startswith("hub:") and Path(source).suffix not in (".jsonl", ".parquet"):
                raise DataError(
                    f"{name}={source!r} has no rows. Legal: a .jsonl or .parquet file, hub:owner/name[/config][:split], "
                    f"{ROWS_PACKAGE}."
                )
        if not 0 <= val_fraction < 1:
            raise DataError(f"val_fraction={val_fraction} is no share of the rows. Legal: 0 up to, not including, 1.")
        if max_length < 2:
            raise DataError(f"max_length={max_length} holds no response. Legal: 2 or more.")
        self.train_source, self.val_source, self.val_fraction = train, val, val_fraction
        self.fields = {"prompt_field": prompt_field, "response_field": response_field}
        self.predict_split, self.max_length = predict_split, max_length
        self.chat, self.group_by_length = chat, group_by_length
        self._content: dict[str, str] = {}

    @property
    def longest_sequence(self) -> int:
        """See ``TokenDataModule``."""
        return self.max_length

    def setup(self, stage: str | None = None) -> None:
        """Read the rows and render them."""
        if self.train_set is not None:
            return
        if self.chat and not self.tokenizer.chat_template:
            raise DataError(
                f"chat=True: the tokenizer of {getattr(self.tokenizer, 'name_or_path', '')!r} has no chat template: it belongs "
                "to a base model. Give chat: false for plain text, or use an instruction-tuned model."
            )
        train = self._rows(self.train_source, "train")
        if self.val_source is not None:
            val = self._rows(self.val_source, "val")
        else:
            train.sort(key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())
            held_out = self._held_out(len(train))
            val, train = train[:held_out], train[held_out:]
        train = self._own(train)
        self.train_set = self._examples(train, "train")
        self.val_set = self._examples(val, "val") if val else None
        prompts = PromptExamples([self._ids(prompt)[0] for prompt, _ in val or train])
        self.predict_set = {"prompts": prompts, "train": self.train_set, "val": self.val_set}[self.predict_split]
        if self.predict_set is None and stage == "predict":
            raise DataError("predict_split='val', but there are no validation rows: give val, or val_fraction above 0.")

    def _held_out(self, rows: int) -> int:
        """Return how many of the training rows are held out."""
        return max(int(rows * self.val_fraction), 1) if self.val_fraction and rows > 1 else 0

    def _own(self, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the rows that are trained on here."""
        return rows

    def _rows(self, source: str, name: str) -> list[tuple[str, str]]:
        rows = []
        for number, row in enumerate(read_rows(source), 1):
            for parameter, column in self.fields.items():
                if not isinstance(row.get(column), str):
                    raise DataError(
                        f"{source}, row {number}: no text in the column {parameter}={column!r}.{nearest(column, map(str, row))}"
                    )
            rows.append((row[self.fields["prompt_field"]], row[self.fields["response_field"]]))
        if not rows:
            raise DataError(f"{name}={source!r} holds no rows. Give a file with a prompt and a response a row.")
        self._content[name] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
        return rows

    def _ids(self, prompt: str, response: str | None = None) -> tuple[list[int], list[int]]:
        """Return the ids of the rendered prompt, and of what follows it in the rendered conversation."""
        if not self.chat:
            answer = [] if response is None else list(self.tokenizer(response, add_special_tokens=False).input_ids)
            end = self.tokenizer.eos_token_id
            return list(self.tokenizer(prompt).input_ids), answer if end is None else [*answer, end]
        messages = [{"role": "user", "content": prompt}]
        head = render_chat(self.tokenizer, messages, prompt=True)
        head_ids = self.tokenizer(head, add_special_tokens=False).input_ids
        if response is None:
            return head_ids, []
        whole = render_chat(self.tokenizer, [*messages, {"role": "assistant", "content": response}], prompt=False)
        if not whole.startswith(head):
            raise DataError("The chat template renders a prompt differently once it is answered: responses cannot be told apart.")
        return head_ids, self.tokenizer(whole[len(head) :], add_special_tokens=False).input_ids

    def _examples(self, rows: list[tuple[str, str]], name: str) -> "InstructionExamples":
        pairs = [self._ids(prompt, response) for prompt, response in rows]
        kept = [(head, answer[: self.max_length - len(head)]) for head, answer in pairs if len(head) < self.max_length]
        if not kept:
            raise DataError(f"{name}: every prompt is longer than max_length={self.max_length} tokens. Raise max_length.")
        return InstructionExamples(kept)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "labels" in examples[0]:
            return super()._collate(examples)
        prompts = [example["input_ids"].tolist() for example in examples]
        ids, mask = left_padded(prompts, self.tokenizer.pad_token_id or 0)
        return {"input_ids": ids, "attention_mask": mask}

    def _lengths(self, dataset: Dataset) -> list[int] | None:
        return dataset.lengths() if self.group_by_length and isinstance(dataset, InstructionExamples) else None

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the rows and the tokenizer's fingerprint."""
        return {**super().hashes(), **self._content}


class InstructionExamples(Dataset):
    """Prompts with responses as token ids.

    Args:
        pairs: Ids of prompt and response.
    """

    def __init__(self, pairs: list[tuple[list[int], list[int]]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def lengths(self) -> list[int]:
        """Return the number of tokens of each."""
        return [len(head) + len(answer) for head, answer in self.pairs]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``labels`` (-100 in the prompt) and ``position_ids``, int64 [length]."""
        head, answer = self.pairs[index]
        ids = torch.tensor(head + answer)
        labels = ids.clone()
        labels[: len(head)] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}


class PromptExamples(Dataset):
    """Prompts as token ids, for generation.

    Args:
        prompts: Ids of every prompt.
    """

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, int64 [length]."""
        return {"input_ids": torch.tensor(self.prompts[index])}
