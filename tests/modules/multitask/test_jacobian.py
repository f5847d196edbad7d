import torch
from torch import nn
from torchjd.aggregation import UPGrad

from fulgurite.modules.multitask import LeastSquaresProjector
from fulgurite.modules.multitask.jacobian import Jacobian


def gradient_of(aggregator):
    torch.manual_seed(0)
    shared, own = nn.Linear(6, 5), nn.ModuleDict({"one": nn.Linear(5, 1), "two": nn.Linear(5, 2)})
    features = shared(torch.randn(4, 6))
    jacobian = Jacobian(aggregator)
    jacobian.add({name: branch(features).pow(2).mean() for name, branch in own.items()}, list(shared.parameters()), own)
    found = jacobian.aggregate(list(shared.parameters()), own, seed=0, watch=True)
    return found.weights, [parameter.grad for parameter in shared.parameters()]


def test_an_aggregator_that_is_watched_gives_the_same():
    seen = []
    watched = UPGrad(projector=LeastSquaresProjector())
    watched.weighting.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(gradient_of(watched), gradient_of(UPGrad(projector=LeastSquaresProjector())))
    assert len(seen) == 1
