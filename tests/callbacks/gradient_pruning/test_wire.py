import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.callbacks.gradient_pruning import wire
from fulgurite.callbacks.gradient_pruning.wire import (
    BLOCK,
    Layout,
    in_two_phases,
    link_bytes,
    pack,
    select,
    sparse_pays,
    unpack,
)

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
@given(sizes, shares, st.sampled_from(["normal", "zeros", "equal", "skewed"]), st.integers(0, 40), st.sampled_from([4, 16]))
def test_counts_follow_sizes_alone_and_messages_come_back(size, keep, kind, turn, value_bits):
    layout, values = Layout(size, keep, value_bits), vector(size, kind)
    chosen = select(values, layout, turn)
    places = torch.arange(size)[chosen]
    assert len(places) == layout.count
    assert (places[1:] > places[:-1]).all()
    for block, count in enumerate(layout.counts()):
        assert int(((places >= block * BLOCK) & (places < (block + 1) * BLOCK)).sum()) == count
    message = torch.empty(layout.bytes, dtype=torch.uint8)
    sent = pack(values, chosen, layout, message)
    if value_bits == 16:
        assert torch.equal(sent, values[places].to(torch.bfloat16).float())
    else:
        assert ((sent - values[places]).abs() <= values.abs().max() / 7).all()
    found, values_found = unpack(message, layout)
    assert torch.equal(torch.arange(size)[found], places)
    assert torch.equal(values_found, sent)


@pytest.mark.parametrize("keep", [0.004, 0.01, 0.1])
def test_what_is_selected_is_nearly_the_largest(keep):
    values = vector(4 * BLOCK, "normal")
    layout = Layout(len(values), keep)
    best = values.abs().topk(layout.count).values.sum()
    assert values[select(values, layout)].abs().sum() > 0.95 * best


def test_four_bits_carry_nearly_all_of_the_energy():
    values = vector(4 * BLOCK + 999, "normal") * vector(4 * BLOCK + 999, "normal", seed=1)
    layout = Layout(len(values), 0.9, 4)
    sent = pack(values, select(values, layout), layout, torch.empty(layout.bytes, dtype=torch.uint8))
    assert (sent - values).square().sum() < 0.03 * values.square().sum()
    assert layout.bytes < 0.51 * len(values)


@pytest.mark.parametrize("value_bits", [4, 16])
def test_what_is_not_finite_is_seen_by_all(value_bits):
    values = vector(1000, "normal")
    values[17] = float("nan")
    layout = Layout(1000, 0.95, value_bits)
    places = select(values, layout)
    assert not pack(values, places, layout, torch.empty(layout.bytes, dtype=torch.uint8)).isfinite().all()


def test_the_smaller_form_is_chosen():
    assert Layout(BLOCK, 0.8, 4).form == "all"
    assert Layout(BLOCK, 0.8, 4).bytes == BLOCK // 2 + BLOCK // 128
    assert Layout(BLOCK, 0.5, 4).form == "mask"
    assert Layout(BLOCK, 0.01).form == "ids"
    assert Layout(BLOCK, 0.01).bytes == 4 * 656
    assert Layout(BLOCK, 0.25).form == "mask"
    assert Layout(BLOCK, 0.25).bytes == BLOCK // 8 + 2 * BLOCK // 4


def test_the_exchange_of_fewer_bytes_is_taken():
    assert not in_two_phases(1.0, 2, 4)
    assert in_two_phases(1.0, 3, 4)
    assert not in_two_phases(0.01, 4, 4)  # what four ranks select is more to send again than to send round
    assert in_two_phases(0.01, 32, 4)
    gathered, phases = link_bytes(0.25, 4)  # 16 bits a value, and one of eight for its place; the sum has all
    assert gathered == pytest.approx(3 * (0.125 + 0.25 * 2))
    assert phases == pytest.approx(0.75 * (0.125 + 0.25 * 2 + 2))


def test_a_sparse_exchange_pays_where_its_bytes_are_fewer():
    assert sparse_pays(0.01, 8)
    assert sparse_pays(0.05, 32)
    assert sparse_pays(0.9, 2)
    assert not sparse_pays(0.95, 2)
    assert not sparse_pays(0.95, 32)
    assert sparse_pays(0.95, 32, dense_bytes=4)
    assert sparse_pays(0.95, 1)  # nothing is sent


@pytest.mark.parametrize("count", [1, 655, 6553, 65535, 65536])
@pytest.mark.parametrize("values", ["normal", "few", "nan"])
def test_blocks_together_and_one_by_one_select_the_same(count, values):
    vector = torch.randn(3 * wire.BLOCK, generator=torch.Generator().manual_seed(0))
    if values == "few":  # a sample says too little of them
        vector = torch.where(torch.arange(len(vector)) % 5000 == 17, vector, torch.zeros(()))
    if values == "nan":
        vector[70000] = float("nan")
    for turn in (0, 3):
        together = wire._select_blocks(vector.view(-1, wire.BLOCK).abs(), count, turn)
        one_by_one = torch.from_numpy(wire._select_one_by_one(vector.numpy(), count, turn))
        assert len(one_by_one) == len(together) == 3 * count
        if values == "normal":
            assert torch.equal(one_by_one, together)
        chosen = vector[one_by_one].abs()
        assert len(set(one_by_one.tolist())) == 3 * count
        if values == "few":
            assert int((chosen > 0).sum()) >= min(3 * count, 3 * 12)
