"""What a head is really worth: the loss of the model's answers when that head alone has another span."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..pretrained import CACHE, head_weight
from ..span_attention.attention import attentions
from ..span_attention.rules import DENSE, SpanPlan, SpanRule
from ..span_attention.runtime import apply_plan, remove_plan
from .measurements import ALONE, Answered, Loss, Processes, loss_of, measure


def ablate(
    model: PreTrainedModel,
    texts: Sequence[Answered],
    rule: SpanRule,
    *,
    sink: int,
    loss: Loss,
    before: int | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Measure, for each text, how the loss changes when one head has a rule and all others see everything.

    Args:
        model: Dense, in evaluation mode.
        texts: With the model's own answers.
        rule: Of the one head.
        sink: First positions that it sees.
        loss: Mean over the answer's tokens.
        before: See ``exchange``.
        processes: Each takes its share of the texts.

    Returns:
        float64 [texts, layers, key/value heads]; 0 for layers with their own window.
    """
    dense, cut = (SpanPlan.same(own, model.config, sink=sink) for own in (DENSE, rule))
    return exchange(model, texts, dense, cut, loss=loss, before=before, processes=processes)


def exchange(
    model: PreTrainedModel,
    texts: Sequence[Answered],
    plan: SpanPlan,
    other: SpanPlan,
    *,
    loss: Loss,
    before: int | None = None,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Measure, for each text, how the loss changes when one head has its rule from another plan than all others.

    Args:
        model: Dense, in evaluation mode; it is again what it was afterwards.
        texts: With the model's own answers.
        plan: Of the others.
        other: Of the one head; it has the same sink.
        loss: Mean over the answer's tokens.
        before: The head has its other rule in the rows of the answer and in so many before it, which is many times faster where
            texts are long; None changes all rows.
        processes: Each takes its share of the texts.

    Returns:
        float64 [texts, layers, key/value heads]; 0 for layers with their own window.
    """
    settings = [[one.to_json()["rules"], one.sink] for one in (plan, other)]
    compute = functools.partial(_changes, model, plan=plan, other=other, loss=loss, before=before)
    return measure(model, "ablation", [*settings, loss, before], texts, compute, processes)


def compare_with_ablation(influence: np.ndarray, changes: np.ndarray) -> dict[str, float]:
    """Return how well the influence of heads agrees with their ablation.

    Args:
        influence: Cost of the rule that heads were ablated to [layers, key/value heads], of layers that have rules.
        changes: Mean change of the loss in ablation [layers, key/value heads], of the same.

    Returns:
        ``rank_correlation`` (Spearman's), and ``worst_ten_in_first_twenty``: how many of the ten heads whose ablation costs most
        are among the twenty of the highest influence.
    """
    # Imported here: it comes with an extra, and plans are used without it.
    from scipy.stats import spearmanr

    ours, truth = influence.reshape(-1), changes.reshape(-1)
    worst, first = set(np.argsort(-truth)[:10].tolist()), set(np.argsort(-ours)[:20].tolist())
    correlation = float(spearmanr(ours, truth).statistic)
    return {"rank_correlation": correlation, "worst_ten_in_first_twenty": float(len(worst & first))}


@torch.no_grad()
def _changes(
    model: PreTrainedModel, text: Answered, *, plan: SpanPlan, other: SpanPlan, loss: Loss, before: int | None
) -> np.ndarray:
    layers: nn.ModuleList = model.base_model.layers  # type: ignore[assignment]
    changes = np.zeros((len(layers), int(model.config.num_key_value_heads)))
    ids = text.ids[None, :-1].to(model.device)
    start = 0 if before is None else max(0, text.answer_start - 1 - before)
    answer = slice(text.answer_start - 1 - start, None)
    weight, targets = head_weight(model), text.ids[text.answer_start :].to(model.device)

    def value(states: Tensor) -> float:
        parts = zip(states[0, answer].split(64), targets.split(64))  # a few logits at a time
        return float(torch.cat([loss_of((chunk @ weight.T).float(), target, loss) for chunk, target in parts]).mean())

    inputs: list[tuple[Any, Any]] = []
    apply_plan(model, plan)
    cache = DynamicCache() if start else None
    try:
        if start:
            model.base_model(input_ids=ids[:, :start], use_cache=True, **{CACHE: cache})
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
            for layer in layers
        ]
        try:
            rows = model.base_model(input_ids=ids[:, start:], use_cache=start > 0, **{CACHE: cache})
            unchanged = value(rows.last_hidden_state)
        finally:
            for hook in hooks:
                hook.remove()
        if cache is not None:
            cache.crop(start - ids.shape[1])
        for number, (module, own, instead) in enumerate(zip(attentions(model), plan.rules, other.rules)):
            if own is None or instead is None:
                continue
            for head in range(len(own)):
                if own[head] == instead[head]:
                    continue
                module.span_rules = (*own[:head], instead[head], *own[head + 1 :])  # type: ignore[assignment]
                # What comes before the layer is what it was.
                states = inputs[number][0][0]
                for layer, (_, kwargs) in zip(layers[number:], inputs[number:]):
                    states = layer(states, **kwargs)
                    states = states[0] if isinstance(states, tuple) else states
                changes[number, head] = value(model.base_model.norm(states)) - unchanged  # type: ignore[operator]
                for held in cache.layers[number:] if cache is not None else []:
                    held.crop(start - ids.shape[1])  # type: ignore[union-attr]
            module.span_rules = own  # type: ignore[assignment]
    finally:
        remove_plan(model)
    return changes
