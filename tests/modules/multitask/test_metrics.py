"""Figures of a task."""

import math

import pytest
import torch

from fulgurite.modules.multitask.branches import Answer
from fulgurite.modules.multitask.metrics import TaskMetrics
from fulgurite.modules.multitask.objectives import Objective


def test_the_loss_is_a_mean_over_targets_and_hides_nothing():
    def answer(loss, count):
        targets = torch.zeros(count, dtype=torch.long)
        return Answer(torch.tensor(loss), count, predicted=targets, targets=targets)

    metrics = TaskMetrics(Objective("sequence", ("no", "yes")))
    metrics.add(answer(5.0, 1))
    metrics.add(answer(2.0, 2))
    found = metrics.take()
    assert (found["loss"], found["accuracy"]) == pytest.approx((3.0, 1.0))
    metrics.add(answer(5.0, 1))
    metrics.add(answer(math.nan, 2))
    assert math.isnan(metrics.take()["loss"])
