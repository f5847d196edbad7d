import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules import WarmupCosine


def rates(steps, **settings):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = WarmupCosine(optimizer, **settings)
    if schedule.total_steps is None:
        schedule.set_total_steps(steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_rises_then_falls_to_the_floor():
    seen = rates(100, warmup=0.1, floor=0.25)
    assert all(a < b for a, b in zip(seen[:10], seen[1:11]))
    assert all(a >= b for a, b in zip(seen[10:], seen[11:]))
    assert max(seen) == pytest.approx(2.0)
    assert seen[-1] == pytest.approx(0.5, abs=0.01)


def test_given_length_equals_the_trainers():
    assert rates(50, total_steps=50) == rates(50)


@pytest.mark.parametrize(("settings", "name"), [({"warmup": 1.0}, "warmup=1.0"), ({"floor": -0.1}, "floor=-0.1")])
def test_bad_shares_are_refused(settings, name):
    with pytest.raises(InputError, match=name):
        rates(10, **settings)
