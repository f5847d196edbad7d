"""Scores that other methods give a head, to tell those that need the whole text from those that do not."""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from ..span_attention.rules import SpanRule
from ..span_attention.windows import attend_in_blocks
from .measurements import ALONE, Answered, Processes, measure
from .probe import frozen, probed

_BLOCK = 256


@torch.no_grad()
def induction_scores(model: PreTrainedModel, *, tokens: int = 512, seed: int = 0) -> np.ndarray:
    """Return how much each head looks back at what came after, or was, the same token before, in random text said twice.

    The form of RazorAttention (arXiv 2407.15891): induction heads attend to the token behind an earlier occurrence of the present
    one, echo heads to the occurrence itself. A key/value head has the higher of the two of its best query head.

    Args:
        model: Dense, in evaluation mode.
        tokens: Random tokens, said twice.
        seed: Of the tokens.

    Returns:
        Share of the attention, float64 [layers, key/value heads].
    """
    scores = np.zeros((int(model.config.num_hidden_layers), int(model.config.num_key_value_heads)))
    random = torch.randint(
        0, int(model.config.vocab_size), (tokens,), generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    rows = torch.arange(tokens, 2 * tokens, device=model.device)

    def probe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, dense: Callable[[], Tensor]) -> Tensor:
        heads = key.shape[1]
        grouped = query[0].unflatten(0, (heads, -1)).float()
        found = torch.zeros(heads, grouped.shape[1], 2, device=key.device)
        for block in rows.split(_BLOCK):
            hidden = torch.arange(2 * tokens, device=key.device) > block[:, None]
            logits = grouped[:, :, block] @ key[0, :, None].transpose(-1, -2).float() * scaling
            weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
            for number, place in enumerate((block - tokens + 1, block - tokens)):
                looked = weights.gather(-1, place[:, None].expand(*weights.shape[:2], -1, -1)).sum(dim=(2, 3)) / tokens
                found[..., number] += looked
        scores[layer] = found.amax(dim=(1, 2)).cpu().numpy()
        return dense()

    with probed(model, probe):
        model.base_model(input_ids=torch.cat([random, random])[None].to(model.device), use_cache=False)
    return scores


def gate_values(
    model: PreTrainedModel,
    texts: Sequence[Answered],
    rule: SpanRule,
    *,
    sink: int,
    steps: int,
    learning_rate: float,
    penalty: float,
    processes: Processes = ALONE,
) -> np.ndarray:
    """Train a gate for each head, between its attention to everything and to a short span, and return the gates.

    The form of DuoAttention (arXiv 2410.10819): the loss is the squared distance of the final hidden states in the answer's rows
    from the dense model's, and a penalty on the gates, so that those close which can.

    Args:
        model: Dense, in evaluation mode.
        texts: Read one after another, again and again.
        rule: The short span.
        sink: First positions that every head sees.
        steps: Of the optimizer (AdamW), one text each.
        learning_rate: Of the optimizer; it falls to 0 with the last step.
        penalty: Weight of the gates' mean.
        processes: The first one trains.

    Returns:
        0 (short) to 1 (everything), float64 [layers, key/value heads].
    """
    everything = Answered(torch.cat([text.ids for text in texts]), sum(text.answer_start for text in texts), 0)
    settings = [astuple(rule), sink, steps, learning_rate, penalty]

    def train(_: Answered) -> np.ndarray:
        return _train_gates(model, texts, rule, sink, steps, learning_rate, penalty)

    return measure(model, "gates", settings, [everything], train, processes)[0]


def _train_gates(
    model: PreTrainedModel, texts: Sequence[Answered], rule: SpanRule, sink: int, steps: int, learning_rate: float, penalty: float
) -> np.ndarray:
    heads = int(model.config.num_key_value_heads)
    gates = torch.ones(int(model.config.num_hidden_layers), heads, device=model.device, requires_grad=True)
    optimizer = torch.optim.AdamW([gates], lr=learning_rate, weight_decay=0.0)

    def probe(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, dense: Callable[[], Tensor]) -> Tensor:
        places = torch.arange(key.shape[2], device=key.device)[None]
        grouped = query.unflatten(1, (heads, -1))
        short = attend_in_blocks(grouped, key, value, rule, sink, scaling, queries=places, keys=places, ordered=True)
        short = short.flatten(1, 2).transpose(1, 2)
        out = dense()
        share = gates[layer].clamp(0, 1).repeat_interleave(query.shape[1] // heads)[:, None].to(out.dtype)
        return share * out + (1 - share) * short

    for step in track(range(steps), description="Training gates"):
        text = texts[step % len(texts)]
        ids, rows = text.ids[None, :-1].to(model.device), slice(text.answer_start - 1, None)
        with torch.no_grad():
            target = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, rows]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        with torch.enable_grad(), probed(model, probe), frozen(model, checkpointed=ids.shape[1] > 1024):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, rows]
            loss = (states - target).float().square().mean() + penalty * gates.clamp(0, 1).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
    return gates.detach().double().cpu().numpy()
