"""Profiles of a model's heads: what every candidate rule would cost each of them, text by text."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from transformers import PreTrainedModel

from ...errors import InputError
from ..span_attention.rules import DENSE, SpanPlan, SpanRule
from .influence import FORMS, ROWS, Form, Rows, influences
from .measurements import ALONE, Answered, Loss, Processes, measure


@dataclass(frozen=True)
class CandidateRules:
    """The rules that heads may get: every alpha with every beta, the window alone, and the whole text.

    An alpha below 0 makes rules that see more of a long text than of a short one.

    Args:
        sink: First positions that every head sees.
        window: Last positions that every head sees.
        alphas: Positions at any length.
        betas: Positions for each position of the text.

    Raises:
        InputError: If a number is out of range.
    """

    sink: int = 16
    window: int = 32
    alphas: list[int] = field(default_factory=lambda: [-384, 0, 128, 512])
    betas: list[float] = field(default_factory=lambda: [0.0, 0.125, 0.25, 0.5, 1.0])

    def check(self) -> None:
        """Raise an InputError for numbers out of range."""
        if self.sink < 0:
            raise InputError(f"sink={self.sink} is below 0. Legal: 0 positions or more.")
        if self.window < 1:
            raise InputError(
                f"window={self.window} leaves a head without the token that it stands at. Legal: 1 position or more."
            )
        if not self.alphas or not self.betas:
            raise InputError("alphas and betas each need at least one number, such as alphas: [0], betas: [0, 0.5].")
        for beta in self.betas:
            if not 0 <= beta <= 1:
                raise InputError(f"betas={self.betas}: {beta} is no share of the position. Legal: 0 to 1.")
        self.rules()

    def rules(self) -> list[SpanRule]:
        """Return the rules, each once."""
        partial = {
            SpanRule(alpha, float(beta), self.window)
            for alpha in self.alphas
            for beta in self.betas
            # The others see what the shortest does, or everything.
            if (beta > 0 or alpha > self.window) and (alpha < 0 or beta < 1)
        }
        return sorted(partial | {self.shortest, DENSE})

    @property
    def shortest(self) -> SpanRule:
        """The rule that sees least: the window alone."""
        return SpanRule(0, 0.0, self.window)


@dataclass(frozen=True)
class SpanProfile:
    """What each rule would cost each head, text by text, in all forms.

    Args:
        rules: The candidates.
        lengths: Length level of each text.
        values: float64 [texts, rows, forms, layers, key/value heads, rules]; see ``influences``.
    """

    rules: list[SpanRule]
    lengths: list[int]
    values: np.ndarray

    def halfway(self, other: "SpanProfile") -> "SpanProfile":
        """Return the mean of two profiles of the same texts, of the dense model and of a plan.

        The first order holds for small steps. A mean over both ends of the way from one to the other is closer to its whole.
        """
        return SpanProfile(self.rules, self.lengths, (self.values + other.values) / 2)

    def costs(self, form: Form, rows: Rows) -> dict[int, np.ndarray]:
        """Return the mean cost at each length level [layers, key/value heads, rules], 0 or more.

        Args:
            form: How the effects of keys are summed.
            rows: Rows of the answer, or all.
        """
        chosen = self.values[:, ROWS.index(rows), FORMS.index(form)].clip(min=0)
        levels = sorted(set(self.lengths))
        return {level: chosen[[length == level for length in self.lengths]].mean(axis=0) for level in levels}

    def mean(self, form: Form, rows: Rows) -> np.ndarray:
        """Return the mean cost over all texts [layers, key/value heads, rules], 0 or more; see ``costs``."""
        return self.values[:, ROWS.index(rows), FORMS.index(form)].clip(min=0).mean(axis=0)


class SpanProfiler:
    """Finds what each rule would cost each head, by one backward pass a text; what is done is kept in the cache.

    Args:
        candidates: Rules to try.
        loss: What the influence is upon: the answer's ``margin`` or ``cross_entropy``.

    Raises:
        InputError: If the candidates are out of range.
    """

    def __init__(self, candidates: CandidateRules = CandidateRules(), *, loss: Loss = "margin") -> None:
        candidates.check()
        self.candidates, self.loss = candidates, loss

    def profile(
        self,
        model: PreTrainedModel,
        texts: Sequence[Answered],
        processes: Processes = ALONE,
        *,
        plan: SpanPlan | None = None,
    ) -> SpanProfile:
        """Return the profile of a dense model, in evaluation mode, on texts with its own answers.

        Args:
            model: The model.
            texts: The texts.
            processes: Each takes its share of the texts.
            plan: Spans that the heads have while gradients are taken; None takes them of the dense model.
        """
        rules, sink = self.candidates.rules(), self.candidates.sink

        def one(text: Answered) -> np.ndarray:
            return influences(model, text.ids, text.answer_start, rules, sink=sink, loss=self.loss, plan=plan)

        settings = [[astuple(rule) for rule in rules], sink, self.loss]
        settings += [] if plan is None else [plan.to_json()["rules"], plan.sink]
        values = measure(model, "profile", settings, texts, one, processes)
        return SpanProfile(rules, [text.length for text in texts], values)
