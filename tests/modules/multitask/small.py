"""Small trunks of every kind, and views for them."""

import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from fulgurite.modules.multitask import Objective, TransformerBranch, Trunk

from ..span_attention.small import KINDS, SIZES

DECODERS = list(KINDS)
ENCODERS = ["bert", "roberta"]
OBJECTIVES = {
    "next": Objective("next_token"),
    "masked": Objective("masked_token"),
    "text": Objective("sequence", ("a", "b", "c")),
    "tags": Objective("token", ("x", "y")),
    "number": Objective("number"),
}


def base_of(kind, **changes):
    torch.manual_seed(0)
    if kind in KINDS:
        build, config, extra = KINDS[kind]
        return build(config(**{**SIZES, **extra, "initializer_range": 0.2, **changes})).base_model
    build, config = {"bert": (BertModel, BertConfig), "roberta": (RobertaModel, RobertaConfig)}[kind]
    sizes = {
        "vocab_size": SIZES["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 70,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return build(config(**{**sizes, **changes}), add_pooling_layer=False)


def view_of(mask, rows=3, length=12, padded=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, *torch.randint(4, length, (rows - 1,), generator=generator).tolist()])
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    real = torch.arange(length) < lengths[:, None]
    view = {
        "mask": mask,
        "input_ids": torch.where(real, ids, 1),
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        "token_type_ids": torch.zeros(rows, length, dtype=torch.long),
        "lengths": lengths,
    }
    if not padded:
        view["input_ids"] = ids
        del view["lengths"]
    return view


def targets_of(objective, view, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows, length = view["input_ids"].shape
    if objective.kind == "sequence":
        return torch.randint(len(objective.classes), (rows,), generator=generator)
    if objective.kind == "number":
        return torch.rand(rows, generator=generator)
    real = torch.arange(length) < view["lengths"][:, None]
    if objective.kind == "token":
        return torch.where(real, torch.randint(len(objective.classes), (rows, length), generator=generator), -100)
    if objective.kind == "next_token":
        return torch.where(real, view["input_ids"], -100)
    here = real & (torch.rand(rows, length, generator=generator) < 0.4)
    return torch.where(here, torch.randint(5, 60, (rows, length), generator=generator), -100)


def branch_of(trunk, objective, layers=1, noise=True, **settings):
    """A branch whose layers change something, unlike fresh ones."""
    branch = TransformerBranch(layers, dropout=0.0, **settings)
    branch.attach(trunk, objective)
    if noise:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return branch


def trunk_of(kind, **changes):
    return Trunk(base_of(kind, **changes)).eval()
