"""Soft labels as Parquet: to read with other tools, and to take labels that a teacher said elsewhere."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import InputError
from ...files import atomic_file
from ...modules.distillation import LabelSettings
from ...modules.distillation.alignment import Spelling
from ...modules.pretrained import SourceError
from ...modules.tokens import tokenizer_fingerprint
from .appender import SoftLabelAppender
from .codec import StoredSequence, bfloat16_bits, of_bfloat16
from .format import StoreHeader, write_spelling
from .store import SoftLabelStore

_ROWS = 64  # sequences that are in memory at the same time
_METADATA = b"fulgurite"


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet needs the package pyarrow: pip install 'fulgurite[data]'.") from error
    return pyarrow


def export_parquet(store: SoftLabelStore, path: Path) -> int:
    """Write a store as one Parquet file, a row a sequence, which ``datasets`` reads too.

    Columns: ``input_ids`` and ``starts`` (as in ``StoredSequence``); and a list entry for each token, empty or null where none is
    predicted: ``top_ids`` and ``top_log_probabilities`` (nats) of the token behind it, ``tail`` (probability of the rest) and
    ``log_probabilities`` (of the text's own next token). The header is in the schema's metadata.

    Args:
        store: The store; it must hold its tokens.
        path: File to write; a file that is there is replaced when the new one is whole.

    Returns:
        Number of sequences.
    """
    pyarrow = _arrow()
    if store.header.tokens == "external":
        raise InputError(
            f"{store.folder} was made with tokens: external, so there is no text to export. Capture with tokens: stored."
        )
    floats, integers = pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema(
        {
            "input_ids": integers,
            "starts": integers,
            "top_ids": pyarrow.list_(integers),
            "top_log_probabilities": pyarrow.list_(floats),
            "tail": floats,
            "log_probabilities": floats,
        },
        metadata={_METADATA: json.dumps(asdict(store.header))},
    )
    with atomic_file(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, len(store.keys), _ROWS):
            rows = [_row(store.read(key)) for key in store.keys[start : start + _ROWS]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return len(store.keys)


def _row(sequence: StoredSequence) -> dict[str, Any]:
    length = len(sequence.supervised)
    ends = np.cumsum(sequence.counts)[:-1]
    with np.errstate(divide="ignore"):
        log_p = np.log(of_bfloat16(sequence.probabilities))

    def spread(values: Any, nothing: Any) -> list[Any]:
        found = [nothing] * length
        for place, value in zip(sequence.supervised.nonzero()[0].tolist(), values):
            found[place] = value
        return found

    return {
        "input_ids": sequence.tokens.tolist(),
        "starts": sequence.starts.tolist(),
        "top_ids": spread((part.tolist() for part in np.split(sequence.ids, ends)), []),
        "top_log_probabilities": spread((part.tolist() for part in np.split(log_p, ends)), []),
        "tail": spread(of_bfloat16(sequence.tail).tolist(), None),
        "log_probabilities": spread(of_bfloat16(sequence.realised).tolist(), None),
    }


def import_parquet(
    path: Path,
    folder: Path,
    *,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None = None,
    temperature: float = 1.0,
) -> int:
    """Make a store of labels that a teacher said elsewhere, as an inference server does with log-probabilities of a prompt.

    Needed are ``input_ids``, ``top_ids`` and ``top_log_probabilities``: entry i is about the token behind token i, and empty
    where none is predicted. ``log_probabilities`` is looked up among the top where it is missing; ``starts`` is 0 then.
    ``tail`` is never read: it is what the others leave. Killed, the same call goes on.

    Args:
        path: The Parquet file.
        folder: Of the store, made when missing.
        teacher: Name of the teacher; labels of another name go to another store.
        tokenizer: The teacher's.
        vocabulary: Number of ids of the teacher's head; None takes that of the store that the file was exported from, or of
            the tokenizer.
        temperature: That the log-probabilities were made with.

    Returns:
        Number of sequences.

    Raises:
        InputError: If a column is missing, or a row cannot be labels; the message names the row.
    """
    pyarrow = _arrow()
    if vocabulary is not None and vocabulary < 1:
        raise InputError(f"vocabulary={vocabulary} has no id. Legal: 1 or more, as the teacher's head has rows.")
    if not Path(path).is_file():
        raise InputError(f"{path} is no file. Give a Parquet file with input_ids, top_ids and top_log_probabilities.")
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error
    missing = {"input_ids", "top_ids", "top_log_probabilities"} - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(file.schema_arrow.names)}.")
    types = {name: str(file.schema_arrow.field(name).type) for name in ("input_ids", "top_ids", "top_log_probabilities")}
    wrong = [f"{name}: {kind}" for name, kind in types.items() if kind.count("list<") != 1 + name.startswith("top_")]
    if wrong:
        raise InputError(f"{path} has {', '.join(wrong)}. Needed: input_ids as lists of integers, the others as lists of lists.")
    origin = _checked_origin(file, path, tokenizer, temperature)
    vocabulary = int(origin.get("vocabulary", len(tokenizer))) if vocabulary is None else vocabulary
    most = max((len(label or []) for row in _rows(file, "top_ids") for label in row["top_ids"] or []), default=0)
    if not most:
        raise InputError(f"{path} has no labels: every entry of top_ids is empty.")
    settings = LabelSettings(k=most, temperature=temperature)
    settings.check(vocabulary)
    header = StoreHeader(
        teacher=teacher,
        teacher_fingerprint=hashlib.sha256(teacher.encode()).hexdigest()[:32],
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=vocabulary,
        settings=settings,
        weights="imported",
    )
    optional = [name for name in ("starts", "log_probabilities") if name in file.schema_arrow.names]
    columns = ["input_ids", "top_ids", "top_log_probabilities", *optional]
    for number, row in enumerate(_rows(file, *columns)):  # all is read before anything is written
        _sequence(row, vocabulary, f"{path}, row {number}")
    appender = SoftLabelAppender(folder, header)
    try:
        with suppress(SourceError):  # a tokenizer whose tokens spell nothing teaches students of its own kind alone
            write_spelling(folder, Spelling.of(tokenizer))
        some: list[tuple[bytes, StoredSequence]] = []
        for number, row in enumerate(_rows(file, *columns)):
            sequence = _sequence(row, vocabulary, f"{path}, row {number}")
            some.append((header.key(sequence.tokens, sequence.starts, sequence.supervised), sequence))
            if len(some) == _ROWS:
                appender.append(some)
                some = []
        appender.append(some)
    finally:
        appender.close()
    return int(file.metadata.num_rows)


def _checked_origin(file: Any, path: Path, tokenizer: PreTrainedTokenizerBase, temperature: float) -> dict[str, Any]:
    """Return the header of the store that the file was exported from, if it was, and refuse what contradicts it."""
    header = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
    settings = header.get("settings", {})
    if settings.get("selection") in ("sampled", "random"):
        raise InputError(
            f"{path} holds labels of selection={settings['selection']!r}, which are samples, not what the teacher found "
            "likeliest. Copy the store itself."
        )
    if settings.get("temperature", temperature) != temperature:
        raise InputError(f"temperature={temperature}, but {path} was exported with {settings['temperature']}. Give that.")
    if header.get("tokenizer_fingerprint", ours := tokenizer_fingerprint(tokenizer)) != ours:
        raise InputError(f"{path} was exported from a store of another tokenizer than the one given. Give the teacher's own.")
    return header


def _rows(file: Any, *columns: str) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns)):
        yield from batch.to_pylist()


def _sequence(row: dict[str, Any], vocabulary: int, where: str) -> StoredSequence:
    try:
        return _checked_sequence(row, vocabulary, where)
    except (TypeError, OverflowError, IndexError) as error:
        raise InputError(
            f"{where}: a column is not of the type that labels have ({error}). See docs/soft-label-format.md."
        ) from error


def _checked_sequence(row: dict[str, Any], vocabulary: int, where: str) -> StoredSequence:
    tokens = np.array(row["input_ids"] or [], dtype=np.int64)
    top, log_p = row["top_ids"] or [], row["top_log_probabilities"] or []
    if not len(tokens):
        raise InputError(f"{where}: input_ids is empty. Leave rows without a text out.")
    if len(top) != len(tokens) or len(log_p) != len(tokens):
        raise InputError(
            f"{where}: {len(tokens)} input_ids, {len(top)} top_ids, {len(log_p)} top_log_probabilities. Each needs one a token."
        )
    top, log_p = [part or [] for part in top], [part or [] for part in log_p]
    counts = np.array([len(part) for part in top], dtype=np.int64)
    if [len(part) for part in log_p] != counts.tolist() or (len(counts) and counts[-1]):
        raise InputError(f"{where}: top_ids and top_log_probabilities differ at a token, or the last token has labels.")
    supervised = counts > 0
    kept = list(itertools.chain.from_iterable(top))
    if any(not isinstance(number, int) for number in (*row["input_ids"], *kept)):
        raise InputError(f"{where}: input_ids and top_ids need whole numbers.")
    ids, values = np.array(kept, dtype=np.int64), np.array(list(itertools.chain.from_iterable(log_p)), dtype=np.float64)
    for name, numbers in (("input_ids", tokens), ("top_ids", ids)):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < vocabulary:
            raise InputError(
                f"{where}: {name} has an id outside the vocabulary of {vocabulary}. Give the teacher's own tokenizer, or with "
                "--vocabulary as many ids as its head has rows."
            )
    owner = np.repeat(np.arange(len(tokens)), counts)
    if len(np.unique(owner * vocabulary + ids)) < len(ids):
        raise InputError(f"{where}: top_ids has the same id twice at a token.")
    p = np.exp(values)
    mass = np.bincount(owner, p, minlength=len(tokens))
    if np.isnan(values).any() or mass.max(initial=0) > 1.01:
        raise InputError(f"{where}: top_log_probabilities are none: they add up to more than 1, or are not numbers.")
    starts = np.array(row.get("starts") or [0], dtype=np.int64)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens):
        raise InputError(f"{where}: starts={starts.tolist()} are no beginnings of pieces: they rise from 0, below {len(tokens)}.")
    order = np.lexsort((-p, owner))
    places = supervised.nonzero()[0]
    return StoredSequence(
        tokens=tokens.astype(np.uint32),
        starts=starts.astype(np.uint32),
        supervised=supervised,
        counts=counts[places].astype(np.uint32),
        ids=ids[order].astype(np.uint32),
        probabilities=bfloat16_bits(p[order]),
        tail=bfloat16_bits((1 - mass[places]).clip(0)),
        realised=bfloat16_bits(_realised(row, tokens, top, log_p, places, where)),
    )


def _realised(
    row: dict[str, Any], tokens: np.ndarray, top: list[list[int]], log_p: list[list[float]], places: np.ndarray, where: str
) -> np.ndarray:
    given = row.get("log_probabilities")
    found = np.zeros(len(places))
    for number, place in enumerate(places.tolist()):
        own = None if given is None else given[place]
        if own is None:
            following = int(tokens[place + 1])
            if following not in top[place]:
                raise InputError(
                    f"{where}: the token behind token {place} is not among its top_ids, and log_probabilities does not say how "
                    "likely it was. Add the column log_probabilities."
                )
            own = log_p[place][top[place].index(following)]
        if not -1e4 < own <= 0.01:
            raise InputError(f"{where}: {own} is no log-probability of the token behind token {place}. Legal: finite, 0 at most.")
        found[number] = own
    return found
