import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.soft_labels.codec import PlainCodec, StoredSequence, StoreError

COLUMNS = ("tokens", "starts", "supervised", "counts", "ids", "probabilities", "tail", "realised")


@st.composite
def sequences(draw):
    vocabulary = draw(st.integers(1, 300_000))
    length = draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    supervised = random.random(length) < draw(st.floats(0, 1))
    count = int(supervised.sum())
    counts = random.integers(0, 9, count).astype(np.uint32)
    kept = int(counts.sum())
    return vocabulary, StoredSequence(
        tokens=random.integers(0, vocabulary, length).astype(np.uint32)[: length * draw(st.booleans())],
        starts=np.flatnonzero(random.random(length) < 0.2).astype(np.uint32),
        supervised=supervised,
        counts=counts,
        ids=random.integers(0, vocabulary, kept).astype(np.uint32),
        probabilities=random.integers(0, 2**16, kept).astype(np.uint16),
        tail=random.integers(0, 2**16, count).astype(np.uint16),
        realised=random.integers(0, 2**16, count).astype(np.uint16),
    )


@given(sequences())
@settings(max_examples=200, deadline=None)
def test_decoding_gives_back_what_was_encoded(made):
    vocabulary, sequence = made
    codec = PlainCodec(vocabulary)
    data = codec.encode(sequence)
    again = codec.decode(data)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(again, name), getattr(sequence, name))
    bits = max(1, (vocabulary - 1).bit_length())
    assert len(data) <= 20 + 4 * 2 * 40 + 5 + 8 * len(sequence.counts) + len(sequence.ids) * (2 + bits / 8) + 1


@given(sequences(), st.data())
@settings(max_examples=100, deadline=None)
def test_cut_off_records_are_refused(made, data):
    vocabulary, sequence = made
    encoded = PlainCodec(vocabulary).encode(sequence)
    with pytest.raises(StoreError):
        PlainCodec(vocabulary).decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
