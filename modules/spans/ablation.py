"""What a head is really worth: the loss of the model's answers when that head alone has a short span."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..pretrained import head_weight
from ..span_attention.attention import NAME, attentions
from ..span_attention.rules import DENSE, SpanRule, full_layers
from .measurements import ALONE, Answered, Loss, Processes, loss_of, measure


def ablate(
    model: PreTrainedModel,
    texts: Sequence[Answered],
    rule: SpanRule,
    *,
    sink: int,
    loss: Loss,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Measure, for each text, how the loss changes when one head has a rule and all others see everything.

    Args:
        model: Dense, in evaluation mode.
        texts: With the model's own answers.
        rule: Of the one head.
        sink: First positions that it sees.
        loss: Mean over the answer's tokens.
        processes: Each takes its share of the texts.

    Returns:
        float64 [texts, layers, key/value heads]; 0 for layers with their own window.
    """
    settings = [astuple(rule), sink, loss]
    return measure(model, "ablation", settings, texts, lambda text: _changes(model, text, rule, sink, loss), processes)


def compare_with_ablation(influence: np.ndarray, changes: np.ndarray) -> dict[str, float]:
    """Return how well the influence of heads agrees with their ablation.

    Args:
        influence: Cost of the rule that heads were ablated to [layers, key/value heads].
        changes: Mean change of the loss in ablation [layers, key/value heads].

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
def _changes(model: PreTrainedModel, text: Answered, rule: SpanRule, sink: int, loss: Loss) -> np.ndarray:
    layers: nn.ModuleList = model.base_model.layers  # type: ignore[assignment]
    heads = int(model.config.num_key_value_heads)
    changes = np.zeros((len(layers), heads))
    inputs: list[tuple[Any, Any]] = []
    weight, targets = head_weight(model), text.ids[text.answer_start :].to(model.device)

    def value(states: Tensor) -> float:
        rows = states[0, text.answer_start - 1 :]
        parts = zip(rows.split(64), targets.split(64))  # a few logits at a time
        return float(torch.cat([loss_of((chunk @ weight.T).float(), target, loss) for chunk, target in parts]).mean())

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    with _attention(model) as modules:
        try:
            ids = text.ids[None, :-1].to(model.device)
            dense = value(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        finally:
            for hook in hooks:
                hook.remove()
        for number, whole in enumerate(full_layers(model.config)):
            for head in range(heads if whole else 0):
                modules[number].span_rules = tuple(rule if head == other else DENSE for other in range(heads))  # type: ignore[assignment]
                modules[number].span_sink = sink  # type: ignore[assignment]
                # What comes before the layer is what it was.
                states = inputs[number][0][0]
                for layer, (_, kwargs) in zip(layers[number:], inputs[number:]):
                    states = layer(states, **kwargs)
                    states = states[0] if isinstance(states, tuple) else states
                changes[number, head] = value(model.base_model.norm(states)) - dense  # type: ignore[operator]
            modules[number].span_rules = None  # type: ignore[assignment]
    return changes


@contextmanager
def _attention(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """Let layers be given rules one by one; without any they attend as they did."""
    before = model.config._attn_implementation
    modules = attentions(model)
    model.set_attn_implementation(NAME)
    for module in modules:
        module.span_rules = None  # type: ignore[assignment]
    try:
        yield modules
    finally:
        for module in modules:
            module.span_rules = None  # type: ignore[assignment]
        model.set_attn_implementation(before)
