"""Shapes, selections, folds and refits: where fusion starts."""

import copy

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.fusion import (
    FusionOperators,
    FusionShape,
    OperatorForms,
    fuse,
    initial_operators,
    materialise,
    refit,
    second_moments,
    select_widths,
)
from fulgurite.modules.fusion.selection import fold
from fulgurite.modules.fusion.shape import count_parameters
from fulgurite.modules.fusion.statistics import Moments, rows_of, taylor_scores
from fulgurite.modules.student import keep_layers
from fulgurite.modules.tiny import tiny_model

from .small import LAYERS, batch_of, logits, model_of, text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 9}, r"shape.num_hidden_layers=9: the model has 5. Legal: 1 to 5"),
        ({"hidden_size": 0}, r"shape.hidden_size=0: the model has 48"),
        ({"num_attention_heads": 4}, r"shape.num_attention_heads=4 cannot be divided among shape.num_key_value_heads=3"),
        ({"hidden_size": 47}, r"saves no llama model of these sizes: .*47.* is not a multiple of the number of attention heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, r"is 3 query heads for each key/value head, but the model has 2"),
        ({}, r"every size is the model's own \(num_hidden_layers=5, hidden_size=48"),
        ({"parameters": 3000}, r"shape.parameters=3,000 is too few: .* the least is [\d,]+"),
    ],
)
def test_shapes_that_cannot_be_are_refused_with_the_numbers(sizes, message):
    with pytest.raises(InputError, match=message):
        FusionShape(**sizes).resolve(model_of("llama").config)


def test_a_budget_leaves_the_kept_layers_and_one_more():
    config = tiny_model().config
    assert FusionShape(parameters=40_000, kept_layers=2).resolve(config).num_hidden_layers == 3
    with pytest.raises(InputError, match=r"shape.parameters=33,000 is too few: .* the least is 45,440"):
        FusionShape(parameters=33_000, kept_layers=3).resolve(config)


def test_unknown_architecture_is_refused():
    config = model_of("llama").config
    config.model_type = "mamba"
    with pytest.raises(InputError, match="type 'mamba' cannot be fused.*Legal: llama, mistral"):
        FusionShape(num_hidden_layers=2).resolve(config)


def test_attention_spans_are_refused_before_they_are_lost():
    config = model_of("llama").config
    config.span_plan = {}
    with pytest.raises(InputError, match="has attention spans.*give the result spans afterwards"):
        FusionShape(num_hidden_layers=2).resolve(config)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_a_budget_is_kept_and_used(kind):
    config = model_of(kind, intermediate_size=640, num_hidden_layers=LAYERS).config
    for budget in (150_000, 250_000, 400_000):
        shape = FusionShape(parameters=budget).resolve(config)
        assert 0.7 * budget < count_parameters(config, shape) <= budget
        deep = FusionShape(parameters=budget, intermediate_size=192).resolve(config)
        assert deep.intermediate_size == 192
        assert count_parameters(config, deep) <= budget


def test_moments_leave_padding_out():
    model, batch = model_of("llama"), batch_of(3)
    whole = second_moments(model, text(3))
    padded = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in batch.items()}
    found = second_moments(model, rows_of({**padded, "lengths": torch.tensor([32, 32, 32])}))
    assert found.activations[0].tokens == whole.activations[0].tokens == 96
    torch.testing.assert_close(found.residual.sum, whole.residual.sum)


def test_taylor_scores_are_the_gradients_of_gates():
    """``|x dL/dx|`` of an input is the derivative by a gate on it, token by token."""
    model, rows = model_of("llama"), text(1, 12)
    neurons, _ = taylor_scores(model, rows)
    down = model.model.layers[2].mlp.down_proj
    gates = torch.ones(1, 12, model.config.intermediate_size, requires_grad=True)
    handle = down.register_forward_pre_hook(lambda module, args: (args[0] * gates,))
    model(**rows[0], use_cache=False).loss.backward()
    handle.remove()
    # transformers' loss is the mean over the same 11 tokens; ours is summed and divided by them.
    torch.testing.assert_close(neurons[2], gates.grad[0].abs().sum(dim=0), atol=1e-6, rtol=1e-4)


def test_fold_is_least_squares_and_held_out_text_chooses_its_ridge():
    torch.manual_seed(0)
    inputs, other, weight = torch.randn(400, 12) @ torch.randn(12, 12), torch.randn(400, 12), torch.randn(5, 12)
    kept = torch.tensor([0, 3, 7, 9])
    seen, test = Moments(12, torch.device("cpu")), Moments(12, torch.device("cpu"))
    seen.add(inputs)
    test.add(other)
    exact = torch.linalg.lstsq(inputs[:, kept], inputs).solution
    torch.testing.assert_close(fold(kept, weight, seen), exact, atol=1e-2, rtol=1e-2)

    def error(matrix):
        return (other @ weight.T - other[:, kept] @ (weight @ matrix.T).T).square().sum()

    # Independent inputs tell nothing of each other, so that the strongest ridge is best on the other text.
    assert error(fold(kept, weight, seen, test)) < error(fold(kept, weight, seen))


