import os
import tempfile

import pytest

# Before any test imports transformers: nothing is fetched, and the user's cache is left alone.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and lose much where two processes spin on the same cores.
os.environ["OMP_NUM_THREADS"] = "1"
if "FULGURITE_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="fulgurite-cache-")  # removed when the tests end
    os.environ["FULGURITE_CACHE"] = _cache.name

WORDS = "sand glass lightning melts into a hollow branch of small hard tubes where the strike went down".split()  # noqa: SIM905


def prose(words: int, seed: int = 0) -> str:
    """Text with some structure, the same for the same arguments."""
    state = seed * 7919 + 1
    chosen = []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        chosen.append(WORDS[state // 65536 % len(WORDS)])
    return " ".join(chosen)


@pytest.fixture
def text_file(tmp_path):
    """A file of about 12 thousand bytes, which are as many tokens of ``random:tiny``."""
    path = tmp_path / "text.txt"
    path.write_text(prose(2200))
    return path


@pytest.fixture
def documents_file(tmp_path):
    """Forty documents of different lengths, one a row."""
    import json

    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": prose(5 + 7 * n % 60, n)}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def long_documents(tmp_path):
    """Sixty documents of about 350 bytes, one a row."""
    import json

    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": prose(60, n)}) + "\n" for n in range(60)))
    return str(path)
