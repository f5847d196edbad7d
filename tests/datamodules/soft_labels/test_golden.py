"""Stores written by each version of the format are read bit for bit, by this and by every later release.

``golden/<name>/store`` was written by the release that brought the version; ``expected.json`` has hashes of what it read then.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fulgurite.datamodules.soft_labels import SoftLabelStore

GOLDEN = Path(__file__).parent / "golden"
FIELDS = ("tokens", "starts", "supervised", "counts", "ids", "probabilities", "tail", "realised")


def contents(store):
    """Hashes of all arrays of a store by key and name."""
    found = {}
    for key in store.keys:
        sequence = store.read(key)
        found[key.hex()] = {name: digest(getattr(sequence, name)) for name in FIELDS}
    return found


def digest(array):
    """Hash of type, shape and bytes."""
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def expected(name):
    """What a golden store held when it was written."""
    return json.loads((GOLDEN / name / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_stores_of_every_version_are_read_bit_for_bit(name):
    store = SoftLabelStore(GOLDEN / name / "store")
    assert len(list(store.verify())) == len(store) > 2
    assert contents(store) == expected(name)
