"""Embedded data: the text ``package:python-docs``, Python's reference and the docstrings of installed libraries; and the rows
``package:docstrings``, which ask whose docstring a text is.
"""

import ast
import gc
import hashlib
import importlib.util
import json
import logging
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.progress import track

from ..files import cache_folder, write_atomic

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "lightning")
_ANSWERS = {"python": "A", **dict(zip(LIBRARIES, "BCD"))}  # each begins with a token of its own, also where a token is a byte
_QUESTION = "\n\nWhose documentation is this: (A) Python, (B) PyTorch, (C) Transformers or (D) Lightning? Answer with one letter."
_ROWS = 500  # of each answer
_SHOWN = 400  # characters of a docstring in a prompt
_SHORTEST = 200  # characters; below are signatures and one-liners
_SKIPPED = {"site-packages", "__pycache__", "test", "tests", "idle_test"}


def python_docs() -> Iterator[str]:
    """Yield every topic of Python's reference and every longer docstring of Python, torch, transformers and lightning.

    Sources are parsed, not imported; equal texts come once, sorted. The first call takes half a minute and keeps the
    result in the cache under the versions of all four, so that a figure names the text it was made with.
    """
    path = _collected()
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def docstring_rows() -> Iterator[dict[str, Any]]:
    """Yield rows with a ``prompt``, the begin of a docstring, and a ``response``, the letter of the package that it is from.

    A small task of classification for trials: at most 500 rows of each of four answers, mixed, cached as ``python_docs`` is.
    """
    path = _cached("docstrings")
    if not path.is_file():
        rows = []
        for library, folders in _roots().items():
            files = _files(folders, f"Collecting docstrings of {library} (once)")
            found = {text[:_SHOWN] for file in files for text in _docstrings(file)}
            chosen = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:_ROWS]
            rows += [{"prompt": text.rstrip() + _QUESTION, "response": _ANSWERS[library]} for text in chosen]
        rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _cached(name: str) -> Path:
    """Return the file of the cache for what is made of the versions at hand."""
    versions = [f"python-{sysconfig.get_python_version()}", *(f"{library}-{version(library)}" for library in LIBRARIES)]
    key = hashlib.sha256(json.dumps([versions, sorted(topics.items())]).encode()).hexdigest()[:16]
    return cache_folder("text", f"{name}-{key}.jsonl")


def _collected() -> Path:
    path = _cached("python-docs")
    if path.is_file():
        return path
    texts = set(topics.values())
    for file in _files([folder for folders in _roots().values() for folder in folders], "Collecting docstrings (once)"):
        texts.update(_docstrings(file))
    write_atomic(path, "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in sorted(texts)))
    log.info("Collected %d documents into %s", len(texts), path)
    return path


def _roots() -> dict[str, list[Path]]:
    """Return the folders of Python and of each library."""
    found = {"python": [Path(sysconfig.get_paths()["stdlib"])]}
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        found[name] = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return found


def _files(folders: list[Path], what: str) -> Iterator[Path]:
    """Yield the source files in some folders, each once, and show how far it is."""
    files = {
        file for folder in folders for file in folder.rglob("*.py") if not _SKIPPED.intersection(file.relative_to(folder).parts)
    }
    collects = gc.isenabled()
    gc.disable()  # it would go through millions of nodes, which hold no cycles: half of the time
    try:
        yield from track(sorted(files), description=what)
    finally:
        if collects:
            gc.enable()


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # files for other Python versions
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text.encode(errors="replace").decode()
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):  # an expression holds no docstring
            inner = getattr(node, block, None)
            nodes += inner if isinstance(inner, list) else []  # the body of an expression is none
