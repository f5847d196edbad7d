"""Streamed influence against the formulas written out on whole attention maps, and against real ablation."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from fulgurite.modules.span_attention.rules import SpanPlan, full_layers
from fulgurite.modules.span_attention.runtime import apply_plan, remove_plan
from fulgurite.modules.spans import DENSE, SpanRule
from fulgurite.modules.spans import influence as module
from fulgurite.modules.spans.ablation import ablate, exchange
from fulgurite.modules.spans.fidelity import answer_states, fidelity
from fulgurite.modules.spans.influence import influences
from fulgurite.modules.spans.measurements import Answered, loss_of

from ..span_attention.small import KINDS, ids_of, model_of, plan_for

RULES = [SpanRule(4), SpanRule(-2, 0.25), SpanRule(40), DENSE]
SINK, START, LENGTH = 2, 90, 100


def answer_log_probabilities(model, text):
    with torch.no_grad():
        return (answer_states(model, text) @ model.lm_head.weight.T).log_softmax(-1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))


def written_out(model, ids, loss):
    """The sums of ``influences``, from whole maps of eager attention and their gradients."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    maps = {}

    def keep(layer):
        def hook(_, args, output):
            output[1].retain_grad()
            maps[layer] = output[1]

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(keep(number))
    embedded = model.get_input_embeddings()(ids[None, :-1]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0, START - 1 :]
    loss_of(logits.clone(), ids[START:], loss).mean().backward()
    heads = model.config.num_key_value_heads
    sums = np.zeros((2, 3, len(maps), heads, len(RULES)))
    i = torch.arange(LENGTH - 1)
    for number, full in enumerate(full_layers(model.config)):
        if not full:
            continue
        weights, gradient = maps[number].detach()[0], maps[number].grad[0]
        mean = (weights * gradient).sum(-1, keepdim=True)
        for place, rule in enumerate(RULES):
            span = torch.tensor([rule.span(row) for row in i.tolist()])
            far = ((i[:, None] - i[None] >= span[:, None]) & (i[None] >= SINK)).double()
            single = ((weights * (mean - gradient) / (1 - weights).clamp(min=1e-6)).abs() * far).sum(-1)
            stays = weights * (1 - far)
            net = (stays * (gradient - mean)).sum(-1) / stays.sum(-1)  # (what is dropped and what stays add up to 0)
            for form, values in enumerate((single, net, net.abs())):
                by_head = values.unflatten(0, (heads, -1)).sum(1)
                sums[1, form, number, :, place] = by_head.sum(-1).numpy()
                sums[0, form, number, :, place] = by_head[:, START - 1 :].sum(-1).numpy()
    return sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_the_stream_gives_what_whole_maps_give(kind, loss):
    model, ids = model_of(kind), ids_of(1, LENGTH)[0]
    found = influences(model, ids, START, RULES, sink=SINK, loss=loss)
    wanted = written_out(model, ids, loss)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert not found[..., -1].any(), "the whole text costs nothing"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_checkpointed_layers_give_the_same(monkeypatch):
    model, ids = model_of("llama"), ids_of(1, LENGTH)[0]
    wanted = influences(model, ids, START, RULES, sink=SINK)
    monkeypatch.setattr(module, "_CHECKPOINTED", 10)
    np.testing.assert_allclose(influences(model, ids, START, RULES, sink=SINK), wanted, rtol=1e-5, atol=1e-8)
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_gradients_are_taken_with_the_spans_of_a_plan(kind):
    model, ids = model_of(kind), ids_of(1, LENGTH)[0]
    whole = SpanPlan.same(DENSE, model.config, sink=SINK)
    dense = influences(model, ids, START, RULES, sink=SINK)
    np.testing.assert_allclose(influences(model, ids, START, RULES, sink=SINK, plan=whole), dense, rtol=1e-3, atol=1e-5)
    # In the last layer what a head has itself changes nothing to first order; what all heads before it have does.
    last = SpanPlan.same(SpanRule(4), model.config, sink=SINK)
    assert not np.allclose(influences(model, ids, START, RULES, sink=SINK, plan=last), dense, rtol=0.1, atol=1e-3)


