"""The operator model against plain models: pruned, dropped, unchanged, and materialised."""

import copy

import pytest
import torch

from fulgurite.modules.fusion import (
    BlockLocal,
    Dense,
    FusionOperators,
    FusionShape,
    HeadRotations,
    Selection,
    fuse,
    materialise,
)
from fulgurite.modules.fusion.fused import FusedLinear
from fulgurite.modules.fusion.shape import SIZES, count_parameters, head_dim
from fulgurite.modules.student import keep_layers

from .small import LAYERS, batch_of, logits, model_of

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]


def dimensions(heads, size):
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])


def everywhere(operators, layers=LAYERS):
    """The same kinds of operators in each layer, none of them shared."""
    return [copy.deepcopy(operators) for _ in range(layers)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_identity_operators_give_the_original(kind, tied):
    model = model_of(kind, tie_word_embeddings=tied)
    config, size = model.config, head_dim(model.config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shape = FusionShape(**{name: getattr(config, name) for name in SIZES})
    expected = logits(model)
    assert torch.equal(logits(fuse(copy.deepcopy(model), shape, FusionOperators([{}] * LAYERS)).eval()), expected)
    identities = {
        "query": HeadRotations(torch.arange(heads), heads, size),
        "key": HeadRotations(torch.arange(groups), groups, size),
        "value": Dense(torch.eye(groups * size)),
        "attended": Dense(torch.eye(heads * size)),
        "neurons": Dense(torch.eye(config.intermediate_size)),
        "activations": Dense(torch.eye(config.intermediate_size)),
    }
    operators = FusionOperators(everywhere(identities), residual=Dense(torch.eye(config.hidden_size)))
    fused = fuse(copy.deepcopy(model), shape, operators, field=1).eval()
    torch.testing.assert_close(logits(fused), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_selections_are_pruning_and_dropping(kind):
    model = model_of(kind)
    config, size = model.config, head_dim(model.config)
    neurons, heads, groups, kept = torch.tensor([1, 2, 5, 8, 13, 21]), [1, 4], [0, 2], [0, 2, 4]
    queries, keys = dimensions(heads, size), dimensions(groups, size)
    own = {
        "query": Selection(queries, config.num_attention_heads * size),
        "attended": Selection(queries, config.num_attention_heads * size),
        "key": Selection(keys, config.num_key_value_heads * size),
        "value": Selection(keys, config.num_key_value_heads * size),
        "neurons": Selection(neurons, config.intermediate_size),
        "activations": Selection(neurons, config.intermediate_size),
    }
    shape = FusionShape(3, config.hidden_size, len(neurons), 2, 2)
    fused = fuse(copy.deepcopy(model), shape, FusionOperators(everywhere(own)), centres=kept).eval()
    pruned = copy.deepcopy(model)
    keep_layers(pruned, kept)
    for layer in pruned.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear, rows in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
            linear.weight.data = linear.weight.data[rows]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, queries]
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = linear.weight.data[neurons]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, neurons]
        attention.num_key_value_groups = 1
    plain = materialise(fused)
    assert all(torch.equal(tensor, pruned.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(logits(plain), logits(pruned))
    torch.testing.assert_close(logits(fused), logits(pruned), atol=1e-5, rtol=1e-5)


def random_operators(config, size, hidden):
    """Operators of every kind, at random."""
    heads, groups, wide = config.num_attention_heads * size, config.num_key_value_heads * size, config.intermediate_size
    own = {
        "query": HeadRotations(torch.tensor([0, 1]), config.num_attention_heads, size),
        "key": HeadRotations(torch.tensor([2]), config.num_key_value_heads, size),
        "value": Dense(torch.randn(size, groups) / groups**0.5),
        "attended": Dense(torch.randn(2 * size, heads) / heads**0.5),
        "neurons": Dense(torch.randn(24, wide) / wide**0.5),
        "activations": BlockLocal(torch.randn(24, wide), torch.randperm(24), torch.randperm(wide), 8),
    }
    directions = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q[:hidden]
    return FusionOperators(everywhere(own), residual=Dense(directions))


@torch.no_grad()
def shuffle_depth(fused):
    for layer in fused.model.layers[1:-1]:
        layer.depth_coefficients.weight.normal_()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_materialised_model_equals_the_operator_model(kind, tied):
    model = model_of(kind, tie_word_embeddings=tied)
    shape = FusionShape(3, 32, 24, 2, 1)
    fused = fuse(model, shape, random_operators(model.config, head_dim(model.config), 32), centres=[0, 2, 4], field=1).eval()
    shuffle_depth(fused)
    plain = materialise(fused)
    assert sum(parameter.numel() for parameter in plain.parameters()) == count_parameters(model.config, shape)
    torch.testing.assert_close(logits(plain), logits(fused), atol=1e-4, rtol=1e-4)


def test_both_sides_give_the_same_and_train_the_same():
    """Few tokens go through the large weights, many through a small weight."""
    model = model_of("qwen2")
    fused = fuse(model, FusionShape(3, 32, 24, 2, 1), random_operators(model.config, 8, 32), centres=[0, 2, 4], field=1)
    shuffle_depth(fused)
    found = []
    for through in (0, 1 << 40):
        for module in fused.modules():
            if isinstance(module, FusedLinear):
                module._through = through
        fused.zero_grad()
        loss = fused(**{name: batch_of(2)[name] for name in ("input_ids", "position_ids", "labels")}, use_cache=False).loss
        loss.backward()
        trained = {name: parameter.grad.clone() for name, parameter in fused.named_parameters()}
        assert all(gradient.abs().sum() > 0 for gradient in trained.values())
        found.append((loss, trained))
    (first, ours), (second, theirs) = found
    torch.testing.assert_close(first, second)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3)


def test_only_operators_coefficients_and_norms_are_trained():
    model = model_of("llama")
    fused = fuse(model, FusionShape(3, 32, 24, 2, 1), random_operators(model.config, 8, 32), centres=[0, 2, 4], field=1)
    names = {name.split(".")[-2] if "norm" in name else name.split(".")[-1] for name, _ in fused.named_parameters()}
    assert names <= {"weight", "input_layernorm", "post_attention_layernorm", "norm"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in fused.parameters()}
