"""The embedded text ``package:python-docs``: the reference of Python and the docstrings of installed libraries."""

import ast
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

from rich.progress import track

from ..files import cache_folder, write_atomic

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "lightning")
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


def _collected() -> Path:
    versions = [f"python-{sysconfig.get_python_version()}", *(f"{name}-{version(name)}" for name in LIBRARIES)]
    key = hashlib.sha256(json.dumps([versions, sorted(topics.items())]).encode()).hexdigest()[:16]
    path = cache_folder("text", f"python-docs-{key}.jsonl")
    if path.is_file():
        return path
    files = sorted({file for root in _roots() for file in _sources(root)})
    texts = set(topics.values())
    for file in track(files, description="Collecting docstrings (once)"):
        texts.update(_docstrings(file))
    write_atomic(path, "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in sorted(texts)))
    log.info("Collected %d documents into %s", len(texts), path)
    return path


def _roots() -> Iterator[Path]:
    yield Path(sysconfig.get_paths()["stdlib"])
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        yield from map(Path, spec.submodule_search_locations or ())


def _sources(root: Path) -> Iterator[Path]:
    for file in root.rglob("*.py"):
        if not _SKIPPED.intersection(file.relative_to(root).parts):
            yield file


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # files for other Python versions
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text.encode(errors="replace").decode()