def test_net_influence_is_the_change_to_first_order():
    # Of a head that hardly matters, the first order is nearly all.
    model, ids = model_of("llama"), ids_of(1, LENGTH)[0]
    layer = model.model.layers[-1].self_attn
    with torch.no_grad():
        layer.o_proj.weight *= 1e-3
        layer.q_proj.weight *= 0.3  # no row that looks at far keys alone, whose few others would be all rounding
    found = influences(model, ids, START, [SpanRule(4)], sink=SINK, loss="cross_entropy")[1, 1, -1, :, 0]
    real = ablate(model, [Answered(ids, START, 0)], SpanRule(4), sink=SINK, loss="cross_entropy")[0, -1]
    np.testing.assert_allclose(found, real, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_ablation_is_the_loss_with_one_head_cut(kind):
    model, ids = model_of(kind), ids_of(1, LENGTH)[0]
    text = Answered(ids, START, 0)
    changes = ablate(model, [text], SpanRule(4), sink=SINK, loss="margin")[0]
    dense = loss_of(answer_log_probabilities(model, text), ids[START:], "margin").mean()
    plain = SpanPlan.same(DENSE, model.config, sink=SINK)
    for layer, rules in enumerate(plain.rules):
        for head in range(3):
            if rules is None:
                assert changes[layer, head] == 0
                continue
            cut = tuple(SpanRule(4) if head == other else DENSE for other in range(3))
            plan = SpanPlan(tuple(cut if layer == number else whole for number, whole in enumerate(plain.rules)), SINK)
            ours = loss_of(answer_log_probabilities(apply_plan(model_of(kind), plan), text), ids[START:], "margin").mean()
            assert changes[layer, head] == pytest.approx(float(ours - dense), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_heads_are_exchanged_in_the_last_rows_alone(kind):
    model, ids = model_of(kind), ids_of(1, LENGTH)[0]
    text, plan = Answered(ids, START, 0), plan_for(model_of(kind))
    other = SpanPlan.same(SpanRule(3), model.config, sink=plan.sink)
    changes = exchange(model, [text], plan, other, loss="cross_entropy", before=20)[0]
    start = START - 1 - 20

    def loss(tail):
        cache = DynamicCache()
        with torch.no_grad():
            apply_plan(model, plan)
            model(ids[None, :start], past_key_values=cache)
            logits = apply_plan(model, tail)(ids[None, start:-1], past_key_values=cache).logits[0, 20:]
        remove_plan(model)
        return float(torch.nn.functional.cross_entropy(logits, ids[START:]))

    unchanged, seen = loss(plan), 0
    for layer, rules in enumerate(plan.rules):
        for head in range(3 if rules else 0):
            own = (*rules[:head], SpanRule(3), *rules[head + 1 :])
            tail = SpanPlan((*plan.rules[:layer], own, *plan.rules[layer + 1 :]), plan.sink)
            assert changes[layer, head] == pytest.approx(loss(tail) - unchanged, abs=1e-5)
            seen += abs(changes[layer, head]) > 1e-4
    assert seen > 1
    assert np.allclose(
        exchange(model, [text], plan, other, loss="cross_entropy", before=LENGTH),
        exchange(model, [text], plan, other, loss="cross_entropy"),
        atol=1e-6,
    )


def test_fidelity_compares_with_the_dense_model():
    model, ids = model_of("llama"), ids_of(1, LENGTH)[0]
    dense, cut = fidelity(model, [SpanPlan.same(DENSE, model.config), plan_for(model)], [Answered(ids, START, 0)])
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert dense.agreement == 1
    assert dense.loss == pytest.approx(dense.dense_loss, abs=1e-6)
    log_probabilities = answer_log_probabilities(apply_plan(model_of("llama"), plan_for(model)), Answered(ids, START, 0))
    assert cut.loss == pytest.approx(float(-log_probabilities.gather(1, ids[START:, None]).mean()), abs=1e-6)
    assert cut.kl > 0.001
