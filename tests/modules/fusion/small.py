"""Small random models of every architecture that can be fused, with gains and biases that are not 1 and 0."""

import torch

from fulgurite.modules.fusion.statistics import rows_of

from ..span_attention.small import KINDS, SIZES, ids_of

LAYERS = 5
_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def model_of(kind, **changes):
    torch.manual_seed(0)
    build, config, extra = KINDS[kind]
    extra = {**extra, "layer_types": _TYPES} if "layer_types" in extra else extra
    model = build(config(**{**SIZES, **extra, "num_hidden_layers": LAYERS, "initializer_range": 0.1, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif "bias" in name:
                parameter.normal_()
    return model


def batch_of(rows=12, length=32):
    ids = ids_of(rows, length)
    positions = torch.arange(length).expand(rows, -1).clone()
    positions[:, length // 2 :] -= length // 2  # two documents
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def text(rows=12, length=32):
    return rows_of(batch_of(rows, length))


def logits(model, batch=None):
    batch = batch or batch_of(2)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
