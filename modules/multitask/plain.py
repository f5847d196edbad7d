"""Trunk and one branch as a plain model of ``transformers``, where it has one of their kind."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ...errors import InputError
from .branches import Branch, TransformerBranch
from .objectives import Objective
from .trunk import Trunk

_DENSE_TANH = ("bert", "roberta", "xlm-roberta", "camembert")  # the classifier's first layer, on the first token


def why_not_plain(trunk: Trunk, branch: Branch, objective: Objective) -> str | None:
    """Return why ``transformers`` has no model of trunk and branch, or None where it has.

    Args:
        trunk: The shared layers.
        branch: The task's own.
        objective: What it predicts.
    """
    kind = trunk.model.config.model_type
    if type(branch) is not TransformerBranch:  # a sub-class may compute something else
        return f"its branch is a {type(branch).__name__}"
    if not trunk.is_encoder:
        return None if objective.kind == "next_token" else "a decoder that sees both directions is no model of transformers"
    if objective.kind in ("sequence", "number") and kind in _DENSE_TANH:
        return None if branch.pooler is not None else f"transformers' {kind} models read the first token, not the mean of all"
    if objective.kind == "token":
        return None
    return f"transformers' {kind} models predict a {objective.kind} in another way"


@torch.no_grad()
def plain_model(trunk: Trunk, branch: Branch, objective: Objective) -> PreTrainedModel:
    """Return a model of ``transformers`` with the same numbers: the branch's layers follow the trunk's.

    Args:
        trunk: The shared layers.
        branch: The task's own.
        objective: What it predicts.

    Raises:
        InputError: If there is no such model.
    """
    reason = why_not_plain(trunk, branch, objective)
    if reason is not None:
        raise InputError(f"Trunk and branch cannot be exported to transformers: {reason}.")
    assert isinstance(branch, TransformerBranch)
    config = copy.deepcopy(trunk.model.config)
    count = config.num_hidden_layers
    config.num_hidden_layers = count + branch.count
    if getattr(config, "layer_types", None):
        own = (config.layer_types * branch.count)[-branch.count :] if branch.count else []
        config.layer_types = [*config.layer_types, *own]
    if objective.classes:
        config.id2label = dict(enumerate(objective.classes))
        config.label2id = {name: place for place, name in enumerate(objective.classes)}
    if objective.kind == "number":
        config.num_labels, config.problem_type = 1, "regression"
    kinds: Any = {"next_token": AutoModelForCausalLM, "token": AutoModelForTokenClassification}
    build = kinds.get(objective.kind, AutoModelForSequenceClassification)
    if objective.kind == "next_token":
        config.tie_word_embeddings = trunk.head is None
    plain: PreTrainedModel = build.from_config(config, dtype=trunk.table.dtype).eval()
    base: Any = plain.base_model
    state = trunk.model.state_dict()
    place = "encoder.layer" if trunk.is_encoder else "layers"
    if branch.layers is not None:
        own_name = "layer" if trunk.is_encoder else "layers"
        for name, tensor in branch.layers.state_dict().items():
            if name.startswith(f"{own_name}."):
                number, rest = name.removeprefix(f"{own_name}.").split(".", 1)
                state[f"{place}.{count + int(number)}.{rest}"] = tensor
            else:
                state[name] = tensor  # a decoder's last norm
    missing, unexpected = base.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("pooler" in name or "rotary" in name for name in missing), missing
    if objective.kind == "next_token":
        if trunk.head is not None:
            plain.get_output_embeddings().weight.copy_(trunk.head)
        plain.tie_weights()
        return plain
    assert branch.head is not None
    if objective.kind == "token":
        _copy(plain.classifier, branch.head)  # type: ignore[arg-type]
        return plain
    assert branch.pooler is not None
    bert = trunk.model.config.model_type == "bert"
    _copy(base.pooler.dense if bert else plain.classifier.dense, branch.pooler)  # type: ignore[arg-type, union-attr]
    _copy(plain.classifier if bert else plain.classifier.out_proj, branch.head)  # type: ignore[arg-type, union-attr]
    return plain


def _copy(to: nn.Module, linear: nn.Linear) -> None:
    to.load_state_dict(linear.state_dict())