def distance(model, other):
    batch = batch_of()
    first, second = logits(model, batch).log_softmax(-1), logits(other, batch).log_softmax(-1)
    return float((first.exp() * (first - second)).sum(dim=-1).mean())


@pytest.mark.parametrize("score", ["energy", "taylor"])
def test_selections_beat_chance_and_folds_beat_selections(score):
    model = model_of("llama", intermediate_size=96)
    rows = text()
    shape, statistics = FusionShape(intermediate_size=48).resolve(model.config), second_moments(model, rows)
    chosen = select_widths(model, shape, statistics, rows, score)

    def closeness(selections, neurons="frozen", folded=True):
        forms = OperatorForms(neurons=neurons)
        operators = initial_operators(model, shape, selections, statistics, None, forms, folded=folded)
        return distance(model, materialise(fuse(copy.deepcopy(model), shape, operators)))

    worst = [copy.deepcopy(one) for one in chosen]
    for one in worst:
        one.neurons = torch.tensor(sorted(set(range(96)) - set(one.neurons.tolist())))
    bare = closeness(chosen, folded=False)
    assert bare < closeness(worst, folded=False)
    assert closeness(chosen) < bare
    assert closeness(chosen, "dense") == closeness(chosen)


@pytest.mark.parametrize("residual", [None, "frozen"])
@pytest.mark.parametrize("heads", ["dense", "block", "frozen"])
@pytest.mark.parametrize("neurons", ["dense", "block", "frozen"])
def test_all_forms_start_and_keep_their_shape(neurons, heads, residual):
    model = model_of("qwen2")
    shape = FusionShape(hidden_size=40, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2).resolve(model.config)
    rows = text(4)
    statistics = second_moments(model, rows)
    forms = OperatorForms(residual=residual, neurons=neurons, heads=heads, block_size=8)
    operators = initial_operators(model, shape, select_widths(model, shape, statistics, rows), statistics, None, forms)
    fused = fuse(model, shape, operators).eval()
    learnt = {name.split(".")[2] for name, one in operators.layers.named_parameters(prefix="layers") if one.requires_grad}
    assert ("neurons" in learnt) == (neurons != "frozen")
    assert ("query" in learnt) == (heads != "frozen")
    assert any("residual" in name for name, _ in operators.named_parameters()) == (residual != "frozen")
    torch.testing.assert_close(logits(materialise(fused)), logits(fused), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"residual": "block"}, "the residual stream have no blocks"),
        ({"block_size": 1}, "block_size=1 mixes nothing"),
    ],
)
def test_forms_that_cannot_be_are_refused(forms, message):
    with pytest.raises(InputError, match=message):
        OperatorForms(**forms)


def test_blocks_that_no_width_has_are_refused():
    model = model_of("llama")
    shape = FusionShape(intermediate_size=23).resolve(model.config)
    rows = text(2)
    statistics = second_moments(model, rows)
    chosen = select_widths(model, shape, statistics, rows)
    with pytest.raises(InputError, match="a width of 48 fused to 23 has no common blocks that small"):
        initial_operators(model, shape, chosen, statistics, None, OperatorForms(neurons="block", block_size=8))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_refit_brings_a_model_without_some_layers_nearer(kind):
    model, kept = model_of(kind), [0, 1, 4]
    small = copy.deepcopy(model)
    keep_layers(small, kept)
    before = distance(model, small)
    missing = refit(small, model, kept, text(48))
    assert distance(model, small) < before
    assert len(missing) == 3
    assert missing[0] == pytest.approx(0, abs=1e-6)  # nothing is missing behind the first
    assert 0 < missing[1] < 1


def test_refit_leaves_a_whole_model_as_it_is():
    model = model_of("llama")
    same = copy.deepcopy(model)
    assert max(refit(same, model, list(range(LAYERS)), text(8))) < 1e-6
    torch.testing.assert_close(logits(same), logits(model))


def test_refit_on_a_single_row_fits_and_tests_on_it():
    model, kept = model_of("llama"), [0, 1, 4]
    small = copy.deepcopy(model)
    keep_layers(small, kept)
    assert len(refit(small, model, kept, text(1))) == 3
    assert logits(small).isfinite().all()


def test_refit_does_not_touch_what_stands_before_a_norm():
    model = model_of("gemma3")
    small = copy.deepcopy(model)
    keep_layers(small, [0, 1, 4])
    weights = copy.deepcopy(small.state_dict())
    assert refit(small, model, [0, 1, 4], text(4)) == []
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in weights.items())


def test_operators_absent_change_nothing():
    model = model_of("llama")
    shape = FusionShape(num_hidden_layers=4).resolve(model.config)
    statistics = second_moments(model, text(2))
    chosen = select_widths(model, shape, statistics, text(2))
    operators = initial_operators(model, shape, chosen, statistics, None, OperatorForms())
    assert isinstance(operators, FusionOperators)
    assert not list(operators.parameters())
