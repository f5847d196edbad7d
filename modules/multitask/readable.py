"""What branches answer, as a person reads it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .branches import Branch
from .objectives import IGNORED, Objective
from .trunk import Trunk, View


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token id that ends a text, or None where there is none; BERT's kind has but what stands behind each text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


@torch.no_grad()
def readable(
    trunk: Trunk,
    branch: Branch,
    objective: Objective,
    states: Tensor,
    view: View,
    targets: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Return a branch's answer to each row of a view.

    Args:
        trunk: The shared layers.
        branch: The task's own.
        objective: What it predicts.
        states: Of the branch [rows, length, hidden size].
        view: What was read.
        targets: Of the task; where they are unmasked is what is asked.
        tokenizer: Of the model.
        max_new_tokens: Tokens that are written behind a prompt at most.

    Returns:
        ``text`` and ``prediction``: of a text the class, with its ``probability``, or the number; of tokens the classes of those
        that have a target; where words are masked what stood there; behind a prompt the text that goes on.
    """
    lengths = view["lengths"].tolist()
    texts = [tokenizer.decode(ids[:length], skip_special_tokens=True) for ids, length in zip(view["input_ids"], lengths)]
    if objective.kind == "next_token":
        return [
            _continued(trunk, branch, view, row, length, targets[row], tokenizer, max_new_tokens)
            for row, length in enumerate(lengths)
        ]
    scores = branch.scores(trunk, states, view).float()
    if objective.kind == "number":
        return [{"text": text, "prediction": round(float(value), 4)} for text, value in zip(texts, scores)]
    if objective.kind == "sequence":
        shares, chosen = scores.softmax(dim=-1).max(dim=-1)
        return [
            {"text": text, "prediction": objective.classes[int(one)], "probability": round(float(share), 4)}
            for text, one, share in zip(texts, chosen, shares)
        ]
    chosen = scores.argmax(dim=-1)
    asked = targets != IGNORED
    if objective.kind == "token":
        found = [[objective.classes[int(one)] for one in row[here]] for row, here in zip(chosen, asked)]
        return [{"text": text, "prediction": row} for text, row in zip(texts, found)]
    filled = torch.where(asked, chosen, view["input_ids"])
    return [
        {"text": text, "prediction": tokenizer.decode(ids[:length], skip_special_tokens=True)}
        for text, ids, length in zip(texts, filled, lengths)
    ]


def _continued(
    trunk: Trunk,
    branch: Branch,
    view: View,
    row: int,
    length: int,
    targets: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Write what follows a row's prompt: all before its first target, or its first half where every token is one."""
    supervised = (targets[1:length] != IGNORED).nonzero().flatten()
    begin = int(supervised[0]) + 1 if len(supervised) else length
    prompt = max(1, length // 2) if targets[0] != IGNORED else begin
    ids = view["input_ids"][row : row + 1, :prompt]
    room = max_new_tokens if trunk.most_tokens is None else min(max_new_tokens, trunk.most_tokens - prompt)
    for _ in range(room):
        own: View = {"mask": "causal", "input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
        states = branch.states(trunk, trunk(own), own)[:, -1:]
        chosen = branch.scores(trunk, states, own)[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
        if int(chosen) == end_token(tokenizer):
            break
    asked, written = ids[0, :prompt], ids[0, prompt:]
    return {
        "text": tokenizer.decode(asked, skip_special_tokens=True),
        "prediction": tokenizer.decode(written, skip_special_tokens=True),
    }
