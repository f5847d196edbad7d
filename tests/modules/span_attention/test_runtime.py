"""Decoding with a cache of spans against the masked full forward, and against plain transformers."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig, MistralForCausalLM, StaticCache

from fulgurite.errors import InputError
from fulgurite.modules.span_attention import DENSE, SpanCache, SpanPlan, SpanRule, apply_plan, flex, load, plan_of, remove_plan
from fulgurite.modules.span_attention.attention import attentions
from fulgurite.modules.span_attention.cache import Slots
from fulgurite.modules.span_attention.windows import span_at

from .small import KINDS, RULES, SIZES, ids_of, model_of, plan_for


def slow_logits(model, plan, ids, padding=0):
    """What a model gives with a mask per head, by eager attention: the obvious reference.

    The mask of every layer is added to its scores by a hook on its attention function.
    """
    plain = remove_plan(copy.deepcopy(model))
    plain.set_attn_implementation("eager")
    length = ids.shape[1]
    i, j = torch.arange(length)[:, None] - padding, torch.arange(length)[None] - padding
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, rules in zip(plain.model.layers, plan.rules):
        if rules is None:
            continue
        masks = []
        for rule in rules:
            near = i - j < torch.tensor([rule.span(max(0, row - padding)) for row in range(length)])[:, None]
            masks.append(((i >= j) & (j >= 0) & (near | (j < plan.sink))) | (i == j))
        mask = torch.where(torch.stack(masks).repeat_interleave(group, 0)[None], 0.0, -1e30)
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
    attention_mask = torch.ones_like(ids)
    attention_mask[:, :padding] = 0
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return plain(ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits


def stepwise(model, plan, ids, chunks, attention_mask=None):
    """Logits of a text that comes in pieces."""
    cache, parts, seen = SpanCache(plan, model.config), [], 0
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for count in chunks:
            rows = slice(seen, seen + count)
            out = model(
                ids[:, rows],
                attention_mask=mask[:, : seen + count],
                position_ids=positions[:, rows],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(out.logits)
            seen += count
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_masked_full_forward(kind):
    model, ids = model_of(kind), ids_of(2, 40)
    plan = plan_for(model)
    wanted = slow_logits(model, plan, ids)
    apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
    for chunks in ([40], [1] * 40, [11, 1, 1, 9, *[1] * 18], [20, 20]):
        logits, cache = stepwise(model, plan, ids, chunks)
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        held = {rule: cache.book.slots[rule].positions.shape[1] for rule in cache.book.slots}
        assert all(held[rule] <= rule.kept(40, plan.sink) for rule in held)


@pytest.mark.parametrize("rule", [DENSE, SpanRule(-100, 1.0, 8), SpanRule(20, 0.5), SpanRule(64)])
def test_a_cache_that_grows_has_room_for_little_more(rule):
    slots = Slots(rule, 4)
    slots.advance(0, np.arange(1500)[None], np.array([1500]))
    for seen in range(1500, 1800):
        slots.advance(seen, np.array([[seen]]), np.array([seen + 1]))
        assert rule.kept(seen + 1, 4) <= slots.capacity <= rule.held(seen + 1, 4) <= 1.02 * rule.kept(seen + 1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    model, ids = model_of(kind), ids_of(3, 30)
    plan = plan_for(model)
    paddings = [0, 4, 13]
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    wanted = [slow_logits(model, plan, ids[row : row + 1, padding:]) for row, padding in enumerate(paddings)]
    apply_plan(model, plan)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    for logits in (whole, *(stepwise(model, plan, ids, chunks, mask)[0] for chunks in ([15, *[1] * 15], [14, 8, 8]))):
        for row, padding in enumerate(paddings):
            torch.testing.assert_close(logits[row : row + 1, padding:], wanted[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings_of_generate", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=["greedy", "beams", "chunks"]
)
def test_generate_gives_what_the_full_forward_gives(kind, settings_of_generate):
    model, ids = model_of(kind), ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    plan = plan_for(model)
    apply_plan(model, plan)
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, **settings_of_generate}
    fast = model.generate(ids, **given)
    slow = model.generate(ids, **{**given, "prefill_chunk_size": None}, use_cache=False)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paddings", [[0], [0, 3, 9]], ids=["one", "batch"])
def test_generate_goes_on_from_a_cache(kind, paddings):
    model, ids = model_of(kind), ids_of(len(paddings), 20)
    plan = plan_for(model)
    apply_plan(model, plan)
    model.generation_config.pad_token_id = None  # what was written is no padding
    mask = torch.ones(len(paddings), 40, dtype=torch.long)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0

    def write(ids, tokens, **settings):
        length = ids.shape[1]
        return model.generate(ids, attention_mask=mask[:, :length], max_new_tokens=tokens, do_sample=False, **settings)

    whole = write(ids, 14)
    cache = SpanCache(plan, model.config)
    part = write(ids, 6, past_key_values=cache)
    assert cache.get_seq_length() == 25
    longer = torch.cat([part, ids_of(len(paddings), 5, seed=9)], 1)
    assert torch.equal(write(longer, 5, past_key_values=cache), write(longer, 5))
    assert torch.equal(part, whole[:, :26])


def test_sampling_takes_the_cache():
    model = model_of("llama")
    apply_plan(model, plan_for(model))
    torch.manual_seed(3)
    fast = model.generate(ids_of(2, 20), max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(fast, model.generate(ids_of(2, 20), max_new_tokens=8, do_sample=True, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_spans_as_long_as_the_text_are_dense(kind):
    model, ids = model_of(kind), ids_of(2, 33)
    with torch.no_grad():
        wanted = model(ids).logits
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    for rule in (DENSE, SpanRule(33)):
        plan = SpanPlan.same(rule, model.config, sink=0)
        apply_plan(model, plan)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stepwise(model, plan, ids, [30, 1, 1, 1])[0], wanted, atol=1e-5, rtol=1e-5)
    apply_plan(model, SpanPlan.same(DENSE, model.config))
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
    remove_plan(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.builds(SpanRule, st.integers(-4, 12), st.sampled_from([0.1, 0.5, 1.0])), min_size=1, max_size=9),
    st.integers(0, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 6),
)
def test_any_rules_in_any_pieces(kind, rules, sink, chunks, padding):
    length = sum(chunks)
    padding = min(padding, length - 1)
    model, ids = model_of(kind), ids_of(2, length)
    plan = plan_for(model, [*rules, SpanRule(3)], sink)
    wanted = [slow_logits(model, plan, ids[:1]), slow_logits(model, plan, ids[1:, padding:])]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    apply_plan(model, plan)
    found, _ = stepwise(model, plan, ids, chunks, mask)
    torch.testing.assert_close(found[:1], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:, padding:], wanted[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [60, 300, 480])
def test_the_cache_holds_what_the_plan_says(length):
    model, ids = model_of("llama"), ids_of(2, length)
    plan = plan_for(model, [SpanRule(40), SpanRule(10, 0.25), SpanRule(20), DENSE], sink=8)
    apply_plan(model, plan)
    _, cache = stepwise(model, plan, ids, [length - 20, *[1] * 20])
    dense = 2 * length * 2 * 3 * 3 * 8 * 4  # rows, tokens, keys and values, layers, heads, size, bytes
    assert cache.nbytes() / dense == pytest.approx(plan.density(length), rel=0.02)


def test_gradients_flow_and_packed_texts_do_not_see_each_other():
    model = model_of("llama")
    plan = plan_for(model)
    one, two = ids_of(1, 14), ids_of(1, 9, seed=4)
    wanted = torch.cat([slow_logits(model, plan, one), slow_logits(model, plan, two)], 1)
    apply_plan(model, plan).train()
    positions = torch.cat([torch.arange(14), torch.arange(9)])[None]
    out = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_folder_carries_its_plan(tmp_path):
    model, ids = model_of("llama"), ids_of(1, 30)
    plan = plan_for(model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="has no plan of spans"):
        load(tmp_path / "dense")
    model.save_pretrained(tmp_path / "pruned")
    plan.save(tmp_path / "pruned")
    wanted = apply_plan(model, plan).generate(ids, max_new_tokens=8, do_sample=False)
    for loaded in (load(tmp_path / "pruned"), AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")):
        assert plan_of(loaded.config) == dataclasses.replace(plan, notes={})
        assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    with pytest.raises(InputError, match="is no span plan"):
        SpanPlan.from_json({"version": 1, "rules": "all"})


def test_span_at_is_the_span_of_the_rule():
    for rule in RULES:
        assert span_at(rule, torch.arange(50)).tolist() == [rule.span(position) for position in range(50)]


def test_wrong_use_is_refused():
    model = model_of("llama")
    other = SpanPlan.same(DENSE, LlamaConfig(**{**SIZES, "num_hidden_layers": 2}))
    with pytest.raises(InputError, match="2 layers, 2 of them with spans, and 3 key/value heads; this one has 3 layers"):
        apply_plan(model, other)
    plan = plan_for(model)
    apply_plan(model, plan)
    cache = SpanCache(plan, model.config)
    with pytest.raises(InputError, match="cannot take tokens back"):
        cache.crop(1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_flex_attention_reads_what_blocks_read(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(flex, "_kernel", lambda: flex.flex_attention)
        monkeypatch.setattr(flex, "STEP", 128)
    model, ids = model_of(kind), ids_of(2, 150)
    plan = plan_for(model)
    used = []
    monkeypatch.setattr(flex, "_block_mask", lambda *args, make=flex._block_mask: used.append(args) or make(*args))
    with torch.no_grad():
        wanted = apply_plan(model, plan)(ids, use_cache=False).logits
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert not used
        apply_plan(model, plan, prefill="flex")
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)
        assert len(used) == sum(rules is not None for rules in plan.rules)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
        assert len(used) == 2 * sum(rules is not None for rules in plan.rules), "the tokens behind the text are read one by one"
    with pytest.raises(InputError, match="prefill='felx' is unknown. Did you mean 'flex'"):
        apply_plan(model, plan, prefill="felx")


def test_tokens_that_came_cannot_be_masked_later():
    model = model_of("llama")
    plan = plan_for(model)
    apply_plan(model, plan)
    cache = SpanCache(plan, model.config)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 14:20] = 0  # these were written behind the end of the second text
    with torch.no_grad():
        model(ids_of(2, 20), past_key_values=cache)
        with pytest.raises(InputError, match="tokens that came before are masked now, or no longer"):
            model(ids_of(2, 1), past_key_values=cache, attention_mask=mask)
        padded = SpanCache(plan, model.config)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, :4] = 0
        model(ids_of(2, 20), past_key_values=padded, attention_mask=mask)
        with pytest.raises(InputError, match="tokens that came before are masked now, or no longer"):
            model(ids_of(2, 1), past_key_values=padded)


def test_generate_without_a_cache_and_copies_of_a_model():
    model, ids = model_of("llama"), ids_of(1, 30)
    apply_plan(model, plan_for(model))
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    for without in ({"generation_config": GenerationConfig(use_cache=False, max_new_tokens=6)}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **without), wanted)
    model.generation_config.use_cache = False  # as training scripts leave it; what another config leaves open is taken from it
    plain = GenerationConfig(max_new_tokens=6)
    assert plain.use_cache is None
    assert torch.equal(model.generate(ids, generation_config=plain, do_sample=False), wanted)
    model.generation_config.use_cache = None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), wanted)
        with torch.no_grad():
            other.model.embed_tokens.weight.normal_()
        assert not torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_a_plan_is_adopted_where_the_way_of_attending_is_named(tmp_path):
    model = model_of("llama")
    apply_plan(model, plan_for(model))
    model.save_pretrained(tmp_path / "spans")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "spans", attn_implementation="fulgurite_spans").eval()
    assert attentions(loaded)[0].span_rules == attentions(model)[0].span_rules
    assert torch.equal(loaded.generate(ids_of(1, 30), max_new_tokens=4), model.generate(ids_of(1, 30), max_new_tokens=4))


def test_what_spans_cannot_use_is_refused():
    model, ids = model_of("llama"), ids_of(1, 10)
    apply_plan(model, plan_for(model))
    with pytest.raises(InputError, match="a cache of 40 places for 10 tokens is a static one"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=40))
    with pytest.raises(InputError, match="a mask of 4 dimensions says for all heads alike"):
        model(ids, attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.bool))
    sliding = MistralConfig(**{**SIZES, "sliding_window": 16})
    with pytest.raises(InputError, match="every layer has a sliding window of its own"):
        attentions(MistralForCausalLM(sliding))


def test_the_way_of_attending_before_a_plan_comes_back():
    model = model_of("llama")
    model.set_attn_implementation("eager")
    for _ in range(2):
        apply_plan(apply_plan(model, plan_for(model)), plan_for(model))
        assert remove_plan(model).config._attn_implementation == "eager"
