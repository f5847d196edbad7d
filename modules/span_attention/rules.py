"""Which keys a head may see: a rule for each key/value head, all of them together a plan.

A query at position i (counted from 0, padding left out) sees the first ``sink`` positions and the last ``alpha + beta (i + 1)``
ones, at least ``least``, itself included: the elastic rules of MoA (arXiv 2406.14909), with a row's own position for its length,
so that a text that grows token by token sees what it would see all at once. ``beta`` is at most 1, so a key that has fallen out
never comes back, and a cache may forget it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from ...errors import InputError
from ...files import write_json

CONFIG_KEY = "span_plan"  # of a model's config.json
FILE = "span_plan.json"
NOTICE = (
    "**Plain `transformers`, vLLM and llama.cpp run this model dense. Its heads see only their spans, and its cache shrinks, "
    "where `fulgurite.modules.spans` is imported before `from_pretrained`, and in `fulgurite generate`.**"
)


@dataclass(frozen=True, order=True)
class SpanRule:
    """How many of the last positions a head sees.

    Args:
        alpha: Positions at any length; below 0 it takes away from what ``beta`` gives.
        beta: Positions for each position of the text, 0 to 1; with an alpha of 0, 1 sees everything.
        least: Positions that it sees in any case, 1 or more.

    Raises:
        InputError: If a number is out of range.
    """

    alpha: int
    beta: float = 0.0
    least: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1 or self.least < 1:
            raise InputError(
                f"alpha={self.alpha}, beta={self.beta}, least={self.least} is no span. Legal: beta from 0 to 1, least 1 or more."
            )

    def span(self, position: int) -> int:
        """Return how many of the last positions, itself included, the query at a position sees."""
        return max(self.least, self.alpha + math.floor(self.beta * (position + 1)))

    def kept(self, length: int, sink: int) -> int:
        """Return how many keys the last query of a text sees, sink included."""
        return min(length, sink + self.span(length - 1))

    def held(self, length: int, sink: int) -> int:
        """Return for how many keys a cache has room at most when the last query of a text comes."""
        kept = self.kept(length, sink)
        return kept + (growth(kept) - 1 if self.beta else 0)


def growth(room: int) -> int:
    """Return by how many keys a cache with room for some grows at once: each time it copies them all."""
    return max(1, min(16, room // 64))


DENSE = SpanRule(0, 1.0)


@dataclass(frozen=True)
class SpanPlan:
    """The rules of all key/value heads of a model.

    Args:
        rules: A list a layer with a rule a key/value head; None for a layer that keeps its own attention.
        sink: First positions that every head sees.
        notes: What it was made of: densities, lengths, losses; plain JSON.

    Raises:
        InputError: If the sink is below 0, or no layer has rules.
    """

    rules: tuple[tuple[SpanRule, ...] | None, ...]
    sink: int = 64
    notes: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise InputError(f"sink={self.sink} is below 0. Legal: 0 positions or more.")
        if not any(self.rules):
            raise InputError("rules: no layer has any. A plan needs a rule for each key/value head of at least one layer.")

    @classmethod
    def same(cls, rule: SpanRule, config: PreTrainedConfig, *, sink: int = 64) -> Self:
        """Return the plan with one rule for all heads."""
        heads = int(config.num_key_value_heads)
        return cls(tuple((rule,) * heads if full else None for full in full_layers(config)), sink)

    def density(self, length: int) -> float:
        """Return the share of the key/value cache that is kept at a length; layers with their own attention are left out."""
        kept = [rule.kept(length, self.sink) for rules in self.rules if rules is not None for rule in rules]
        return sum(kept) / (len(kept) * length)

    def check(self, config: PreTrainedConfig) -> None:
        """Say whether the plan fits a model.

        Raises:
            InputError: If it has other layers or heads.
        """
        wanted = [int(config.num_key_value_heads) if full else None for full in full_layers(config)]
        own = [None if rules is None else len(rules) for rules in self.rules]
        if own != wanted:
            raise InputError(
                f"The plan of spans is for a model with {_shape(own)}; this one has {_shape(wanted)}. Make a plan for this "
                "model: fulgurite fit -c spans/compress."
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        rules = [None if layer is None else [list(astuple(rule)) for rule in layer] for layer in self.rules]
        return {"version": 1, "sink": self.sink, "rules": rules, "notes": self.notes or {}}

    @classmethod
    def from_json(cls, data: Any, where: str = "span_plan") -> Self:
        """Read what ``to_json`` gave.

        Raises:
            InputError: If it is something else.
        """
        try:
            if data["version"] != 1:
                raise InputError(f"{where}: version {data['version']} of a span plan is newer than this program. Update it.")
            rules = tuple(
                None if layer is None else tuple(SpanRule(int(alpha), float(beta), int(least)) for alpha, beta, least in layer)
                for layer in data["rules"]
            )
            return cls(rules, int(data["sink"]), dict(data["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} is no span plan: {error!r}.") from error

    def save(self, folder: Path) -> None:
        """Write the plan into a model's folder, whose config.json then carries it."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        write_json(folder / FILE, self.to_json())
        write_json(folder / "config.json", {**config, CONFIG_KEY: self.to_json()})


def plan_of(config: PreTrainedConfig) -> SpanPlan | None:
    """Return the plan that a model's config carries, checked against the model; None where it has none.

    Raises:
        InputError: If it is no plan, or one for another model.
    """
    data = getattr(config, CONFIG_KEY, None)
    if data is None:
        return None
    plan = SpanPlan.from_json(data, f"{CONFIG_KEY} in config.json")
    plan.check(config)
    return plan


def refuse_plan(config: PreTrainedConfig) -> None:
    """Raise an InputError for a model with a plan, where a method does not train through it."""
    if getattr(config, CONFIG_KEY, None) is not None:
        raise InputError(
            "source: the model has attention spans, which this method cannot train through. Begin with the model that they were "
            "made for, and give the result spans afterwards: fulgurite fit -c spans/compress."
        )


def full_layers(config: PreTrainedConfig) -> list[bool]:
    """Return which layers attend to everything; those with a sliding window of their own do not.

    Raises:
        InputError: If the config is that of a model of several parts.
    """
    if not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"{type(config).__name__} has no layers of its own: give the causal language model inside, not the whole."
        )
    usual = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * int(config.num_hidden_layers)
    return [kind == "full_attention" for kind in kinds]


def groups_of(rules: Sequence[SpanRule]) -> dict[SpanRule, list[int]]:
    """Return the key/value heads of each distinct rule."""
    groups: dict[SpanRule, list[int]] = {}
    for head, rule in enumerate(rules):
        groups.setdefault(rule, []).append(head)
    return groups


def _shape(heads: list[int | None]) -> str:
    full = [count for count in heads if count is not None]
    return f"{len(heads)} layers, {len(full)} of them with spans, and {full[0] if full else 0} key/value heads"
