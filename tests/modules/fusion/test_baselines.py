"""The published starts, against their formulas."""

import copy

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.fusion import AverageLayers, FreshModel, FusionShape, KeepLayers, LayerCollapse, ReplacementLayer
from fulgurite.modules.fusion.baselines import _behind, _collapsed, _last_states, _streams

from .small import LAYERS, logits, model_of, text

WEIGHT = "mlp.down_proj.weight"


def shape_of(model, layers):
    return FusionShape(num_hidden_layers=layers).resolve(model.config)


def quiet_layers(model, *places, factor=1e-3):
    """Make layers that hardly change the residual stream."""
    for place in places:
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            model.model.layers[place].get_submodule(name).weight.data *= factor
    return model


def weights(model, name=WEIGHT):
    return [layer.get_parameter(name).detach().clone() for layer in model.model.layers]


def test_block_influence_keeps_the_layers_that_change_most():
    model = quiet_layers(model_of("llama"), 1, 3)
    before = weights(model)
    small, found = KeepLayers().build(model, shape_of(model, 3), text(3))
    assert found == [0, 2, 4]
    assert all(torch.equal(new, before[old]) for new, old in zip(weights(small), [0, 2, 4]))


@pytest.mark.parametrize(("layers", "kept"), [(3, [0, 2, 3]), (4, [0, 1, 2, 4]), (1, [0])])
def test_first_of_pairs_are_spread_over_the_depth(layers, kept):
    model = model_of("qwen3")
    before = weights(model)
    small, found = KeepLayers(by="first_of_pairs").build(model, shape_of(model, layers), [])
    assert found == kept
    assert all(torch.equal(new, before[old]) for new, old in zip(weights(small), kept))
    assert logits(small).isfinite().all()


def test_average_is_the_mean_of_neighbours():
    model = model_of("llama")
    before = weights(model)
    small, _ = AverageLayers().build(model, shape_of(model, 3), [])
    groups = ([0, 1], [2], [3, 4])
    for new, group in zip(weights(small), groups):
        torch.testing.assert_close(new, torch.stack([before[place] for place in group]).mean(dim=0))


def test_collapse_adds_differences_and_keeps_the_earlier_layer():
    model = model_of("llama")
    before = weights(model)
    found = weights(_collapsed(model, 1, 2))
    assert len(found) == 3
    torch.testing.assert_close(found[1], before[1] + (before[2] - before[1]) + (before[3] - before[1]))
    assert torch.equal(found[2], before[4])
    assert torch.equal(weights(model)[1], before[1])  # the model itself is left alone


@pytest.mark.parametrize("merged", [3, 4])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_collapse_reaches_every_depth(layers, merged):
    model = model_of("llama")
    small, _ = LayerCollapse(merged=merged).build(model, shape_of(model, layers), text(2))
    assert len(small.model.layers) == small.config.num_hidden_layers == layers
    assert logits(small).isfinite().all()


def test_collapse_prefers_what_changes_little():
    """With layers that do nothing at the rear, they are what is folded, and the model stays as it was."""
    model = quiet_layers(model_of("llama"), 3, 4)
    goal = _last_states(model, text(2))
    small, _ = LayerCollapse(merged=2, interval=1, threshold=0.999).build(copy.deepcopy(model), shape_of(model, 4), text(2))
    assert torch.cosine_similarity(_last_states(small, text(2)), goal, dim=-1).mean() > 0.99


def test_replacement_stands_for_the_layers_that_change_least_and_learns_what_they_said():
    model = quiet_layers(model_of("llama"), 2, 3, factor=0.3)
    rows, before = text(4), weights(model)
    streams = [_streams(model, row) for row in rows]

    def missing(steps):
        small, _ = ReplacementLayer(steps=steps, learning_rate=1e-3).build(copy.deepcopy(model), shape_of(model, 4), rows)
        assert all(parameter.requires_grad for parameter in small.parameters())
        assert torch.equal(weights(small)[1], before[1])
        assert torch.equal(weights(small)[3], before[4])
        with torch.no_grad():
            found = [_behind(small, small.model.layers[2], row) for row in rows]
        return sum(float((states - own[4]).square().mean()) for states, own in zip(found, streams))

    assert missing(40) < missing(0)


def test_fresh_model_is_random_and_of_the_shape():
    model = model_of("llama")
    torch.manual_seed(1)
    small, _ = FreshModel().build(model, FusionShape(num_hidden_layers=2, hidden_size=24).resolve(model.config), [])
    assert (small.config.num_hidden_layers, small.config.hidden_size, LAYERS) == (2, 24, 5)
    assert not torch.equal(weights(small)[0][:24, :24], weights(model)[0][:24, :24])


@pytest.mark.parametrize("start", [KeepLayers(), AverageLayers(), LayerCollapse(), ReplacementLayer()])
def test_starts_that_drop_layers_refuse_other_widths(start):
    config = model_of("llama").config
    with pytest.raises(InputError, match=f"{type(start).__name__} only drops layers, but shape.intermediate_size=24"):
        start.stages(config, FusionShape(intermediate_size=24).resolve(config))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KeepLayers(by="loss"), "by='loss' is unknown. Legal: block_influence, first_of_pairs"),
        (lambda: LayerCollapse(merged=1), "merged=1 merges nothing"),
        (lambda: LayerCollapse(interval=0), "interval=0 does not move on"),
        (lambda: LayerCollapse(threshold=0), "threshold=0 is no cosine"),
        (lambda: ReplacementLayer(steps=-1), "steps=-1 is below 0"),
        (lambda: ReplacementLayer(learning_rate=0), "learning_rate=0 moves nothing"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
