"""How the spans of a plan are chosen: by influence, and by the methods that it is compared with."""

import copy
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import InputError
from ..precision import frozen_dtype
from ..span_attention.rules import DENSE, SpanPlan, SpanRule, full_layers
from .ablation import ablate
from .heads import gate_values, induction_scores
from .influence import Form, Rows
from .measurements import ALONE, Answered, Loss, Processes
from .profiler import SpanProfile, SpanProfiler
from .solver import Budget, pareto_plans

log = logging.getLogger(__name__)

_QUESTION = 64  # rows before an answer that are likely to be those of the question


class SpanPlanner(ABC):
    """Chooses the spans of a model's heads within a budget."""

    @abstractmethod
    def plans(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes = ALONE
    ) -> list[SpanPlan]:
        """Return one plan, or several to choose from by validation.

        Args:
            model: Dense, in evaluation mode.
            texts: With the model's own answers.
            budget: What the plans may spend.
            processes: That measure together; each returns the same plans.
        """


class Influence(SpanPlanner):
    """The rules whose cost on the model's own answers is least, by a mixed-integer program; a few heads keep everything.

    Costs are those of one backward pass a text, to first order. That order ranks heads well, but makes little of what a head
    loses that sees half of a text. So the heads whose ablation costs most keep everything, and the program shares out the rest.
    MoA (arXiv 2406.14909) is ``form: published, rows: all, loss: cross_entropy, rounds: 0, whole: [0]``.

    Args:
        form: How the effects of dropped keys are summed: ``net``, ``absolute`` or ``published``.
        rows: Rows of the attention maps that count: those of the ``answer``, or ``all``.
        loss: What the influence is upon: the answer's ``margin`` or ``cross_entropy``.
        rounds: How often the model is profiled again with the spans found so far; each time costs are the mean of those at the
            dense model and those at the plan.
        whole: Shares of the kept cache that are spent on heads that keep everything; each that fits gives a plan, to choose from
            by validation, the first one foremost. A single share gives all plans that are best for some mixture of length levels.

    Raises:
        InputError: If ``rounds`` is below 0, or ``whole`` has a number that is no share, or none.
    """

    def __init__(
        self,
        *,
        form: Form = "absolute",
        rows: Rows = "answer",
        loss: Loss = "margin",
        rounds: int = 1,
        whole: Sequence[float] = (0.45, 0.3, 0.6),
    ) -> None:
        if rounds < 0:
            raise InputError(f"rounds={rounds} is below 0. Legal: 0 or more.")
        if not whole or not all(0 <= share <= 1 for share in whole):
            raise InputError(f"whole={list(whole)}: each is a share of the kept cache, and one is needed. Legal: 0 to 1.")
        self.form: Form = form
        self.rows: Rows = rows
        self.loss: Loss = loss
        self.rounds, self.whole = rounds, tuple(whole)

    def plans(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes = ALONE
    ) -> list[SpanPlan]:
        """Return a plan for each share of whole heads that fits, or the plans of the only one."""
        profiler = SpanProfiler(budget.candidates, loss=self.loss)
        dense = profiler.profile(model, texts, processes)
        worth = worth_of_heads(model, texts, budget, "cross_entropy", processes).mean(axis=0) if any(self.whole) else None

        def best(profile: SpanProfile) -> list[SpanPlan]:
            # One process solves for all: a solver that is stopped by its clock may end anywhere.
            return processes.of_first(lambda: self._best(profile, worth, budget, model.config))

        plans = best(dense)
        for _ in range(self.rounds):
            plans = best(dense.halfway(profiler.profile(model, texts, processes, plan=plans[0])))
        return plans

    def _best(self, profile: SpanProfile, worth: np.ndarray | None, budget: Budget, config: PreTrainedConfig) -> list[SpanPlan]:
        costs, full = profile.costs(self.form, self.rows), np.array(full_layers(config))
        plans: list[SpanPlan] = []
        for share in self.whole:
            whole = np.zeros((len(full), int(config.num_key_value_heads)), bool)
            count = int(share * budget.density * whole[full].size)
            if count and worth is not None:
                # Of layers with their own attention no head is worth anything.
                first = np.argsort(-np.where(full[:, None], worth, -np.inf), axis=None, kind="stable")[:count]
                whole.reshape(-1)[first] = True
            try:
                plans += pareto_plans(costs, profile.rules, budget, config, whole, mixtures=len(self.whole) == 1)
            except InputError:
                log.info("whole: %g of the cache for heads that keep everything does not fit the budget at every length", share)
        if not plans:
            raise InputError(
                f"whole={list(self.whole)}: no share leaves room for all other heads within density={budget.density} at the "
                f"lengths {list(budget.lengths)}. Add a smaller share, such as 0, or raise density."
            )
        return plans


