"""Tasks made of labelled rows: classes, numbers and tags of texts, and texts that follow a prompt."""

import math
from abc import abstractmethod
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import nearest
from ...modules.multitask.objectives import IGNORED, Kind, Mask, Objective
from ...modules.multitask.readable import end_token
from ...modules.tokens import needs_bos
from ..documents import DataError
from .tables import Row, TableRows, column_of, content_hash, read_table, text_of
from .tasks import Part, Task


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
            if split != "predict":  # in the order of their hashes, as good as random and the same whatever else is read
                own.sort(key=lambda row: content_hash([row]))
        if "val" not in rows:
            if len(rows["train"]) < 2:
                raise DataError(f"Task {name!r}: {self.data.train} has one row, so none can be held out. Give val.")
            held_out = min(max(1, round(len(rows["train"]) * self.data.val_fraction)), len(rows["train"]) - 1)
            rows["val"], rows["train"] = rows["train"][:held_out], rows["train"][held_out:]
        rows.setdefault("test", rows["val"])
        limits = {"train": self.data.train_rows, "val": self.data.val_rows, "test": self.data.val_rows}
        self.rows = {split: own[: limits.get(split)] for split, own in rows.items()}
        self.rows.setdefault("predict", self.rows["test"])
        self._check()

    def _read(self, split: str, source: str) -> list[Row]:
        rows = read_table(source, f"tasks.{self.name}.data.{split}", self.data.columns)
        labelled = split != "predict"
        return [self._row(row, f"Task {self.name!r}, {source}, row {number}", labelled) for number, row in enumerate(rows, 1)]

    @abstractmethod
    def _row(self, row: Row, where: str, labelled: bool) -> Row:
        """Return what is kept of a row, checked; without its label where it is not asked for."""

    def _check(self) -> None:
        """Check the rows together."""

    def size(self, split: str) -> int:
        """See ``Task``."""
        return len(self.rows[split])

    def _part(self, mask: Mask, target: Any, text: str, pair: str | None = None) -> Part:
        assert self.tokenizer is not None
        if pair is not None and self.tokenizer.sep_token is None:
            ids, second = self.tokenizer(f"{text}\n").input_ids, self.tokenizer(pair, add_special_tokens=False).input_ids
            ids = [*ids[: _room_of_first(len(ids), len(second), self.length)], *second][: self.length]
            return Part(mask, ids, [0] * len(ids), {self.name: target})
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
            training rows, sorted, numbers by size.
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

    def _row(self, row: Row, where: str, labelled: bool) -> Row:
        kept = _texts(row, self.text, self.pair, where)
        if not labelled:
            return kept
        kept["label"] = text_of(row, self.label, "label", where)
        if self.classes and kept["label"] not in self.classes:
            raise DataError(
                f"{where}: {self.label}={kept['label']!r} is none of the classes {', '.join(self.classes)}."
                f"{nearest(kept['label'], self.classes)}"
            )
        return kept

    def _check(self) -> None:
        seen = {row["label"] for row in self.rows["train"]}
        if not self.classes:
            self.classes = {name: name for name in sorted(seen, key=_in_order)}
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
        target = list(self.classes).index(row["label"]) if "label" in row else IGNORED
        return [self._part("bidirectional", target, row["text"], row.get("pair"))]


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

    def _row(self, row: Row, where: str, labelled: bool) -> Row:
        kept = _texts(row, self.text, self.pair, where)
        if not labelled:
            return kept
        value = column_of(row, self.label, "label", where)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: {self.label}={value!r} is no number.") from None
        if not np.isfinite(number):
            raise DataError(f"{where}: {self.label}={value!r} is not finite.")
        return {**kept, "label": number}

    @property
    def kinds(self) -> list[Kind]:
        """See ``Task``."""
        return ["number"]

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("number")}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        row = self.rows[split][index]
        return [self._part("bidirectional", row.get("label", math.nan), row["text"], row.get("pair"))]


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

    def _row(self, row: Row, where: str, labelled: bool) -> Row:
        kept: Row = {}
        for name, parameter in ((self.words, "words"), (self.tags, "tags"))[: 1 + labelled]:
            value = column_of(row, name, parameter, where)
            kept[parameter] = value.split() if isinstance(value, str) else [str(one) for one in value]
        if not labelled:
            kept["tags"] = [None] * len(kept["words"])
        if len(kept["words"]) != len(kept["tags"]) or not kept["words"]:
            raise DataError(f"{where}: {len(kept['words'])} words, but {len(kept['tags'])} tags. Each word needs one.")
        for tag in kept["tags"]:
            if self.classes and tag is not None and tag not in self.classes:
                raise DataError(f"{where}: tag {tag!r} is none of the classes {', '.join(self.classes)}.")
        return kept

    def _check(self) -> None:
        seen = {tag for row in self.rows["train"] for tag in row["tags"]}
        self.classes = self.classes or sorted(seen, key=_in_order)
        for split in ("train", "val", "test"):
            for tag in {tag for row in self.rows[split] for tag in row["tags"]} | set(self.classes):
                if tag not in seen:
                    raise DataError(f"Task {self.name!r}: no training row has the tag {tag!r}, so that it could not be learnt.")

    @property
    def kinds(self) -> list[Kind]:
        """See ``Task``."""
        return ["token"]

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
            # Without a tag any class marks a word whose class is asked for.
            targets += [0 if tag is None else self.classes.index(tag), *[IGNORED] * (len(own) - 1)][: len(own)]
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
        length: Tokens of a text at most; of longer ones the prompt loses its begin, then the response its end.

    Raises:
        InputError: If a file or column is missing.
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

    def _row(self, row: Row, where: str, labelled: bool) -> Row:
        kept = {"prompt": text_of(row, self.prompt, "prompt", where)}
        return {**kept, "response": text_of(row, self.response, "response", where)} if labelled else kept

    @property
    def kinds(self) -> list[Kind]:
        """See ``Task``."""
        return ["next_token"]

    @property
    def objectives(self) -> dict[str, Objective]:
        """See ``Task``."""
        return {self.name: Objective("next_token")}

    def example(self, split: str, index: int, draw: int) -> list[Part]:
        """See ``Task``."""
        assert self.tokenizer is not None
        row = self.rows[split][index]
        head = self.tokenizer(self.template.replace("{prompt}", row["prompt"])).input_ids
        tail: list[int] = []
        if "response" in row:
            end = end_token(self.tokenizer)
            tail = self.tokenizer(row["response"], add_special_tokens=False).input_ids + ([end] if end is not None else [])
        room = _room_of_first(len(head), len(tail), self.length)
        begin = int(head[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id))
        head = head if len(head) <= room else [*head[:begin], *head[begin - room :]]  # what is asked stands at its end
        ids = [*head, *tail][: self.length]
        return [Part("causal", ids, [0] * len(ids), {self.name: [*[IGNORED] * len(head), *ids[len(head) :]]})]


def _room_of_first(first: int, second: int, length: int) -> int:
    """Return how many tokens the first of two texts keeps: half of the length, or what the other one leaves of it."""
    return length - min(second, max(length // 2, length - first))


def _in_order(name: str) -> tuple[float, str]:
    """Return what classes are sorted by: numbers by size, and then words."""
    try:
        return float(name), name
    except ValueError:
        return math.inf, name


def _texts(row: Row, text: str, pair: str | None, where: str) -> Row:
    """Return the text of a row, and the second one where there is a column for it."""
    kept = {"text": text_of(row, text, "text", where)}
    return kept if pair is None else {**kept, "pair": text_of(row, pair, "pair", where)}
