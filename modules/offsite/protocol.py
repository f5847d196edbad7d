"""What owner and parties say to each other: the calls, and what each message has to hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .frames import Frame, FrameError, MessageRule, TensorRule
from .prefix import Prefix, PrefixSettings

SERVICE = "fulgurite.Owner"
TOKEN_KEY = "authorization"  # of a call's metadata: "Bearer <token>"


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


def requests(shape: SplitShape) -> Mapping[str, MessageRule]:
    """Return the rule of each call's request; a call and its request have the same name."""
    states = TensorRule((None, None, shape.hidden_size))
    step = {"step": int, "batch": int}
    return {
        "health": MessageRule(),
        "begin": MessageRule(
            {"step": int, "prefix": str, "length": int, "layers": list},
            {
                "prompts": TensorRule((None, None, shape.hidden_size), required=False),
                "key_values": TensorRule((None, 2, None, shape.key_value_size), required=False),
            },
        ),
        "forward": MessageRule(step, {"states": states}),
        "backward": MessageRule(step, {"gradient": states}),
        "collect": MessageRule({"step": int}),
    }


def replies(shape: SplitShape) -> Mapping[str, MessageRule]:
    """Return the rule of each call's reply."""
    states = TensorRule((None, None, shape.hidden_size))
    return {
        "health": MessageRule({"model": str, "cut": int, "layers": int, "hidden_size": int, "key_value_size": int}),
        "begin": MessageRule(),
        "forward": MessageRule({}, {"states": states}),
        "backward": MessageRule({}, {"gradient": states}),
        "collect": MessageRule(
            {},
            {
                "prompts": TensorRule((None, None, shape.hidden_size), required=False),
                "key_values": TensorRule((None, 2, None, shape.key_value_size), required=False),
            },
        ),
    }


def begin_frame(step: int, prefix: Prefix) -> Frame:
    """Return the message that begins an optimizer step with the rows of the owner's layers."""
    settings = prefix.settings
    fields = {"step": step, "prefix": settings.kind, "length": settings.length, "layers": list(settings.layers or ())}
    return Frame("begin", fields, {settings.kind: torch.stack([rows.detach() for rows in prefix.rows])})


def prefix_of(frame: Frame) -> Prefix:
    """Return the rows that a ``begin`` brings.

    Raises:
        FrameError: If its parts contradict each other.
        InputError: If they are no prefix.
    """
    kind, layers = frame.fields["prefix"], frame.fields["layers"]
    if list(frame.tensors) != [kind] or not all(type(layer) is int for layer in layers):
        raise FrameError(f"begin: prefix={kind!r:.40} with layers={layers!r:.80} needs exactly the tensor of that name.")
    rows = frame.tensors[kind]
    return Prefix(PrefixSettings(kind, frame.fields["length"], tuple(layers)), list(rows))


def stacked(kind: str, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Return gradients of rows as the tensors of a message."""
    return {kind: torch.stack(gradients)}


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
