"""The owner's layers: the gradients of an unsplit model, calls that may be repeated, and memory that is bounded."""

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import ModelPart, Prefix, PrefixSettings, behind_prefix, plugged_in, without_virtual
from fulgurite.modules.offsite import owner as module
from fulgurite.modules.offsite.owner import HeadRequest, OwnerLayers, UnknownStep

from ..span_attention.small import SIZES, ids_of, model_of

CUT, LENGTH, HIDDEN = 1, 3, SIZES["hidden_size"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def whole():
    return model_of("llama").requires_grad_(False)


@pytest.fixture
def prefix(whole):
    return Prefix.random(whole, PrefixSettings(length=LENGTH))


def layers(**settings):
    model = model_of("llama")
    return OwnerLayers(ModelPart(model, CUT, len(model.model.layers)), **settings)


def rows_for(prefix):
    """A copy of the rows of the owner's layers, as they come over the network."""
    own = prefix.within(CUT, 99)
    return Prefix(own.settings, [rows.detach() for rows in own.rows])


def states_of(number, rows=2, tokens=7):
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(number))


def test_a_step_of_two_batches_has_the_gradients_of_the_unsplit_model(whole, prefix):
    model = model_of("llama")
    first, owner = ModelPart(model, 0, CUT).requires_grad_(False), layers()
    batches = [behind_prefix({"input_ids": ids_of(2, 7) + number, "position_ids": torch.arange(7).expand(2, -1)}, LENGTH)
               for number in range(2)]  # fmt: skip
    with plugged_in(whole, prefix):
        for batch in batches:
            whole.model(**batch, use_cache=False).last_hidden_state[:, LENGTH:].square().sum().backward()
    expected = [rows.grad.clone() for rows in prefix.rows]
    prefix.zero_grad()

    owner.begin("party", 5, LENGTH, rows_for(prefix))
    with plugged_in(first.body, prefix.within(0, CUT)):
        for number, batch in enumerate(batches):
            sent = without_virtual(first(batch["input_ids"], position_ids=batch["position_ids"]), LENGTH)
            got = owner.forward("party", 5, number, sent.detach()).requires_grad_()
            whole.model.norm(got).square().sum().backward()
            sent.backward(owner.backward("party", 5, number, got.grad))
    found = [*(rows.grad for rows in prefix.within(0, CUT).rows), *owner.collect("party", 5)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_call_that_is_asked_again_gives_the_same_and_counts_once(prefix):
    answers = []
    for times in (1, 3):
        owner = layers()
        owner.begin("party", 0, LENGTH, rows_for(prefix))
        for _ in range(times):
            output = owner.forward("party", 0, 0, states_of(0))
        for _ in range(times):
            gradient = owner.backward("party", 0, 0, torch.ones_like(output))
        for _ in range(times):
            rows = owner.collect("party", 0)
        answers.append([output, gradient, *rows])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
    with pytest.raises(InputError, match="batch=0 of step 0 was another batch"):
        owner.forward("party", 0, 0, states_of(1))
    owner.forward("party", 0, 1, states_of(1))
    with pytest.raises(InputError, match="step=0 has been collected: batch 1 comes too late"):
        owner.backward("party", 0, 1, torch.ones(2, 7, HIDDEN))


def test_a_step_sent_again_to_another_owner_ends_with_the_same_gradients(prefix):
    """As after a restart: what the owner has forgotten, the party sends anew."""
    found = []
    for restart in (False, True):
        owner = layers()
        for begun in range(1 + restart):
            if begun:
                owner = layers()
                with pytest.raises(UnknownStep, match="step=0 was not begun, or is forgotten. Send it from its rows on"):
                    owner.backward("party", 0, 1, torch.ones(2, 7, HIDDEN))
            owner.begin("party", 0, LENGTH, rows_for(prefix))
            for number in range(2 if begun == restart else 1):
                output = owner.forward("party", 0, number, states_of(number))
                owner.backward("party", 0, number, torch.full_like(output, 1.0 + number))
        found.append(owner.collect("party", 0))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_prefixes_are_in_place_for_one_party_at_a_time(prefix, monkeypatch):
    """Also where a step begins, which tries its prefix on the layers."""
    owner, locked = layers(), []
    monkeypatch.setattr(module, "plugged_in", lambda *given: locked.append(owner.turns.locked()) or plugged_in(*given))
    owner.begin("party", 0, LENGTH, rows_for(prefix))
    owner.forward("party", 0, 0, states_of(0))
    assert locked == [True, True]


def test_states_of_another_type_are_taken_in_that_of_the_weights(prefix):
    owner = layers()
    owner.begin("party", 0, LENGTH, rows_for(prefix))
    states = states_of(0).bfloat16()
    found = owner.forward("party", 0, 0, states)
    assert torch.equal(owner.forward("party", 0, 0, states), found)
    assert torch.equal(owner.forward("party", 0, 1, states.float()), found)
    assert owner.backward("party", 0, 0, found.bfloat16()).dtype == torch.float32


def test_activations_that_were_dropped_are_computed_again(prefix):
    found = []
    for most_graphs in (1, 3):
        owner = layers(most_graphs=most_graphs)
        owner.begin("party", 0, LENGTH, rows_for(prefix))
        for number in range(3):
            owner.forward("party", 0, number, states_of(number))
        kept = [batch.graph is not None for batch in owner._sessions["party"].batches.values()]
        assert kept == [False] * (3 - most_graphs) + [True] * most_graphs
        gradients = [owner.backward("party", 0, number, torch.ones(2, 7, HIDDEN)) for number in range(3)]
        found.append([*gradients, *owner.collect("party", 0)])
        assert not owner._graphs
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_does_not_fit_the_layers_is_refused(whole, prefix):
    owner = layers()
    with pytest.raises(InputError, match="length=7, but the prefix has 3 rows"):
        owner.begin("party", 0, 7, rows_for(prefix))
    with pytest.raises(InputError, match="rows of 5 numbers, the model takes 48"):
        owner.begin("party", 0, LENGTH, Prefix(PrefixSettings(length=LENGTH, layers=(0,)), [torch.zeros(LENGTH, 5)]))
    with pytest.raises(InputError, match=r"prefix.layers=\[0, 99\]: the model has"):
        owner.begin("party", 0, LENGTH, Prefix(PrefixSettings(length=LENGTH, layers=(0, 99)), [torch.zeros(LENGTH, HIDDEN)] * 2))
    owner.begin("party", 0, LENGTH, rows_for(prefix))
    owner.forward("party", 0, 1, states_of(1))
    with pytest.raises(InputError, match=r"has the shape \[2, 3, 48\]. Legal: \[2, 7, 48\]"):
        owner.backward("party", 0, 1, torch.ones(2, 3, HIDDEN))
    for shape in ((2, 7, 5), (7, HIDDEN), (2, 0, HIDDEN)):
        with pytest.raises(InputError, match=r"The states have the shape .* Legal: \[rows, tokens, 48\]"):
            owner.forward("party", 0, 0, torch.zeros(shape))


def test_what_is_kept_is_bounded(prefix):
    clock = Clock()
    owner = layers(lifetime=10, most_batches=2, most_sessions=2, clock=clock)
    for name in ("a", "b", "c"):
        clock.now += 1
        owner.begin(name, 0, LENGTH, rows_for(prefix))
        owner.forward(name, 0, 0, states_of(0))
    with pytest.raises(UnknownStep):  # it was silent longest
        owner.forward("a", 0, 0, states_of(0))
    owner.forward("b", 0, 1, states_of(1))
    with pytest.raises(InputError, match="step 0 has 2 batches already, which is the owner's limit"):
        owner.forward("b", 0, 2, states_of(2))
    with pytest.raises(UnknownStep, match="batch=1 of step 0 was not sent forward"):
        owner.backward("c", 0, 1, torch.ones(2, 7, HIDDEN))
    clock.now += 11
    with pytest.raises(UnknownStep, match="is forgotten"):
        owner.collect("b", 0)
    owner.begin("b", 1, LENGTH, rows_for(prefix))
    with pytest.raises(UnknownStep):
        owner.collect("b", 0)
    assert all(not rows.any() for rows in owner.collect("b", 1))
    narrow = layers(most_batch_tokens=20, most_step_tokens=30)
    narrow.begin("a", 0, LENGTH, rows_for(prefix))
    with pytest.raises(InputError, match="A batch of 3 rows has 30 tokens, virtual ones too; the owner's limit is 20"):
        narrow.forward("a", 0, 0, states_of(0, rows=3))
    for number in range(2):
        narrow.forward("a", 0, number, states_of(number))
    with pytest.raises(InputError, match="batch=2: with it, step 0 has 42 tokens, above the owner's limit of 30"):
        narrow.forward("a", 0, 2, states_of(2))
    for name in ("lifetime", "most_graphs", "most_batches", "most_sessions", "most_batch_tokens", "most_step_tokens"):
        with pytest.raises(InputError, match=f"{name}=0 keeps nothing"):
            layers(**{name: 0})


def test_answers_of_the_head_are_bounded_over_a_step(prefix):
    owner, asked = layers(most_step_logits=200), HeadRequest(torch.tensor([[0, 1], [1, 2]]))  # of 61 tokens each
    owner.begin("a", 0, LENGTH, rows_for(prefix))
    owner.forward("a", 0, 0, states_of(0), asked)
    with pytest.raises(InputError, match="batch=1: with it, step 0 has more logits than the owner's limit of 200"):
        owner.forward("a", 0, 1, states_of(1), asked)
    assert owner.forward("a", 0, 1, states_of(1), HeadRequest(asked.positions, labels=torch.tensor([3, 4]))).shape == (2,)


def test_activations_go_with_their_step(prefix):
    clock = Clock()
    owner = layers(lifetime=10, most_graphs=8, clock=clock)
    for step in range(3):
        owner.begin("a", step, LENGTH, rows_for(prefix))
        owner.forward("a", step, 0, states_of(0))
        assert len(owner._graphs) == 1
    clock.now += 11
    owner.forget_old()
    assert not owner._graphs
    assert not owner._sessions


def test_a_backward_pass_that_fails_leaves_no_half_of_a_gradient(prefix, monkeypatch):
    owner = layers()
    owner.begin("a", 0, LENGTH, rows_for(prefix))
    output = owner.forward("a", 0, 0, states_of(0))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *given: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        owner.backward("a", 0, 0, torch.ones_like(output))
    monkeypatch.undo()
    with pytest.raises(UnknownStep):
        owner.backward("a", 0, 0, torch.ones_like(output))
    owner.begin("a", 0, LENGTH, rows_for(prefix))
    assert owner.backward("a", 0, 0, torch.ones_like(owner.forward("a", 0, 0, states_of(0)))).any()


def test_positions_that_depend_on_the_longest_text_are_refused():
    model = model_of("llama")
    model.config.rope_parameters = {**(model.config.rope_parameters or {}), "rope_type": "dynamic"}
    with pytest.raises(InputError, match="its positions .dynamic. depend on the longest text"):
        OwnerLayers(ModelPart(model, CUT, len(model.model.layers)))
