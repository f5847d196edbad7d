"""A model with a plan of spans: how the plan gets onto it, and how ``generate`` gets its cache."""

import functools
import logging
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoModelForCausalLM, PreTrainedModel

from ...errors import InputError, nearest
from .attention import NAME, attentions
from .cache import SpanCache
from .rules import CONFIG_KEY, SpanPlan, plan_of

Prefill = Literal["sdpa", "flex"]

log = logging.getLogger(__name__)


def apply_plan(model: PreTrainedModel, plan: SpanPlan, *, prefill: Prefill = "sdpa") -> PreTrainedModel:
    """Make a model attend as a plan says, in training, evaluation and ``generate``, which then keeps what is in sight alone.

    Args:
        model: A causal language model; it is changed and returned.
        plan: Its config carries it from now on.
        prefill: How a whole text without padding is read: ``sdpa``, in blocks of queries for each rule; or ``flex``, by
            FlexAttention, which is compiled for each 1024 tokens more (on a CPU that takes a C++ compiler). Training uses
            ``sdpa``.

    Raises:
        InputError: If ``prefill`` is unknown, the plan is for another model, or the model's attention cannot be given spans.
    """
    if prefill not in get_args(Prefill):
        raise InputError(f"prefill={prefill!r} is unknown.{nearest(prefill, get_args(Prefill))}")
    plan.check(model.config)
    layers = attentions(model)
    model.set_attn_implementation(NAME)
    for layer, rules in zip(layers, plan.rules):
        layer.span_rules, layer.span_sink, layer.span_prefill = rules, plan.sink, prefill  # type: ignore[assignment]
    setattr(model.config, CONFIG_KEY, plan.to_json())
    original = type(model).generate  # type: ignore[attr-defined]

    @functools.wraps(original)
    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", model.generation_config.use_cache) is not False:
            kwargs["past_key_values"] = SpanCache(plan, model.config)
        return original(model, inputs, *args, **kwargs)

    model.generate = generate  # type: ignore[assignment]
    return model


def remove_plan(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model attend to everything again."""
    for layer in attentions(model):
        layer.span_rules = None  # type: ignore[assignment]
    model.set_attn_implementation("sdpa")
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)
    model.__dict__.pop("generate", None)
    return model


def load(folder: str | Path, *, prefill: Prefill = "sdpa", **kwargs: Any) -> PreTrainedModel:
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


def _apply_on_load() -> None:
    """Let ``from_pretrained`` apply the plan that a config carries, from the import of this module on."""
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        plan = plan_of(model.config)
        if plan is not None and hasattr(model, "generate"):
            apply_plan(model, plan)
            log.info("Attention spans of the model's folder: %.0f %% of the cache at 4096 tokens", 100 * plan.density(4096))
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]


_apply_on_load()
