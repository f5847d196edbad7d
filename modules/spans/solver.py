"""Spans from costs: a mixed-integer program picks a rule for each head, within a share of the cache at every length."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedConfig

from ...errors import InputError
from ..span_attention.rules import DENSE, SpanPlan, SpanRule, full_layers
from .profiler import CandidateRules

log = logging.getLogger(__name__)

_TIE = 1e-3  # of the whole cost: what is gained where spans longer than needed use up the cache


@dataclass(frozen=True)
class Budget:
    """What a plan may spend.

    Args:
        density: Share of the key/value cache, above 0 up to 1, on the average over heads and at every length.
        lengths: Lengths in tokens.
        candidates: Rules to choose from; their sink counts.
        rules_per_layer: How many distinct rules a layer may have; None for any number.

    Raises:
        InputError: If a number is out of range, or not even the shortest rules fit.
    """

    density: float
    lengths: tuple[int, ...]
    candidates: CandidateRules
    rules_per_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"density={self.density} is no share of the cache. Legal: above 0, up to 1.")
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"lengths={list(self.lengths)}: a budget needs one or more lengths, of 1 token or more.")
        if self.rules_per_layer is not None and self.rules_per_layer < 1:
            raise InputError(f"rules_per_layer={self.rules_per_layer} leaves a layer without a rule. Legal: 1 or more, or null.")

        self.candidates.check()
        for length in self.lengths:
            least = self.shortest.kept(length, self.sink)
            if least > self.density * length:
                raise InputError(
                    f"density={self.density} leaves {self.density * length:.0f} of {length} tokens, and the shortest rule with a "
                    f"sink of {self.sink} keeps {least}. Raise density, lower sink or window, or leave out that length."
                )

    @property
    def sink(self) -> int:
        """First positions that every head sees."""
        return self.candidates.sink

    @property
    def shortest(self) -> SpanRule:
        """The candidate that keeps least."""
        return self.candidates.shortest


def solve(costs: np.ndarray, rules: Sequence[SpanRule], budget: Budget, whole: np.ndarray | None = None) -> np.ndarray:
    """Return the rule of each head that costs least together, by the HiGHS solver of ``scipy.optimize.milp``.

    Args:
        costs: [layers, heads, rules], 0 or more; a layer that keeps its own attention is left out.
        rules: The candidates.
        budget: What may be spent.
        whole: Heads that keep everything, bool [layers, heads]; None leaves all to the costs.

    Returns:
        Number of the rule for each head, int64 [layers, heads].

    Raises:
        InputError: If no choice fits the budget.
    """
    # Imported here: it comes with an extra, and plans are used without it.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack, identity, kron, vstack

    layers, per_layer, options = costs.shape
    heads = layers * per_layer
    held = np.array([[rule.held(length, budget.sink) / length for rule in rules] for length in budget.lengths])
    if budget.density == 1:
        held = held.clip(max=1)
    tie = _TIE * costs.max(axis=2).sum() / heads + 1e-12
    objective = (costs + tie * (1 - held.mean(axis=0))).reshape(-1) / max(costs.max(), 1e-12)
    one = kron(identity(heads), np.ones((1, options)), format="csr")
    size = csr_matrix(np.tile(held, heads))
    constraints = [(one, 1.0, 1.0), (size, -np.inf, np.full(len(held), budget.density * heads))]
    least = np.zeros((heads, options))
    if whole is not None:
        least[whole.reshape(-1), rules.index(DENSE)] = 1.0
    lower = least.reshape(-1)
    if budget.rules_per_layer is not None:
        # One more variable for each rule of each layer: whether any of its heads has it.
        used = layers * options
        spread = kron(kron(identity(layers), np.ones((per_layer, 1))), identity(options), format="csr")
        objective, lower = (np.concatenate([part, np.zeros(used)]) for part in (objective, lower))
        constraints = [(hstack([matrix, csr_matrix((matrix.shape[0], used))]), low, high) for matrix, low, high in constraints]
        constraints.append((hstack([identity(heads * options), -spread]), -np.inf, 0.0))
        limit = hstack([csr_matrix((layers, heads * options)), kron(identity(layers), np.ones((1, options)))])
        constraints.append((limit, -np.inf, float(budget.rules_per_layer)))
    best = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(lower, 1.0),
        constraints=[LinearConstraint(vstack([matrix], format="csr"), low, high) for matrix, low, high in constraints],
        options={"mip_rel_gap": 1e-3, "time_limit": 60},
    )
    if best.status == 1:
        log.warning("Planning was stopped after a minute; the plan may be a little worse than the best, and another next time.")
    if best.x is None:
        raise InputError(
            f"No choice of rules fits density={budget.density} at the lengths {list(budget.lengths)} ({best.message}). Raise "
            "density or rules_per_layer, or add shorter rules (alphas, betas)."
        )
    return best.x[: heads * options].reshape(layers, per_layer, options).argmax(axis=2)


def pareto_plans(
    costs: Mapping[int, np.ndarray],
    rules: Sequence[SpanRule],
    budget: Budget,
    config: PreTrainedConfig,
    whole: np.ndarray | None = None,
    *,
    mixtures: bool = True,
) -> list[SpanPlan]:
    """Return the plans that are best for some mixture of length levels, those left out that another beats at every level.

    Args:
        costs: Cost at each length level [layers, key/value heads, rules].
        rules: The candidates.
        budget: What may be spent.
        config: Of the model.
        whole: Heads that keep everything, bool [layers, key/value heads]; None leaves all to the costs.
        mixtures: Try mixtures of levels; otherwise there is one plan, for all levels alike.

    Returns:
        One plan or more; their notes have the cost at each level.
    """
    full = full_layers(config)
    levels = sorted(costs)
    stack = np.stack([costs[level][full] for level in levels])
    weights = [np.ones(len(levels)), *np.eye(len(levels))]
    weights += [np.eye(len(levels))[list(pair)].sum(axis=0) for pair in itertools.combinations(range(len(levels)), 2)]
    found: dict[bytes, np.ndarray] = {}
    for weight in weights[: None if mixtures and len(levels) > 1 else 1]:
        choice = solve(np.tensordot(weight / weight.sum(), stack, 1), rules, budget, None if whole is None else whole[full])
        found.setdefault(choice.tobytes(), choice)
    choices = list(found.values())
    totals = [np.take_along_axis(stack, choice[None, :, :, None], 3).sum(axis=(1, 2, 3)) for choice in choices]
    plans = []
    for choice, total in zip(choices, totals):
        if any((other <= total).all() and (other < total).any() for other in totals):
            continue
        rows = iter(choice)
        chosen = tuple(tuple(rules[number] for number in next(rows)) if whole else None for whole in full)
        notes = {"costs": {str(level): float(value) for level, value in zip(levels, total)}}
        plans.append(SpanPlan(chosen, budget.sink, notes=notes))
    return plans
