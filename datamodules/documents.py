"""Reading documents from files, folders, hub data sets and the embedded text."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from .python_docs import docstring_rows, python_docs

TEXT_SUFFIXES = (".txt", ".md", ".rst")
ROW_SUFFIXES = (".jsonl", ".parquet")
ROWS_PACKAGE = "package:docstrings"


class DataError(InputError):
    """Data that is missing, empty, too short or of the wrong form."""


def check_documents(source: str, parameter: str) -> None:
    """Raise a DataError for a source of documents that cannot be read. Reads no content.

    Args:
        source: A file (.txt, .md and .rst are one document each; .jsonl and .parquet one a row), a folder of such
            files, ``hub:owner/name[/config][:split]``, or ``package:python-docs``.
        parameter: Name of the parameter that holds it, for the message.
    """
    if source.startswith("hub:"):
        _require("datasets", f"{parameter}={source!r}")
        return
    if source == "package:python-docs":
        return
    path = Path(source).expanduser()
    if not path.exists():
        legal = [
            "package:python-docs",
            "hub:owner/name[/config][:split]",
            f"a file ({', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)})",
            "a folder",
        ]
        raise DataError(f"{parameter}={source!r} names no text here.{nearest(source, legal)}")
    files = _files(path)
    if not files:
        raise DataError(
            f"{parameter}={source!r}: no {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} file there. Convert the text to one of these."
        )
    if any(file.suffix == ".parquet" for file in files):
        _require("pyarrow", f"{parameter}={source!r}")


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{what} needs the package {package}. Run: pip install 'fulgurite[data]'")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in TEXT_SUFFIXES + ROW_SUFFIXES else []
    return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_SUFFIXES + ROW_SUFFIXES)


def read_documents(source: str, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of a checked source, the empty ones left out.

    Args:
        source: See :func:`check_documents`.
        text_field: Column that holds the text in JSONL, Parquet and hub data.

    Raises:
        DataError: If a row has no such column; the message names the file and the row.
    """
    if source == "package:python-docs":
        yield from python_docs()
        return
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix in TEXT_SUFFIXES:
        for file in _files(path):
            if file.suffix in TEXT_SUFFIXES:
                text = _utf8(file.read_bytes(), str(file))
                if text.strip():
                    yield text
            else:
                yield from read_documents(str(file), text_field)
        return
    for number, row in enumerate(read_rows(source), 1):
        if not isinstance(row.get(text_field), str):
            raise DataError(
                f"{source}, row {number}: no text in the column text_field={text_field!r}.{nearest(text_field, map(str, row))}"
            )
        if row[text_field].strip():
            yield row[text_field]


def _utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: no UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8.") from None


def read_rows(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL or Parquet file, of a hub data set, or of the embedded task.

    Args:
        source: File name, ``hub:owner/name[/config][:split]``, or ``package:docstrings``.

    Raises:
        DataError: If a line is no JSON object or has half of a surrogate pair, or the hub cannot be reached.
    """
    if source.startswith("hub:"):
        yield from _hub_rows(source)
    elif source == ROWS_PACKAGE:
        yield from docstring_rows()
    elif source.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(Path(source).expanduser()).iter_batches():
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise DataError(f"{source} is damaged or no Parquet file ({error}).") from error
    else:
        with open(Path(source).expanduser(), "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _utf8(raw, f"{source}, line {number}")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{source}, line {number}: no JSON ({error.msg}, column {error.colno}). A .jsonl has an object a line."
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(f"{source}, line {number}: a {type(row).__name__}, not an object.")
                if "\\ud" in line.lower():
                    _refuse_half_characters(row, f"{source}, line {number}")
                yield row


def _refuse_half_characters(row: dict[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise DataError(
            f"{where}: {half} is half of a surrogate pair, and no character. Mend the line, or leave it out."
        ) from None


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    import datasets

    place, _, split = source.removeprefix("hub:").partition(":")
    owner, name, config = [*place.split("/", 2), "", ""][:3]
    try:
        data = datasets.load_dataset(f"{owner}/{name}" if name else owner, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source!r} could not be read from the hub ({str(error).splitlines()[0]}). Check the name, the split and the "
            "network, or give a local .jsonl or .parquet file."
        ) from error
    for row in data:
        yield dict(row)


def documents_hash(source: str, text_field: str) -> str:
    """Return 32 hexadecimal digits of a source's documents and their order; figures quote it."""
    digest = hashlib.sha256()
    for text in read_documents(source, text_field):
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:32]
