"""A model with a plan of spans: how the plan gets onto it, and how ``generate`` gets its cache."""

import functools
import logging
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from ...errors import InputError, nearest
from ..pretrained import CACHE
from .attention import NAME, attentions
from .cache import SpanCache
from .rules import CONFIG_KEY, SpanPlan, plan_of

Prefill = Literal["auto", "sdpa", "flex"]

log = logging.getLogger(__name__)


def apply_plan(model: PreTrainedModel, plan: SpanPlan, *, prefill: Prefill = "auto") -> PreTrainedModel:
    """Make a model attend as a plan says, in training, evaluation and ``generate``, which then keeps what is in sight alone.

    Args:
        model: A causal language model; it is changed and returned.
        plan: Its config carries it from now on.
        prefill: How a whole text without padding is read: ``sdpa``, in blocks of queries for each rule; ``flex``, by
            FlexAttention, which is compiled for each 1024 tokens more (on a CPU that takes a C++ compiler); or ``auto``:
            FlexAttention on a GPU from 2048 tokens on. Training uses ``sdpa``.

    Raises:
        InputError: If ``prefill`` is unknown, the plan is for another model, or the model's attention cannot be given spans.
    """
    if prefill not in get_args(Prefill):
        raise InputError(f"prefill={prefill!r} is unknown.{nearest(prefill, get_args(Prefill))}")
    plan.check(model.config)
    layers = attentions(model)
    before = model.config._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
        layers[0].span_before = before
    for layer, rules in zip(layers, plan.rules):
        layer.span_rules, layer.span_sink, layer.span_prefill = rules, plan.sink, prefill  # type: ignore[assignment]
    setattr(model.config, CONFIG_KEY, plan.to_json())
    return model


def adopt_plan(model: PreTrainedModel) -> SpanPlan | None:
    """Apply the plan that a model's config carries, if it has one, and return it.

    Raises:
        InputError: If it is no plan, or one for another model.
    """
    plan = plan_of(model.config)
    if plan is not None and any(getattr(layer, "span_rules", None) is None for layer in attentions(model)):
        apply_plan(model, plan)
    return plan


def remove_plan(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model attend to everything again, as it did before."""
    layers = attentions(model)
    for layer in layers:
        layer.span_rules = None  # type: ignore[assignment]
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(getattr(layers[0], "span_before", "sdpa"))
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)
    return model


def load(folder: str | Path, *, prefill: Prefill = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a model whose folder has a plan of spans, and make it attend as the plan says.

    Args:
        folder: Folder of ``transformers``.
        prefill: How a whole text is read; see ``apply_plan``.
        kwargs: For ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: If the folder has no plan, or one for another model.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    plan = plan_of(model.config)
    if plan is None:
        raise InputError(f"{folder} has no plan of spans in its config.json. Load it with transformers.")
    return apply_plan(model, plan, prefill=prefill)


def _extend_transformers() -> None:
    """Let ``from_pretrained`` apply the plan that a config carries, and ``generate`` keep what is in sight alone."""
    load_original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    generate_original = GenerationMixin.generate

    @functools.wraps(load_original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = load_original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        plan = adopt_plan(model) if hasattr(model, "generate") else None
        if plan is not None:
            log.info("Attention spans of the model's folder: %.0f %% of the cache at 4096 tokens", 100 * plan.density(4096))
        return loaded

    @functools.wraps(generate_original)
    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.config) if getattr(self.config, "_attn_implementation", None) == NAME else None
        # What one leaves open, transformers takes from the next.
        said = [
            kwargs.get("use_cache"),
            *(getattr(one, "use_cache", None) for one in (generation_config, self.generation_config)),
        ]
        cached = next((use for use in said if use is not None), True)
        if plan is not None and cached and not any(kwargs.get(name) is not None for name in {CACHE, "past_key_values"}):
            kwargs[CACHE] = SpanCache(plan, self.config)
        return generate_original(self, inputs, generation_config, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]
    GenerationMixin.generate = generate  # type: ignore[method-assign]


_extend_transformers()
