"""The program that picks rules, against all choices tried, and every planner's plans against the budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import InputError
from fulgurite.modules.spans import (
    DENSE,
    Ablation,
    Budget,
    CandidateRules,
    HeadGates,
    InductionHeads,
    Influence,
    Shuffled,
    SpanProfiler,
    SpanRule,
    UniformWindow,
)
from fulgurite.modules.spans.heads import induction_scores
from fulgurite.modules.spans.measurements import Answered
from fulgurite.modules.spans.solver import pareto_plans, solve

from ..span_attention.small import ids_of, model_of

CANDIDATES = CandidateRules(sink=2, window=4, alphas=[-16, 0, 8], betas=[0.0, 0.25, 1.0])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))


def texts():
    return [Answered(ids_of(1, length, seed)[0], length - 8, level) for length, level, seed in ((60, 64, 1), (90, 96, 2))]


@settings(max_examples=25, deadline=None)
@given(
    costs=st.lists(st.floats(0, 10), min_size=16, max_size=16),
    density=st.floats(0.2, 1.0),
    limit=st.sampled_from([None, 1, 2]),
)
def test_the_program_finds_the_best_of_all_choices(costs, density, limit):
    rules = [DENSE, SpanRule(0, 0.0, 4), SpanRule(10), SpanRule(8, 0.25)]
    table = np.array(costs).reshape(2, 2, 4)
    budget = Budget(density, (64, 128), CANDIDATES, limit)
    kept = np.array(
        [[min(rule.held(length, 2) / length, 1 if density == 1 else 2) for rule in rules] for length in budget.lengths]
    )
    best = np.inf
    for choice in itertools.product(range(4), repeat=4):
        fits = (kept[:, list(choice)].mean(axis=1) <= density + 1e-9).all()
        narrow = limit is None or all(len(set(choice[2 * layer : 2 * layer + 2])) <= limit for layer in (0, 1))
        if fits and narrow:
            best = min(best, sum(table[head // 2, head % 2, rule] for head, rule in enumerate(choice)))
    found = solve(table, rules, budget)
    assert (kept[:, found.reshape(-1)].mean(axis=1) <= density + 1e-6).all()
    if limit is not None:
        assert all(len(set(row)) <= limit for row in found.tolist())
    # A thousandth of the costs may be spent to use up the cache.
    assert np.take_along_axis(table, found[:, :, None], 2).sum() <= best + 1e-3 * table.max(axis=2).sum() + 1e-6


def test_heads_that_keep_everything_do():
    rules = CANDIDATES.rules()
    costs = np.random.default_rng(0).random((2, 3, len(rules)))
    costs[:, :, rules.index(DENSE)] = 0
    whole = np.array([[True, False, False], [False, False, True]])
    for limit in (None, 2):
        found = solve(costs, rules, Budget(0.5, (64, 256), CANDIDATES, limit), whole)
        assert (found[whole] == rules.index(DENSE)).all()


def test_whole_heads_are_those_whose_ablation_costs_most(monkeypatch):
    monkeypatch.setattr("fulgurite.modules.spans.planners.worth_of_heads", lambda *args: np.arange(9.0).reshape(1, 3, 3))
    tight = Budget(0.5, (20, 96), CANDIDATES)
    # All of the cache for whole heads leaves too little for the others.
    (plan,) = Influence(whole=[0.5, 1.0]).plans(model_of("llama"), texts(), tight)
    assert plan.rules[2][1:] == (DENSE, DENSE)
    with pytest.raises(InputError, match=r"whole=\[1.0\]: no share leaves room"):
        Influence(whole=[1.0]).plans(model_of("llama"), texts(), tight)
    # Layers with a window of their own have no such heads.
    for plan in Influence(whole=[1.0]).plans(model_of("gemma3"), texts(), Budget(0.5, (64, 96), CANDIDATES)):
        assert next(own for own in plan.rules if own)[2] == DENSE


def test_only_plans_that_no_other_beats_are_kept():
    model = model_of("llama")
    rules = [*CANDIDATES.rules()]
    generator = np.random.default_rng(0)
    costs = {64: generator.random((3, 3, len(rules))), 96: generator.random((3, 3, len(rules)))}
    for table in costs.values():
        table[:, :, rules.index(DENSE)] = 0
    plans = pareto_plans(costs, rules, Budget(0.5, (64, 96), CANDIDATES), model.config)
    totals = [np.array(list(plan.notes["costs"].values())) for plan in plans]
    assert len(plans) > 1
    for one, other in itertools.permutations(totals, 2):
        assert (one < other).any()


@pytest.mark.parametrize(
    "planner",
    [
        Influence(),
        Influence(form="published", rows="all", loss="cross_entropy", rounds=0, whole=[0]),
        Influence(rounds=2, whole=[0.5, 1.0]),
        Ablation(),
        InductionHeads(tokens=30),
        HeadGates(steps=4),
        UniformWindow(),
        Shuffled(seed=1),
    ],
    ids=lambda planner: type(planner).__name__,
)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_planner_keeps_to_the_budget(planner, kind):
    model = model_of(kind)
    budget = Budget(0.5, (64, 96), CANDIDATES)
    plans = planner.plans(model, texts(), budget)
    assert plans
    for plan in plans:
        plan.check(model.config)
        for length in budget.lengths:
            assert 0.2 < plan.density(length) <= 0.5 + 1e-9
    again = planner.plans(model, texts(), budget)
    assert [plan.rules for plan in again] == [plan.rules for plan in plans]


def test_what_is_measured_is_kept(monkeypatch):
    model = model_of("llama")
    profiler = SpanProfiler(CANDIDATES)
    first = profiler.profile(model, texts()[:1])
    calls = []
    monkeypatch.setattr(
        "fulgurite.modules.spans.profiler.influences", lambda *args, **settings: calls.append(args) or first.values[0]
    )
    both = profiler.profile(model, texts())
    assert len(calls) == 1, "the text that was profiled before is read from the cache"
    np.testing.assert_array_equal(both.values[0], first.values[0])
    assert both.lengths == [64, 96]


def test_a_damaged_profile_is_refused(tmp_path):
    model = model_of("llama")
    SpanProfiler(CANDIDATES).profile(model, texts()[:1])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"cut")
    with pytest.raises(InputError, match="is damaged or missing"):
        SpanProfiler(CANDIDATES).profile(model, texts()[:1])


def test_a_head_that_copies_has_the_induction_score():
    scores = induction_scores(model_of("llama"), tokens=40)
    assert scores.shape == (3, 3)
    assert scores.min() > 0
    assert scores.max() <= 1


def test_induction_scores_do_not_depend_on_the_size_of_blocks(monkeypatch):
    scores = []
    for block in (7, 1000):
        monkeypatch.setattr("fulgurite.modules.spans.heads._BLOCK", block)
        scores.append(induction_scores(model_of("llama"), tokens=40))
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(0.0, (64,), CANDIDATES), r"density=0.0 is no share of the cache. Legal: above 0, up to 1"),
        (lambda: Budget(1.5, (64,), CANDIDATES), r"density=1.5"),
        (lambda: Budget(0.05, (64,), CANDIDATES), r"leaves 3 of 64 tokens, and the shortest rule with a sink of 2 keeps 6"),
        (lambda: Budget(0.5, (), CANDIDATES), r"needs one or more lengths"),
        (lambda: Budget(0.5, (64,), CANDIDATES, 0), r"rules_per_layer=0"),
        (lambda: SpanProfiler(CandidateRules(sink=-1)), r"sink=-1 is below 0"),
        (lambda: SpanProfiler(CandidateRules(alphas=[])), r"each need at least one number"),
        (lambda: SpanProfiler(CandidateRules(alphas=[0], betas=[0, 25])), r"betas=\[0, 25\]: 25 is no share of the position"),
        (lambda: SpanProfiler(CandidateRules(window=0)), r"window=0 leaves a head without the token"),
        (lambda: Influence(rounds=-1), r"rounds=-1 is below 0"),
        (lambda: Influence(whole=[0.5, 2]), r"whole=\[0.5, 2\]: each is a share"),
        (lambda: HeadGates(steps=0), r"steps=0 trains no gate"),
        (lambda: InductionHeads(tokens=0), r"tokens=0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
