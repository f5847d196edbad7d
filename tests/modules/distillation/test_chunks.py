import math

import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.distillation.chunks import check_chunks, chunk_loss, in_chunks
from fulgurite.modules.distillation.labels import SoftLabels


def labels_with(tokens, log_probability):
    size = len(tokens)
    nothing = torch.zeros(size).bfloat16()
    tokens = torch.tensor(tokens, dtype=torch.int32)
    return SoftLabels(
        torch.full((size, 1), -1, dtype=torch.int32),
        nothing[:, None],
        nothing,
        nothing,
        chunk_tokens=tokens,
        chunk_log_probability=torch.tensor(log_probability),
    )


LABELS = labels_with([2, 0, 0, 1, 3, 0, 0, 0], [-1.5, 0.0, 0.0, -0.2, -6.0, 0.0, 0.0, 0.0])


def test_tokens_in_chunks_are_found():
    assert in_chunks(LABELS).tolist() == [True, True, False, True, True, True, True, False]
    both = SoftLabels.concatenate([LABELS, LABELS])
    assert in_chunks(both).tolist() == in_chunks(LABELS).tolist() * 2


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_loss_equals_a_literal_loop(temperature):
    torch.manual_seed(0)
    own = torch.randn(6).abs().neg().requires_grad_()
    found = chunk_loss(own, LABELS, temperature)
    q = torch.stack([own[:2].sum(), own[2], own[3:].sum()]).double().div(temperature).exp()
    slow = torch.zeros((), dtype=torch.float64)
    for log_p, other in zip((-1.5, -0.2, -6.0), q):
        p = math.exp(log_p / temperature)
        slow = slow + temperature * (p * torch.log(p / other) + (1 - p) * torch.log((1 - p) / (1 - other)))
    assert float(found) == pytest.approx(float(slow), rel=1e-3)
    ours, theirs = (torch.autograd.grad(value, own, retain_graph=True)[0] for value in (found, slow))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_student_that_says_the_same_has_no_loss():
    own = torch.tensor([-1.0, -0.5, -0.2, -2.0, -2.0, -2.0]).requires_grad_()
    loss = chunk_loss(own, LABELS, 100.0)
    assert float(loss) == pytest.approx(0, abs=1e-4)
    assert torch.autograd.grad(loss, own)[0].abs().max() < 1e-3


def test_certain_chunks_stay_finite():
    own = torch.zeros(6, requires_grad=True)
    loss = chunk_loss(own, labels_with([2, 0, 0, 1, 3, 0, 0, 0], [0.0] * 8), 100.0)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, own)[0]).all()


@pytest.mark.parametrize(("weight", "temperature"), [(-1.0, 1.0), (1.0, 0.5), (float("nan"), 1.0)])
def test_settings_out_of_range_are_named(weight, temperature):
    with pytest.raises(InputError, match=r"chunk_weight=|chunk_temperature="):
        check_chunks(weight, temperature)
