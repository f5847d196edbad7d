"""Where things are kept and how they are written: the cache folder, and writes that a killed process cannot spoil."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def cache_folder(*parts: str) -> Path:
    """Return a folder of the cache: ``$FULGURITE_CACHE``, else ``$XDG_CACHE_HOME/fulgurite``, else ``~/.cache/fulgurite``.

    Args:
        parts: Names of the sub-folders. Nothing is created.
    """
    root = os.environ.get("FULGURITE_CACHE")
    if root:
        return Path(root).joinpath(*parts)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).joinpath("fulgurite", *parts)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there takes the place of ``path`` when the block ends without an error.

    Args:
        path: File to write; its folder is made when missing. A reader sees the old content or the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new one, never a part.

    Args:
        path: File to write; its folder is made when missing.
        data: Content; text is written as UTF-8.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits that name plain JSON, for keys of the cache."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _fsync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _fsync(file)


def publish_folder(parts: Path, path: Path) -> None:
    """Give a folder that is complete its name; until then, all stays where it was.

    Args:
        parts: The folder, beside ``path``.
        path: Its name; nothing is there.
    """
    _fsync_files(parts)
    os.rename(parts, path)
    _fsync(path.parent)


def check_replaceable(path: Path, mark: str) -> None:
    """Refuse a folder that ``atomic_folder`` would replace though something else is in it.

    Args:
        path: Folder that is to be written.
        mark: File that every folder of that kind has.

    Raises:
        InputError: If it has no name of its own, is a file, or holds something without ``mark``.
    """
    if not path.name:
        raise InputError(f"folder={str(path)!r} has no name of its own. Give the name of a folder, to make or to replace.")
    if path.exists() and not path.is_dir():
        raise InputError(f"folder={str(path)!r} is a file. Give the name of a folder, to make or to replace.")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise InputError(
            f"folder={str(path)!r} holds something else (there is no {mark}), and is left as it is. Give another name."
        )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block ends without an error.

    A folder that already stands at ``path`` stays until the new one is complete.

    Args:
        path: Folder to make or to replace.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary, old = (path.with_name(f".{path.name}.{token}.{state}") for state in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _fsync_files(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
