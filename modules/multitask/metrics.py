"""Metrics of one task."""

import math

from torch import nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.regression import PearsonCorrCoef

from .branches import Answer
from .objectives import Objective


class TaskMetrics(nn.Module):
    """Loss, and what the field quotes for an objective.

    Tokens of a vocabulary: ``perplexity`` and ``accuracy``. Classes: ``accuracy``, ``f1`` (macro) and ``matthews``. Numbers:
    ``pearson``; their ``loss`` is the mean squared error.

    Args:
        objective: Of the task.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        # A loss that is no number is not hidden; "disable" would leave the weights out.
        self.loss, self.count = MeanMetric(nan_strategy=math.nan), SumMetric()
        self.right = MeanMetric() if objective.predicts_tokens else None
        classes = len(objective.classes)
        own: dict[str, Metric] = {}
        if objective.kind == "number":
            own = {"pearson": PearsonCorrCoef()}
        elif classes:
            own = {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
                "matthews": MulticlassMatthewsCorrCoef(classes),
            }
        self.own = nn.ModuleDict(own)

    def add(self, answer: Answer) -> None:
        """Add the answer to a batch."""
        self.count.update(answer.count)
        if not answer.count:
            return
        self.loss.update(answer.loss, answer.count)
        if self.right is not None:
            assert answer.right is not None
            self.right.update(answer.right.float())
        for metric in self.own.values():
            metric.update(answer.predicted, answer.targets)  # type: ignore[operator]

    def take(self) -> dict[str, float]:
        """Return the figures over all ranks, none where there was no target, and begin anew."""
        count = float(self.count.compute())
        found: dict[str, float] = {}
        if count:
            found["loss"] = float(self.loss.compute())
            if self.right is not None:
                found["perplexity"] = math.exp(min(found["loss"], 700.0))
                found["accuracy"] = float(self.right.compute())
            for name, metric in self.own.items():
                found[name] = float(metric.compute())  # type: ignore[operator]
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        return found