def worth_of_heads(
    model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, loss: Loss, processes: Processes = ALONE
) -> np.ndarray:
    """Return how the answers' loss changes when one head alone has the shortest rule [texts, layers, key/value heads].

    It has that rule in the rows of the question and the answer, and is measured in bfloat16 where that is fast.

    Args:
        model: Dense, in evaluation mode.
        texts: With the model's own answers.
        budget: Its shortest rule counts.
        loss: What is measured.
        processes: Each takes its share of the texts.
    """
    reader = copy.deepcopy(model).to(getattr(torch, frozen_dtype("auto", model.device.type)))
    return ablate(reader, texts, budget.shortest, sink=budget.sink, loss=loss, before=_QUESTION, processes=processes)


class LongOrShort(SpanPlanner):
    """A planner that scores heads, and gives the highest the whole text and all others the shortest rule."""

    @abstractmethod
    def costs(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes
    ) -> Mapping[int, np.ndarray]:
        """Return what the shortest rule costs each head, at each length level [layers, key/value heads], 0 or more."""

    def plans(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes = ALONE
    ) -> list[SpanPlan]:
        """Return the plans that are best for some mixture of length levels."""
        short = budget.shortest
        costs = self.costs(model, texts, budget, processes)
        stacked = {level: np.stack([cost, np.zeros_like(cost)], axis=2) for level, cost in costs.items()}
        return processes.of_first(lambda: pareto_plans(stacked, [short, DENSE], budget, model.config))


class Ablation(LongOrShort):
    """Heads by the loss that is measured when each one alone is cut, in the rows of the question and the answer.

    No first order: a forward pass a head and text, of those rows alone. What heads lose together is not seen.

    Args:
        loss: What is measured: the answer's ``margin`` or ``cross_entropy``.
    """

    def __init__(self, *, loss: Loss = "margin") -> None:
        self.loss: Loss = loss

    def costs(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes
    ) -> Mapping[int, np.ndarray]:
        """Return the mean change of the loss at each length level."""
        changes = worth_of_heads(model, texts, budget, self.loss, processes)
        levels = np.array([text.length for text in texts])
        return {int(level): changes[levels == level].mean(axis=0).clip(min=0) for level in sorted(set(levels.tolist()))}


class InductionHeads(LongOrShort):
    """Heads by their induction and echo scores on random text said twice (RazorAttention, arXiv 2407.15891).

    Args:
        tokens: Random tokens, said twice.
        seed: Of the tokens.

    Raises:
        InputError: If there are no tokens.
    """

    def __init__(self, *, tokens: int = 512, seed: int = 0) -> None:
        if tokens < 1:
            raise InputError(f"tokens={tokens} says nothing twice. Legal: 1 or more.")
        self.tokens, self.seed = tokens, seed

    def costs(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes
    ) -> Mapping[int, np.ndarray]:
        """Return the scores; they know no length."""
        return {0: induction_scores(model, tokens=self.tokens, seed=self.seed)}


class HeadGates(LongOrShort):
    """Heads by trained gates between the whole text and a short span (DuoAttention, arXiv 2410.10819).

    Args:
        steps: Of the optimizer, one text each.
        learning_rate: Of the gates.
        penalty: Weight of the gates' mean in the loss.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(self, *, steps: int = 60, learning_rate: float = 0.05, penalty: float = 0.05) -> None:
        for name, value in (("steps", steps), ("learning_rate", learning_rate), ("penalty", penalty)):
            if value <= 0:
                raise InputError(f"{name}={value} trains no gate. Legal: above 0.")
        self.steps, self.learning_rate, self.penalty = steps, learning_rate, penalty

    def costs(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes
    ) -> Mapping[int, np.ndarray]:
        """Return the gates; they know no length."""
        gates = gate_values(
            model,
            texts,
            budget.shortest,
            sink=budget.sink,
            steps=self.steps,
            learning_rate=self.learning_rate,
            penalty=self.penalty,
            processes=processes,
        )
        return {0: gates}


class UniformWindow(SpanPlanner):
    """The same window for every head, behind the first positions (StreamingLLM, arXiv 2309.17453)."""

    def plans(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes = ALONE
    ) -> list[SpanPlan]:
        """Return the plan that keeps the budget's share at every length."""
        return [SpanPlan.same(SpanRule(-budget.sink, budget.density), model.config, sink=budget.sink)]


class Shuffled(SpanPlanner):
    """Another planner's spans given to random heads: what is left when only how many heads have which span is known.

    Args:
        of: The other planner; of several plans its first is taken.
        seed: Of the shuffling.
    """

    def __init__(self, of: SpanPlanner | None = None, *, seed: int = 0) -> None:
        self.of, self.seed = of or Influence(), seed

    def plans(
        self, model: PreTrainedModel, texts: Sequence[Answered], budget: Budget, processes: Processes = ALONE
    ) -> list[SpanPlan]:
        """Return the plan with its rules shuffled."""
        plan = self.of.plans(model, texts, budget, processes)[0]
        rules = [rule for layer in plan.rules if layer is not None for rule in layer]
        order = iter(np.random.default_rng(self.seed).permutation(len(rules)))
        shuffled = tuple(None if layer is None else tuple(rules[next(order)] for _ in layer) for layer in plan.rules)
        return [dataclasses.replace(plan, rules=shuffled, notes=None)]
