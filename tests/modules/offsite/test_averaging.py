"""The mean of prefixes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulgurite.errors import InputError
from fulgurite.modules.offsite import Prefix, PrefixSettings
from fulgurite.modules.offsite.averaging import average_prefixes


def prefix_of(*values, length=2):
    settings = PrefixSettings("prompts", length, tuple(range(len(values))))
    return Prefix(settings, [torch.full((length, 3), float(value)) for value in values])


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 1000)), min_size=1, max_size=5))
def test_the_mean_is_weighted_by_examples(parties):
    values, examples = zip(*parties)
    if not sum(examples):
        return
    (rows,) = average_prefixes([prefix_of(value) for value in values], examples).rows
    expected = sum(value * count for value, count in parties) / sum(examples)
    torch.testing.assert_close(rows, torch.full_like(rows, expected), rtol=1e-6, atol=1e-4)


def test_one_party_alone_and_equal_ones_stay_as_they_are():
    one = prefix_of(0.1, -3e-7)
    for mean in (average_prefixes([one], [7]), average_prefixes([one, one, one], [1, 1, 2])):
        assert mean.settings == one.settings
        assert all(torch.equal(rows, other) for rows, other in zip(mean.rows, one.rows))


@pytest.mark.parametrize(
    ("prefixes", "examples", "match"),
    [
        ([], [], "for 0 prefixes"),
        ([prefix_of(1)], [0], "not all 0"),
        ([prefix_of(1), prefix_of(2)], [1], "each needs its number"),
        ([prefix_of(1), prefix_of(2)], [3, -1], "0 or more"),
        ([prefix_of(1), prefix_of(2, length=4)], [1, 1], "Prefix 1 is .* they have no mean"),
        ([prefix_of(1), prefix_of(float("nan"))], [1, 1], "Prefix 1 holds numbers that are not finite"),
    ],
)
def test_what_has_no_mean_is_refused(prefixes, examples, match):
    with pytest.raises(InputError, match=match):
        average_prefixes(prefixes, examples)
