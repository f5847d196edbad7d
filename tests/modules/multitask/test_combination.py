"""Gradients of several tasks, against what the definitions say."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchjd.aggregation import MeanWeighting, RandomWeighting, UPGradWeighting

from fulgurite.errors import InputError
from fulgurite.modules.multitask import FeatureWeighting, LeastSquaresProjector
from fulgurite.modules.multitask.combination import FanOut, common_seed

from .small import OBJECTIVES, branch_of, targets_of, trunk_of, view_of


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_projection_is_the_solution_of_its_quadratic_program(tasks, width, seed):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    weights = torch.rand(tasks, tasks, generator=generator, dtype=torch.float64)
    found = LeastSquaresProjector(ridge=1e-6)(weights, gramian)
    regular = gramian / gramian.trace() + 1e-6 * torch.eye(tasks, dtype=torch.float64)
    slope = found @ regular
    assert (found >= weights - 1e-8).all()
    assert (slope >= -1e-7).all()  # no task is worse off
    torch.testing.assert_close(
        (slope * (found - weights)).sum(dim=-1), torch.zeros(tasks, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_gramian_that_is_not_finite_leaves_the_weights_as_they_are():
    weights = torch.rand(2, 2)
    assert torch.equal(LeastSquaresProjector()(weights, torch.full((2, 2), float("inf"))), weights)


def losses_of(trunk, branches, views, rule, **settings):
    """The losses of branches on the features of views, and the place between them."""
    fan = FanOut(rule, **settings)
    features = [trunk(view) for view in views]
    readers, place = [], 0
    for view in views:
        readers.append(list(range(place, place + len(view["targets"]))))
        place += len(view["targets"])
    losses = []
    for view, own in zip(views, fan.split(features, readers)):
        for (name, targets), read in zip(view["targets"].items(), own):
            branch = branches[name]
            losses.append(branch.answer(trunk, branch.states(trunk, read, view), view, targets).loss)
    return losses, fan, features


def tasks(kind="llama", names=("text", "tags", "masked"), views=1):
    trunk = trunk_of(kind)
    trunk.table.requires_grad_(False)  # masked words read it beside the features
    branches = {name: branch_of(trunk, OBJECTIVES[name]) for name in names}
    found = [view_of("bidirectional", seed=number) for number in range(views)]
    for number, name in enumerate(names):
        view = found[number % views]
        view.setdefault("targets", {})[name] = targets_of(OBJECTIVES[name], view)
    return trunk, branches, found


def trained(trunk):
    return [parameter for parameter in trunk.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("views", [1, 2])
def test_without_a_rule_gradients_are_summed(views):
    trunk, branches, found = tasks(views=views)
    losses, fan, _ = losses_of(trunk, branches, found, None, watch=True)
    sum(losses).backward()
    ours = [parameter.grad.clone() for parameter in trained(trunk)]
    trunk.zero_grad()
    for view in found:
        for name, targets in view["targets"].items():
            states = branches[name].states(trunk, trunk(view), view)
            branches[name].answer(trunk, states, view, targets).loss.backward()
    for one, parameter in zip(ours, trained(trunk)):
        torch.testing.assert_close(one, parameter.grad, atol=1e-6, rtol=1e-4)
    assert fan.agreement.cosines.diagonal().allclose(torch.ones(3))


@pytest.mark.parametrize("on", ["features", "map"])
@pytest.mark.parametrize("views", [1, 2])
def test_feature_weighting_weighs_what_flows_into_the_trunk_alone(views, on):
    trunk, branches, found = tasks(views=views)
    rule = FeatureWeighting(UPGradWeighting(projector=LeastSquaresProjector()), compare=on)
    losses, fan, features = losses_of(trunk, branches, found, rule)
    sum(losses).backward()
    ours = [parameter.grad.clone() for parameter in trained(trunk)]

    # The definition: a linear map that is the identity, or the features, stand between trunk and branches.
    identity = torch.eye(trunk.hidden_size, requires_grad=True)
    features = [trunk(view) for view in found]
    rows, shared = [], []
    for view, read in zip(found, features):
        mapped = read @ identity.T
        for name, targets in view["targets"].items():
            loss = branches[name].answer(trunk, branches[name].states(trunk, mapped, view), view, targets).loss
            wanted = [identity] if on == "map" else features
            gradients = torch.autograd.grad(loss, [*wanted, *trained(trunk)], retain_graph=True, allow_unused=True)
            shared.append(gradients[len(wanted) :])
            flat = [torch.zeros_like(one).flatten() if grad is None else grad.flatten() for one, grad in zip(wanted, gradients)]
            rows.append(torch.cat(flat))
    jacobian = torch.stack(rows)
    weights = rule.weighting(jacobian @ jacobian.T)
    torch.testing.assert_close(fan.agreement.weights, weights, atol=1e-4, rtol=1e-3)
    for one, *gradients in zip(ours, *shared):
        torch.testing.assert_close(one, sum(weight * row for weight, row in zip(weights, gradients)), atol=1e-5, rtol=1e-3)


def test_a_branch_learns_from_its_own_loss_unweighted():
    trunk, branches, found = tasks()
    losses, _, _ = losses_of(trunk, branches, found, FeatureWeighting(MeanWeighting()))
    sum(losses).backward()
    for name, branch in branches.items():
        view = found[0]
        alone = branch.answer(trunk, branch.states(trunk, trunk(view), view), view, view["targets"][name]).loss
        for one, parameter in zip(torch.autograd.grad(alone, list(branch.parameters())), branch.parameters()):
            torch.testing.assert_close(parameter.grad, one, atol=1e-6, rtol=1e-4)


def test_branches_on_one_text_share_one_pass_through_the_trunk():
    trunk, branches, found = tasks(names=("text", "tags", "masked", "number"))
    passes = {"forward": 0, "backward": 0}

    def count(name):
        passes[name] += 1

    layer: nn.Module = trunk.model.layers[0]
    layer.register_forward_hook(lambda *_: count("forward"))
    layer.register_full_backward_hook(lambda *_: count("backward"))
    losses, _, _ = losses_of(trunk, branches, found, FeatureWeighting())
    sum(losses).backward()
    assert len(losses) == 4
    assert passes == {"forward": 1, "backward": 1}


def test_rules_that_draw_do_so_alike_on_all_ranks_and_leave_the_random_numbers_alone():
    trunk, branches, found = tasks()
    drawn = []
    for rank in range(2):
        torch.manual_seed(rank)
        losses, fan, _ = losses_of(trunk, branches, found, FeatureWeighting(RandomWeighting()), seed=7)
        before = torch.get_rng_state()
        sum(losses).backward()
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(fan.agreement.weights)
    assert torch.equal(*drawn)


def test_a_common_seed_leaves_the_random_numbers_of_the_accelerator_alone(monkeypatch):
    forked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices) or nullcontext())
    for name in ("cuda:1", "cpu"):
        with common_seed(0, torch.device(name)):
            pass
    assert forked == [[torch.device("cuda:1")], []]


def test_unknown_places_are_refused():
    with pytest.raises(InputError, match="compare='weights' is unknown. Legal: features, map, or null"):
        FeatureWeighting(compare="weights")
