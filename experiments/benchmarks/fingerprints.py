"""Hashes of what results depend on: the package's sources, and data. Imports nothing heavy."""

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent


@cache
def code_version() -> str:
    """Return a hash of the package's Python sources and of the evaluated tasks; documents, tests and results do not change it."""
    digest = hashlib.sha256()
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("experiments/evaluation/tasks/*.yaml")]
    for folder in ("modules", "datamodules", "callbacks", "experiments"):
        files += (PACKAGE / folder).rglob("*.py")
    for path in sorted(files):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def exists(path: Path) -> bool:
    """Return whether a path is there; no error for a text that is none."""
    try:
        return path.exists()
    except OSError:  # a setting too long for a path
        return False


@cache
def content_hash(path: Path) -> str:
    """Return a hash of a file's bytes, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
