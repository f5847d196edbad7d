"""Operators: what they do to tensors is what their matrices do, and their gradients are those of finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fulgurite.errors import InputError
from fulgurite.modules.fusion import BlockLocal, Dense, HeadRotations, Selection
from fulgurite.modules.fusion.operators import matrix_of


def operators():
    torch.manual_seed(0)
    rotations = HeadRotations(torch.tensor([2, 0]), 3, 4)
    with torch.no_grad():
        rotations.weight.normal_()
    return {
        "selection": Selection(torch.tensor([1, 4, 5, 11]), 12),
        "dense": Dense(torch.randn(6, 12)),
        "block": BlockLocal(torch.randn(6, 12), torch.randperm(6), torch.randperm(12), 3),
        "rotations": rotations,
    }


@pytest.mark.parametrize("name", ["selection", "dense", "block", "rotations"])
def test_reduce_and_expand_are_products_with_the_matrix(name):
    operator = operators()[name]
    matrix = matrix_of(operator).detach()
    wide, narrow = torch.randn(2, 5, 12), torch.randn(2, 5, operator.small)
    assert matrix.shape == (operator.small, 12)
    torch.testing.assert_close(operator.reduce(wide), wide @ matrix.T)
    torch.testing.assert_close(operator.expand(narrow), narrow @ matrix)


@pytest.mark.parametrize("name", ["dense", "block", "rotations"])
def test_gradients_are_those_of_finite_differences(name):
    operator = operators()[name].double()
    wide = torch.randn(2, 12, dtype=torch.float64)
    narrow = torch.randn(2, operator.small, dtype=torch.float64)

    def both(weight):
        call = torch.func.functional_call
        reduced = call(_Applied(operator, "reduce"), {"operator.weight": weight}, (wide,))
        return reduced, call(_Applied(operator, "expand"), {"operator.weight": weight}, (narrow,))

    assert torch.autograd.gradcheck(both, (operator.weight.detach().requires_grad_(True),))


class _Applied(torch.nn.Module):
    def __init__(self, operator, how):
        super().__init__()
        self.operator, self.how = operator, how

    def forward(self, tensor):
        return getattr(self.operator, self.how)(tensor)


def test_blocks_lose_only_what_lies_outside_of_them():
    small_order, large_order = torch.tensor([3, 0, 1, 2]), torch.tensor([5, 1, 7, 0, 2, 3, 4, 6])
    start = torch.arange(32.0).view(4, 8) + 1
    matrix = matrix_of(BlockLocal(start, small_order, large_order, 2))
    inside = torch.zeros(4, 8, dtype=torch.bool)
    for rows, columns in (([3, 0], [5, 1, 7, 0]), ([1, 2], [2, 3, 4, 6])):
        inside[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    assert torch.equal(matrix, start * inside)


def test_blocks_are_made_where_their_matrix_is():
    """Also while a Trainer makes models on another device."""
    made = torch.randn(6, 12), torch.randperm(6), torch.randperm(12), 3
    with torch.device("meta"):
        operator = BlockLocal(*made)
    assert torch.equal(operator.weight, BlockLocal(*made).weight)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="5 blocks do not divide a width of 12 fused to 6"):
        BlockLocal(torch.randn(6, 12), torch.arange(6), torch.arange(12), 5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.integers(0, 50))
def test_rotations_commute_with_rotary_embeddings(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    heads, size, length = 3, 8, 4
    operator = HeadRotations(torch.tensor([1, 2]), heads, size).double()
    with torch.no_grad():
        operator.weight.copy_(torch.randn(operator.weight.shape, generator=generator, dtype=torch.float64))
    angles = (torch.arange(length) + shift)[:, None] * 10000 ** (-torch.arange(0, size, 2) / size)
    cos, sin = (turn(torch.cat([angles, angles], dim=-1))[None].double() for turn in (torch.cos, torch.sin))

    def turned(states):  # [batch, length, heads * size]
        wide = states.unflatten(-1, (-1, size)).transpose(1, 2)
        return apply_rotary_pos_emb(wide, wide, cos, sin)[0].transpose(1, 2).flatten(-2)

    states = torch.randn(1, length, heads * size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(operator.reduce(turned(states)), turned(operator.reduce(states)))
