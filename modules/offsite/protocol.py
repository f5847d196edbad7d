"""What owner and parties say to each other: the calls, and what each message has to hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .frames import Frame, FrameError, MessageRule, TensorRule
from .owner import HeadRequest
from .prefix import Prefix, PrefixSettings

SERVICE = "fulgurite.Owner"
TOKEN_KEY = "authorization"  # of a call's metadata: "Bearer <token>"
OUTPUTS = {3: "states", 2: "logits", 1: "losses"}  # name of what the owner computes, by its dimensions
PIECE_BYTES = 1 << 20  # of a file in one message


@dataclass(frozen=True)
class SplitShape:
    """Sizes that both sides of a split know.

    Args:
        hidden_size: Of the states that cross the cut.
        key_value_size: Of a layer's keys, key/value heads times head size.
        layers: The owner's layers.
    """

    hidden_size: int
    key_value_size: int
    layers: int


def _rows(shape: SplitShape) -> dict[str, TensorRule]:
    return {
        "prompts": TensorRule((None, None, shape.hidden_size), required=False),
        "key_values": TensorRule((None, 2, None, shape.key_value_size), required=False),
    }


def _outputs(shape: SplitShape) -> dict[str, TensorRule]:
    return {
        "states": TensorRule((None, None, shape.hidden_size), required=False),
        "logits": TensorRule((None, None), required=False),
        "losses": TensorRule((None,), required=False),
    }


def requests(shape: SplitShape) -> Mapping[str, MessageRule]:
    """Return the rule of each call's request; a call and its request have the same name."""
    states, ids = TensorRule((None, None, shape.hidden_size)), TensorRule((None,), (torch.int64,), required=False)
    prefix = {"length": int, "prefix": str, "layers": list}
    head = {"positions": TensorRule((None, 2), (torch.int64,), required=False), "candidates": ids, "labels": ids}
    return {
        "health": MessageRule(),
        "manifest": MessageRule(),
        "read": MessageRule({"file": str, "offset": int}),
        "begin": MessageRule({"step": int, **prefix}, _rows(shape)),
        "forward": MessageRule({"step": int, "batch": int, "train": bool}, {"states": states, **head}),
        "backward": MessageRule({"step": int, "batch": int, "wanted": bool}, _outputs(shape)),
        "collect": MessageRule({"step": int}),
        "open": MessageRule({"text": int, **prefix}, _rows(shape)),
        "extend": MessageRule({"text": int, "place": int, "top": int}, {"states": states}),
    }


def replies(shape: SplitShape) -> Mapping[str, MessageRule]:
    """Return the rule of each call's reply."""
    ids, logits = TensorRule((None,), (torch.int64,), required=False), TensorRule((None,), required=False)
    sizes = {"hidden_size": int, "key_value_size": int}
    return {
        "health": MessageRule({"model": str, "cut": int, "layers": int, **sizes}),
        "manifest": MessageRule({"files": dict}),
        "read": MessageRule({}, {"data": TensorRule((None,), (torch.uint8,))}),
        "begin": MessageRule(),
        "forward": MessageRule({}, _outputs(shape)),
        "backward": MessageRule({}, {"states": _outputs(shape)["states"]}),
        "collect": MessageRule({}, _rows(shape)),
        "open": MessageRule(),
        "extend": MessageRule({}, {"states": _outputs(shape)["states"], "ids": ids, "logits": logits}),
    }


def with_prefix(kind: str, fields: dict[str, int], length: int, prefix: Prefix | None) -> Frame:
    """Return a message that begins a step or a text with the rows of the owner's layers."""
    settings = None if prefix is None else prefix.settings
    told = {
        "length": length,
        "prefix": settings.kind if settings else "",
        "layers": list(settings.layers or ()) if settings else [],
    }
    tensors: dict[str, Tensor] = (
        {} if prefix is None else {prefix.settings.kind: torch.stack([rows.detach() for rows in prefix.rows])}
    )
    return Frame(kind, {**fields, **told}, tensors)


def prefix_of(frame: Frame) -> Prefix | None:
    """Return the rows that a message brings, None where it has none.

    Raises:
        FrameError: If its parts contradict each other.
        InputError: If they are no prefix.
    """
    kind, layers, length = frame.fields["prefix"], frame.fields["layers"], frame.fields["length"]
    if length < 0 or list(frame.tensors) != ([kind] if kind else []) or not all(type(layer) is int for layer in layers):
        raise FrameError(
            f"{frame.kind}: length={length}, prefix={kind!r:.40} with layers={layers!r:.80} needs just the tensor of that name."
        )
    if not kind:
        return None
    return Prefix(PrefixSettings(kind, length, tuple(layers)), list(frame.tensors[kind]))


def head_fields(head: HeadRequest | None) -> dict[str, Tensor]:
    """Return what is asked of the owner's head as the tensors of a message."""
    if head is None:
        return {}
    asked = {"positions": head.positions, "candidates": head.candidates, "labels": head.labels}
    return {name: tensor for name, tensor in asked.items() if tensor is not None}


def head_of(frame: Frame) -> HeadRequest | None:
    """Return what a ``forward`` asks of the owner's head, None where it wants states.

    Raises:
        FrameError: If it names candidates or labels without positions.
    """
    found = {name: frame.tensors.get(name) for name in ("positions", "candidates", "labels")}
    if found["positions"] is None:
        if any(tensor is not None for tensor in found.values()):
            raise FrameError(
                "forward: candidates or labels without positions. Legal: all states, or positions to ask the head for."
            )
        return None
    return HeadRequest(**found)  # type: ignore[arg-type]


def output_of(frame: Frame) -> Tensor:
    """Return the one tensor of a message that holds what the owner computed, or the gradient of it.

    Raises:
        FrameError: If there are more or fewer.
    """
    if len(frame.tensors) != 1:
        raise FrameError(f"{frame.kind} needs exactly one tensor: {', '.join(OUTPUTS.values())}.")
    return next(iter(frame.tensors.values()))


def load_grpc() -> Any:
    """Return the module ``grpc``.

    Raises:
        InputError: If its extra is not installed.
    """
    try:
        import grpc
    except ImportError as error:
        raise InputError("The owner's service needs the extra offsite: pip install 'fulgurite[offsite]'.") from error
    return grpc
