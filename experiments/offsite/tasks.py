"""Small tasks of classification as rows of prompts and responses."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ...errors import InputError, nearest
from ...files import write_atomic

_SENTIMENT = (" negative", " positive")  # as they stand in plain text
_TOPICS = (" World", " Sports", " Business", " Technology")
CANDIDATES = {"sst2": list(_SENTIMENT), "ag_news": list(_TOPICS)}


def write_task(
    *, seed: int = 0, task: str, data: str, folder: str, train_rows: int, test_rows: int, held_out: bool = False
) -> dict[str, float]:
    """Write ``train.jsonl`` and ``test.jsonl`` of a task, for plain text; return how many rows they have.

    Args:
        seed: Not used: the first rows of the published files are taken.
        task: ``sst2`` or ``ag_news``.
        data: Folder of the data sets.
        folder: To write to.
        train_rows: To train on.
        test_rows: To test on.
        held_out: Take these from the training file, behind the rows to train on, but for those that share a text of four words or
            more with them: for choices that the test rows must not see.

    Raises:
        InputError: If the task is unknown.
    """
    readers = {"sst2": _sst2, "ag_news": _ag_news}
    if task not in readers:
        raise InputError(f"task={task!r} is unknown.{nearest(task, readers)}")
    source = Path(data) / task
    behind = readers[task](source, "train")
    train = list(islice(behind, train_rows))
    others = (row for row in behind if not _shares_text(row, train)) if held_out else readers[task](source, "test")
    found = {}
    for split, rows in (("train", train), ("test", list(islice(others, test_rows)))):
        lines = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows]
        write_atomic(Path(folder) / f"{split}.jsonl", "".join(lines))
        found[f"{split}_rows"] = float(len(rows))
    return found


def _shares_text(row: tuple[str, str], others: list[tuple[str, str]]) -> bool:
    """Return whether a row's text holds that of another or stands in it; SST-2's training rows are parts of sentences."""
    own, *texts = (prompt.rpartition("\n")[0] for prompt, _ in (row, *others))
    return any(min(own.count(" "), text.count(" ")) >= 3 and (own in text or text in own) for text in texts)


def _sst2(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    with open(folder / {"train": "train_b.tsv", "test": "validation.tsv"}[split], encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield f"{row['sentence'].strip()}\nSentiment:", _SENTIMENT[int(row["label"])]


def _ag_news(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    with open(folder / {"train": "train_5k.csv", "test": "test.csv"}[split], encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if split == "train":
                text, topic = row[0], int(row[1])
            else:
                text, topic = f"{row[1]} {row[2]}", int(row[0]) - 1
            yield f"{text}\nTopic:", _TOPICS[topic]
