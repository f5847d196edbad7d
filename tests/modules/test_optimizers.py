"""Muon and AdamW as one optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from fulgurite.errors import InputError
from fulgurite.modules import MuonAdamW, WarmupCosine


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(80, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def gradients(net: nn.Module, step: int) -> None:
    net.zero_grad()
    tokens = torch.arange(8) + step
    net(tokens).square().mean().backward()


def apart(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [net[1].weight, net[3].weight]
    return matrices, [param for param in net.parameters() if all(param is not matrix for matrix in matrices)]


def test_steps_are_those_of_muon_on_matrices_and_of_adamw_on_the_rest() -> None:
    net, plain = model(), model()
    ours = MuonAdamW(net.parameters(), lr=0.02, adamw_lr=0.003, weight_decay=0.01)
    matrices, rest = apart(plain)
    theirs = [Muon(matrices, lr=0.02, weight_decay=0.01), AdamW(rest, lr=0.003, weight_decay=0.01, fused=True)]
    for step in range(4):
        for some in (net, plain):
            gradients(some, step)
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for name, param in net.named_parameters():
        assert torch.equal(param, plain.get_parameter(name)), name


def test_a_schedule_reaches_both_and_a_closure_gives_its_loss() -> None:
    net = model()
    optimizer = MuonAdamW(net.parameters(), lr=0.02, adamw_lr=0.003)
    schedule = WarmupCosine(optimizer, warmup=0.0, floor=0.0, total_steps=2)

    def closure() -> torch.Tensor:
        gradients(net, 0)
        return torch.tensor(1.5)

    assert optimizer.step(closure) == 1.5
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0015])
    schedule.step()
    before = copy.deepcopy(net.state_dict())
    optimizer.step(closure)  # at a rate of 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_group_that_is_added_is_trained_at_its_rates() -> None:
    net = model()
    own = [net[3].weight, net[3].bias]
    optimizer = MuonAdamW([param for param in net.parameters() if all(param is not one for one in own)], lr=0.02)
    optimizer.add_param_group({"params": own, "lr": 0.5, "adamw_lr": 0.25})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-4, 0.5, 0.25]
    before = [param.clone() for param in own]
    gradients(net, 0)
    optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(own, before))


@pytest.mark.parametrize("way", ["state_dict", "copy"])
def test_going_on_gives_the_same_steps(way: str) -> None:
    net = model()
    optimizer = MuonAdamW(net.parameters(), lr=0.02)
    gradients(net, 0)
    optimizer.step()
    if way == "copy":
        other, again = copy.deepcopy((net, optimizer))
    else:
        other = model()
        other.load_state_dict(net.state_dict())
        again = MuonAdamW(other.parameters(), lr=0.5, adamw_lr=0.5)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(1, 3):
        for some, its in ((net, optimizer), (other, again)):
            gradients(some, step)
            its.step()
    for name, param in net.named_parameters():
        assert torch.equal(param, other.get_parameter(name)), name


def test_one_kind_alone_is_enough() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    for param in (matrix, vector):
        param.grad = torch.ones_like(param)
        MuonAdamW([param], lr=0.1, adamw_lr=0.1).step()
        assert not torch.equal(param, torch.ones_like(param))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is below 0"),
        ({"adamw_lr": -1.0}, "adamw_lr=-1.0 is below 0"),
        ({"weight_decay": -0.5}, "weight_decay=-0.5 is below 0"),
        ({"momentum": 1.0}, "momentum=1.0. Legal: 0 up to"),
    ],
)
def test_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MuonAdamW([nn.Parameter(torch.ones(2, 2))], **settings)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="params is empty"):
        MuonAdamW([])
