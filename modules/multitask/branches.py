"""Branch networks: what each task has for itself behind the shared layers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import InputError
from ..linear_loss import linear_loss, shift_labels
from .objectives import IGNORED, Objective
from .trunk import Trunk, View

Pooling = Literal["first", "mean"]


@dataclass
class Answer:
    """What a branch made of a view's targets.

    Args:
        loss: Mean over the targets, in nats, or of the squared error; 0 where there is no target.
        count: Number of targets.
        predicted: The likeliest class, or the number, of each target [count]; None for tokens of a vocabulary but for ``right``.
        targets: [count].
        right: Of a vocabulary: whether the likeliest token is the target [count].
    """

    loss: Tensor
    count: int
    predicted: Tensor | None
    targets: Tensor
    right: Tensor | None = None


class Branch(nn.Module, ABC):
    """A task's own network. A sub-class makes its layers in ``attach``, when the trunk's sizes are known."""

    @abstractmethod
    def attach(self, trunk: Trunk, objective: Objective) -> None:
        """Make the layers.

        Args:
            trunk: Whose features are read.
            objective: What is predicted.
        """

    @abstractmethod
    def states(self, trunk: Trunk, features: Tensor, view: View) -> Tensor:
        """Return what the head reads, of each token [rows, length, hidden size].

        Args:
            trunk: The one attached to.
            features: Of the trunk [rows, length, hidden size].
            view: The batch's part that was read; see ``Trunk``.
        """

    @abstractmethod
    def answer(self, trunk: Trunk, states: Tensor, view: View, targets: Tensor) -> Answer:
        """Return loss and predictions.

        Args:
            trunk: The one attached to.
            states: Of ``states``.
            view: See ``states``.
            targets: Token ids or classes of tokens int64 [rows, length], classes int64 [rows] or numbers [rows]; -100 or NaN
                where there is none.
        """

    @abstractmethod
    def scores(self, trunk: Trunk, states: Tensor, view: View) -> Tensor:
        """Return logits over tokens or classes, [rows, length, classes] or [rows, classes], or numbers [rows]."""


class TransformerBranch(Branch):
    """Layers of the trunk's own kind, and a head for the objective.

    Tokens are predicted by the trunk's embedding, or the head of a decoder that has one of its own.

    Args:
        layers: Transformer layers; 0 puts the head right behind the trunk.
        dropout: On what the head of a text or a token reads, in [0, 1).
        pooling: What of a text its head reads: the ``first`` token, through a pooler as BERT's, or the ``mean`` of all. None
            takes the first token of an encoder, as ``transformers`` has it, and the mean behind a decoder.

    Raises:
        InputError: If a number is out of range, or ``pooling`` unknown.
    """

    def __init__(self, layers: int = 1, *, dropout: float = 0.1, pooling: Pooling | None = None) -> None:
        super().__init__()
        if layers < 0:
            raise InputError(f"branch.layers={layers} is below 0. Legal: 0 or more.")
        if not 0 <= dropout < 1:
            raise InputError(f"branch.dropout={dropout}. Legal: 0 up to, not including, 1.")
        if pooling not in (None, *get_args(Pooling)):
            raise InputError(f"branch.pooling={pooling!r} is unknown. Legal: {', '.join(get_args(Pooling))}, or null.")
        self.count, self.dropout, self.pooling = layers, dropout, pooling
        self.objective: Objective | None = None
        self.layers: nn.Module | None = None
        self.pooler: nn.Linear | None = None
        self.head: nn.Linear | None = None

    def attach(self, trunk: Trunk, objective: Objective) -> None:
        """See ``Branch``."""
        self.objective = objective
        width, like = trunk.hidden_size, {"device": trunk.table.device, "dtype": trunk.table.dtype}
        if self.count or not trunk.is_encoder:
            self.layers = trunk.new_layers(self.count)
        if objective.predicts_tokens:
            return
        first = trunk.is_encoder if self.pooling is None else self.pooling == "first"
        if objective.kind != "token" and first:
            self.pooler = nn.Linear(width, width, **like)  # type: ignore[arg-type]
        self.head = nn.Linear(width, len(objective.classes) or 1, **like)  # type: ignore[arg-type]
        for linear in (self.pooler, self.head):
            if linear is not None:
                nn.init.normal_(linear.weight, std=trunk.model.config.initializer_range)
                nn.init.zeros_(linear.bias)

    def states(self, trunk: Trunk, features: Tensor, view: View) -> Tensor:
        """See ``Branch``."""
        return features if self.layers is None else trunk.through(self.layers, features, view)

    def scores(self, trunk: Trunk, states: Tensor, view: View) -> Tensor:
        """See ``Branch``."""
        assert self.objective is not None
        if self.objective.predicts_tokens:
            return functional.linear(states, trunk.output_table)
        assert self.head is not None
        read = states if self.objective.kind == "token" else self._text(states, view)
        found = self.head(functional.dropout(read, self.dropout, self.training))
        return found.squeeze(-1) if self.objective.kind == "number" else found

    def _text(self, states: Tensor, view: View) -> Tensor:
        if self.pooler is not None:
            return torch.tanh(self.pooler(states[:, 0]))
        lengths = view.get("lengths")
        if lengths is None:
            return states.mean(dim=1)
        real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return (states * real[:, :, None].to(states.dtype)).sum(dim=1) / lengths[:, None].clamp(min=1).to(states.dtype)

    def answer(self, trunk: Trunk, states: Tensor, view: View, targets: Tensor) -> Answer:
        """See ``Branch``."""
        assert self.objective is not None
        if self.objective.predicts_tokens:
            wanted = shift_labels(targets) if self.objective.kind == "next_token" else targets
            here = wanted != IGNORED
            parts = linear_loss(states[here], trunk.output_table, wanted[here])
            return Answer(parts.loss, parts.tokens, None, wanted[here], parts.correct)
        scores = self.scores(trunk, states, view)
        here = ~targets.isnan() if self.objective.kind == "number" else targets != IGNORED
        found, wanted = scores[here].float(), targets[here]
        if not len(wanted):
            return Answer(scores.sum() * 0.0, 0, found[..., 0].long() if found.ndim > 1 else found, wanted)
        if self.objective.kind == "number":
            return Answer(functional.mse_loss(found, wanted.float()), len(wanted), found, wanted)
        return Answer(functional.cross_entropy(found, wanted), len(wanted), found.argmax(dim=-1), wanted)


def build_branches(
    trunk: Trunk, objectives: dict[str, Objective], given: dict[str, Branch] | None, default: Any
) -> nn.ModuleDict:
    """Return a branch for each task.

    Args:
        trunk: The shared layers.
        objectives: Of each task.
        given: Branches by task, for all of them; None makes one of ``default`` for each.
        default: Makes a branch.
    """
    branches = dict(given) if given is not None else {name: default() for name in objectives}
    for name, objective in objectives.items():
        branches[name].attach(trunk, objective)
    return nn.ModuleDict({name: branches[name] for name in objectives})
