"""Tasks made of labelled rows: classes, numbers and tags of texts, and texts that follow a prompt."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import nearest
from ...modules.multitask.objectives import IGNORED, Mask, Objective
from ...modules.pretrained import needs_bos
from ..documents import DataError
from .tables import Row, check_table, column_of, content_hash, read_table, text_of
from .tasks import SPLITS, Part, Task


@dataclass
class TableRows:
    """Where labelled rows come from.

    Args:
        train: Rows to train on: a .csv, .tsv, .jsonl or .parquet file, or ``hub:owner/name[:split]``.
        val: Rows to validate on; None holds out a part of ``train``.
        test: Rows for ``test``; None takes those of ``val``.
        columns: Names of the columns of CSV and TSV files without a first line that names them.
        train_rows: Rows to train on at most; None takes all.
        val_rows: Rows to validate on, and to test on, at most; None takes all.
        val_fraction: Share of ``train`` that is held out when ``val`` is None, in (0, 1).

    Raises:
        InputError: If a file is missing or of another kind, or a number is out of range.
    """

    train: str
    val: str | None = None
    test: str | None = None
    columns: list[str] | None = None
    train_rows: int | None = None
    val_rows: int | None = None
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        for split, source in self.sources.items():
            check_table(source, split)
        for name, number in (("train_rows", self.train_rows), ("val_rows", self.val_rows)):
            if number is not None and number < 1:
                raise DataError(f"{name}={number} holds no row. Legal: 1 or more, or null.")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} is no share of the rows. Legal: above 0, below 1.")

    @property
    def sources(self) -> dict[str, str]:
        """What is given, by split."""
        return {split: source for split in SPLITS if (source := getattr(self, split)) is not None}


class RowTask(Task):
    """Base of tasks on labelled rows.

    Args:
        data: The rows.
        length: Tokens of a text at most; longer ones are cut.
    """

    def __init__(self, data: TableRows, length: int) -> None:
        super().__init__(length)
        self.data = data
        self.rows: dict[str, list[Row]] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def open(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """See ``Task``."""
        self.name, self.tokenizer = name, tokenizer
        rows = {split: self._read(split, source) for split, source in self.data.sources.items()}
        for split, own in rows.items():
            self.content[f"{name}/{split}"] = content_hash(own)
            # In the order of their hashes, which is as good as random and the same whatever else is read.
            own.sort(key=lambda row: content_hash([row]))
        if "val" not in rows:
            if len(rows["train"]) < 2:
                raise DataError(f"Task {name!r}: {self.data.train} has one row, so none can be held out. Give val.")
            held_out = min(max(1, round(len(rows["train"]) * self.data.val_fraction)), len(rows["train"]) - 1)
            rows["val"], rows["train"] = rows["train"][:held_out], rows["train"][held_out:]
        rows.setdefault("test", rows["val"])
        limits = {"train": self.data.train_rows, "val": self.data.val_rows, "test": self.data.val_rows}
        self.rows = {split: own[: limits[split]] for split, own in rows.items()}
        self._check()

    def _read(self, split: str, source: str) -> list[Row]:
        rows = read_table(source, f"tasks.{self.name}.data.{split}", self.data.columns)
        return [self._row(row, f"Task {self.name!r}, {source}, row {number}") for number, row in enumerate(rows, 1)]

    @abstractmethod
    def _row(self, row: Row, where: str) -> Row:
        """Return what is kept of a row, checked."""

    def _check(self) -> None:
        """Check the rows together."""

    def size(self, split: str) -> int:
        """See ``Task``."""
        return len(self.rows[split])

    def _part(self, mask: Mask, target: Any, text: str, pair: str | None = None) -> Part:
        assert self.tokenizer is not None
        if pair is not None and self.tokenizer.sep_token is None:
            text, pair = f"{text}\n{pair}", None
        found = self.tokenizer(text, pair, truncation=True, max_length=self.length)
        ids = list(found["input_ids"])
        return Part(mask, ids, list(found.get("token_type_ids") or [0] * len(ids)), {self.name: target})


class ClassificationTask(RowTask):
    """A class of a text, or of a pair of texts.

    Args:
        data: The rows.
        text: Column of the text.
        pair: Column of a second text, where there is one.
        label: Column of the class.
        classes: The classes as the data has them, in the order of their ids, or a readable name for each; None takes those of the
            training rows, sorted.
        length: Tokens of a text at most; longer ones are cut.

    Raises:
        InputError: If a file or column is missing, a label is no class, or a class has no row to train on.
    """

    def __init__(
        self,
        data: TableRows,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        classes: list[str] | dict[str, str] | None = None,
        length: int = 128,
    ) -> None:
        super().__init__(data, length)
        self.text, self.pair, self.label = text, pair, label
        self.classes = dict(classes) if isinstance(classes, dict) else {name: name for name in classes or []}
        if classes is not None and len(set(self.classes.values())) < max(2, len(classes)):
            raise DataError(f"classes={classes}: there have to be two or more, all different.")

    def _row(self, row: Row, where: str) -> Row:
        kept = {**_texts(row, self.text, self.pair, where), "label": str(column_of(row, self.label, "label", where))}
        if self.classes and kept["label"] not in self.classes:
            raise DataError(
                f"{where}: {self.label}={kept['label']!r} is none of the classes {', '.join(self.classes)}."
                f"{nearest(kept['label'], self.classes)}"
            )
        return kept

    def _check(self) -> None:
        seen = {row["label"] for row in self.rows["train"]}
        if not self.classes:
            self.classes = {name: name for name in sorted(seen)}
        for name in self.classes:
            if name not in seen:
                raise DataError(
                    f"Task {self.name!r}: no training row has the class {name!r}, so that it could not be learnt. Leave it out "
                    "of classes, or give rows that have it."
                )
        for split in ("val", "test"):
            for row in self.rows[split]:
                if row["label"] not in self.classes:
                    raise DataError(
                        f"Task {self.name!r}: a row of {split} has {self.label}={row['label']!r}, which no training row has. "
                        f"Legal: {', '.join(self.classes)}."
                    )
        if len(self.classes) < 2:
            raise DataError(f"Task {self.name!r}: all rows have the class {next(iter(self.classes))!r}: nothing to learn.")

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("sequence", tuple(self.classes.values()))}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        row = self.rows[split][index]
        return [self._part("bidirectional", list(self.classes).index(row["label"]), row["text"], row.get("pair"))]


class RegressionTask(RowTask):
    """A number for a text, or for a pair of texts.

    Args:
        data: The rows.
        text: Column of the text.
        pair: Column of a second text, where there is one.
        label: Column of the number.
        length: Tokens of a text at most; longer ones are cut.

    Raises:
        InputError: If a file or column is missing, or a label is no number.
    """

    def __init__(
        self,
        data: TableRows,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        length: int = 128,
    ) -> None:
        super().__init__(data, length)
        self.text, self.pair, self.label = text, pair, label

    def _row(self, row: Row, where: str) -> Row:
        value = column_of(row, self.label, "label", where)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: {self.label}={value!r} is no number.") from None
        if not np.isfinite(number):
            raise DataError(f"{where}: {self.label}={value!r} is not finite.")
        return {**_texts(row, self.text, self.pair, where), "label": number}

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("number")}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        row = self.rows[split][index]
        return [self._part("bidirectional", row["label"], row["text"], row.get("pair"))]


class TaggingTask(RowTask):
    """A class of each word of a text; the first token of a word carries it.

    Args:
        data: The rows.
        words: Column of the words: a list, or a text with blanks between them.
        tags: Column of their classes, of the same form.
        classes: The classes; None takes those of the training rows, sorted.
        length: Tokens of a text at most; longer ones are cut.

    Raises:
        InputError: If a file or column is missing, words and tags are not equally many, or a tag is no class.
    """

    def __init__(
        self,
        data: TableRows,
        *,
        words: str = "tokens",
        tags: str = "tags",
        classes: list[str] | None = None,
        length: int = 128,
    ) -> None:
        super().__init__(data, length)
        self.words, self.tags, self.classes = words, tags, list(classes or [])

    def _row(self, row: Row, where: str) -> Row:
        kept = {}
        for name, parameter in ((self.words, "words"), (self.tags, "tags")):
            value = column_of(row, name, parameter, where)
            kept[parameter] = value.split() if isinstance(value, str) else [str(one) for one in value]
        if len(kept["words"]) != len(kept["tags"]) or not kept["words"]:
            raise DataError(f"{where}: {len(kept['words'])} words, but {len(kept['tags'])} tags. Each word needs one.")
        for tag in kept["tags"]:
            if self.classes and tag not in self.classes:
                raise DataError(f"{where}: tag {tag!r} is none of the classes {', '.join(self.classes)}.")
        return kept

    def _check(self) -> None:
        seen = {tag for row in self.rows["train"] for tag in row["tags"]}
        self.classes = self.classes or sorted(seen)
        for split in SPLITS:
            for tag in {tag for row in self.rows[split] for tag in row["tags"]} | set(self.classes):
                if tag not in seen:
                    raise DataError(f"Task {self.name!r}: no training row has the tag {tag!r}, so that it could not be learnt.")

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("token", tuple(self.classes))}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        assert self.tokenizer is not None
        row = self.rows[split][index]
        ids: list[int] = []
        targets: list[int] = []
        for place, (word, tag) in enumerate(zip(row["words"], row["tags"])):
            own = self.tokenizer(word if place == 0 else f" {word}", add_special_tokens=False).input_ids
            ids += own
            targets += [self.classes.index(tag), *[IGNORED] * (len(own) - 1)][: len(own)]
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if first is None and needs_bos(self.tokenizer):
            first = self.tokenizer.bos_token_id
        room = self.length - (first is not None) - (last is not None)
        ids, targets = ids[:room], targets[:room]
        if first is not None:
            ids, targets = [first, *ids], [IGNORED, *targets]
        if last is not None:
            ids, targets = [*ids, last], [*targets, IGNORED]
        return [Part("bidirectional", ids, [0] * len(ids), {self.name: targets})]


class GenerationTask(RowTask):
    """A text that follows a prompt; only that text carries loss.

    Args:
        data: The rows.
        prompt: Column of the prompt.
        response: Column of the text that follows.
        template: What the model sees of the prompt.
        length: Tokens of a text at most; longer ones are cut.

    Raises:
        InputError: If a file or column is missing, or a prompt leaves no room for the response.
    """

    def __init__(
        self,
        data: TableRows,
        *,
        prompt: str = "prompt",
        response: str = "response",
        template: str = "{prompt}\n",
        length: int = 256,
    ) -> None:
        super().__init__(data, length)
        if "{prompt}" not in template:
            raise DataError(f"template={template!r} does not say where the prompt stands. Put {{prompt}} into it.")
        self.prompt, self.response, self.template = prompt, response, template

    def _row(self, row: Row, where: str) -> Row:
        return {
            "prompt": text_of(row, self.prompt, "prompt", where),
            "response": text_of(row, self.response, "response", where),
        }

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("next_token")}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        assert self.tokenizer is not None
        row = self.rows[split][index]
        head = self.tokenizer(self.template.replace("{prompt}", row["prompt"])).input_ids
        tail = self.tokenizer(row["response"], add_special_tokens=False).input_ids
        end = self.tokenizer.eos_token_id
        tail = [*tail, end] if end is not None else tail
        head = head[: max(1, self.length - min(len(tail), self.length // 2))]  # the response has half of it at least
        ids = [*head, *tail][: self.length]
        return [Part("causal", ids, [0] * len(ids), {self.name: [*[IGNORED] * len(head), *ids[len(head) :]]})]


def _texts(row: Row, text: str, pair: str | None, where: str) -> Row:
    """Return the text of a row, and the second one where there is a column for it."""
    kept = {"text": text_of(row, text, "text", where)}
    return kept if pair is None else {**kept, "pair": text_of(row, pair, "pair", where)}
