"""Rows of labelled tables: CSV, TSV, JSONL, Parquet and hub data."""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import nearest
from ..documents import DataError, check_documents, read_rows
from .tasks import SPLITS

Row = dict[str, Any]

_SEPARATED = {".csv": ",", ".tsv": "\t"}
_LEGAL = "a .csv, .tsv, .jsonl or .parquet file, or hub:owner/name[/config][:split]"


@dataclass
class TableRows:
    """Where labelled rows come from.

    Args:
        train: Rows to train on: a .csv, .tsv, .jsonl or .parquet file, or ``hub:owner/name[/config][:split]``.
        val: Rows to validate on; None holds out a part of ``train``.
        test: Rows for ``test``; None takes those of ``val``.
        predict: Rows for ``predict``, all of them, which need no label; None takes those of ``test``.
        columns: Names of the columns of CSV and TSV files whose first line does not name some of them.
        train_rows: Rows to train on at most; None takes all.
        val_rows: Rows to validate on, and to test on, at most; None takes all.
        val_fraction: Share of ``train`` that is held out when ``val`` is None, in (0, 1).

    Raises:
        InputError: If a file is missing or of another kind, or a number is out of range.
    """

    train: str
    val: str | None = None
    test: str | None = None
    predict: str | None = None
    columns: list[str] | None = None
    train_rows: int | None = None
    val_rows: int | None = None
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        for split, source in self.sources.items():
            check_table(source, split)
        if self.columns is not None and not self.train.endswith((".csv", ".tsv")):
            raise DataError(
                f"columns={self.columns}: train={self.train!r} names its columns itself. Leave columns out; a task says which it "
                "reads."
            )
        for name, number in (("train_rows", self.train_rows), ("val_rows", self.val_rows)):
            if number is not None and number < 1:
                raise DataError(f"{name}={number} holds no row. Legal: 1 or more, or null.")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} is no share of the rows. Legal: above 0, below 1.")

    @property
    def sources(self) -> dict[str, str]:
        """What is given, by split."""
        return {split: source for split in SPLITS if (source := getattr(self, split)) is not None}


def check_table(source: str, parameter: str) -> None:
    """Raise a DataError for a source of rows that cannot be read. Reads no content.

    Args:
        source: A .csv, .tsv, .jsonl or .parquet file, or ``hub:owner/name[/config][:split]``.
        parameter: Name of the parameter that holds it, for the message.
    """
    path = Path(source).expanduser()
    if path.suffix in _SEPARATED:
        if not path.is_file():
            raise DataError(f"{parameter}={source!r} is no file here. Legal: {_LEGAL}.")
        return
    if not source.startswith("hub:") and path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{parameter}={source!r} has no rows. Legal: {_LEGAL}.")
    check_documents(source, parameter)


def read_table(source: str, parameter: str, columns: list[str] | None = None) -> list[Row]:
    """Return the rows of a checked source.

    Args:
        source: See ``check_table``.
        parameter: Name of the parameter that holds it, for messages.
        columns: Names of the columns of a CSV or TSV file whose first line does not name some of them.

    Raises:
        DataError: If it has no rows, or one of them more or fewer columns than the first.
    """
    path = Path(source).expanduser()
    if path.suffix in _SEPARATED:
        rows = _separated(path, columns)
    else:
        rows = list(read_rows(source))
    if not rows:
        raise DataError(f"{parameter}={source!r} holds no rows. Give a file with an example a row.")
    return rows


def _separated(path: Path, columns: list[str] | None) -> list[Row]:
    # In TSV files of the field quotes are text; csv's reader would join lines at them.
    quoting: Any = csv.QUOTE_MINIMAL if path.suffix == ".csv" else csv.QUOTE_NONE
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, delimiter=_SEPARATED[path.suffix], quoting=quoting) if line]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}: {error}. Is it a {path.suffix} file?") from error
    headed = columns is None or (lines and set(lines[0]) <= set(columns))
    names = (lines.pop(0) if lines else []) if headed else columns or []
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: the column {min(twice)!r} is named twice. Give each its own name, or name them by columns.")
    for number, line in enumerate(lines, 1):
        if len(line) != len(names):
            raise DataError(
                f"{path}, row {number}: {len(line)} columns, not the {len(names)} of {', '.join(names)}. Where the first line "
                "holds no names, give them as columns."
            )
    return [dict(zip(names, line)) for line in lines]


def column_of(row: Row, name: str, parameter: str, where: str) -> Any:
    """Return a row's value in a column.

    Raises:
        DataError: If there is no such column.
    """
    if name not in row:
        raise DataError(f"{where}: no column {parameter}={name!r}.{nearest(name, map(str, row))}")
    if row[name] is None or row[name] != row[name]:  # Parquet may hold NaN for nothing
        raise DataError(f"{where}: the column {parameter}={name!r} is empty.")
    return row[name]


def text_of(row: Row, name: str, parameter: str, where: str) -> str:
    """Return a row's text in a column.

    Raises:
        DataError: If there is no such column, or no text in it.
    """
    found = column_of(row, name, parameter, where)
    if isinstance(found, dict | list) or not str(found).strip():
        raise DataError(
            f"{where}: no text in the column {parameter}={name!r}, but {found!r}. Leave the row out, or give it a text."
        )
    return str(found)


def content_hash(rows: list[Row]) -> str:
    """Return a hash of rows, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:32]
