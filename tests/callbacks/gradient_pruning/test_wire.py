import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.callbacks.gradient_pruning.wire import BLOCK, Layout, pack, select, sparse_pays, unpack

sizes = st.one_of(st.integers(1, 400), st.integers(BLOCK - 2, BLOCK + 2), st.just(3 * BLOCK + 17))
shares = st.sampled_from([1e-5, 0.004, 0.01, 0.0625, 0.1, 0.25, 0.5, 0.99])


def vector(size, kind, seed=0):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=draw)
    if kind == "zeros":
        return torch.zeros(size)
    if kind == "equal":
        return torch.ones(size)
    if kind == "skewed":  # all that is large lies in places that the sample does not see
        values *= 1e-6
        values[1::7] *= 1e6
    return values


@settings(max_examples=60, deadline=None)
@given(sizes, shares, st.sampled_from(["normal", "zeros", "equal", "skewed"]), st.integers(0, 40))
def test_counts_follow_sizes_alone_and_messages_come_back(size, keep, kind, turn):
    layout, values = Layout(size, keep), vector(size, kind)
    places = select(values, layout, turn)
    assert len(places) == layout.count
    assert (places[1:] > places[:-1]).all()
    for block, count in enumerate(layout.counts()):
        assert int(((places >= block * BLOCK) & (places < (block + 1) * BLOCK)).sum()) == count
    message = torch.empty(layout.bytes, dtype=torch.uint8)
    sent = pack(values, places, layout, message)
    assert torch.equal(sent, values[places].to(torch.bfloat16).float())
    found, values_found = unpack(message, layout)
    assert torch.equal(found, places)
    assert torch.equal(values_found, sent)


@pytest.mark.parametrize("keep", [0.004, 0.01, 0.1])
def test_what_is_selected_is_nearly_the_largest(keep):
    values = vector(4 * BLOCK, "normal")
    layout = Layout(len(values), keep)
    best = values.abs().topk(layout.count).values.sum()
    assert values[select(values, layout)].abs().sum() > 0.95 * best


def test_the_smaller_form_is_chosen():
    assert Layout(BLOCK, 0.01).form == "ids"
    assert Layout(BLOCK, 0.01).bytes == 4 * 656
    assert Layout(BLOCK, 0.25).form == "mask"
    assert Layout(BLOCK, 0.25).bytes == BLOCK // 8 + 2 * BLOCK // 4


def test_a_sparse_exchange_stops_paying_with_more_ranks():
    # 4 bytes an entry, all-reduce in 2 bytes: pays below 1 / P
    assert sparse_pays(0.01, 8)
    assert sparse_pays(0.05, 16)
    assert not sparse_pays(0.05, 32)
    assert sparse_pays(0.05, 32, dense_bytes=4)
    assert sparse_pays(0.9, 2)
    assert not sparse_pays(0.95, 2)
