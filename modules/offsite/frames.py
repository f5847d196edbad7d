"""Messages between owner and parties: safetensors with a JSON header, checked before anything is believed.

A frame is the bytes of a safetensors file. Its metadata has one entry, ``fulgurite``: JSON with the ``version`` of the protocol,
the ``kind`` of the message and its ``fields``. Nothing in it is ever executed or unpickled.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...errors import InputError

VERSION = 1
_KEY = "fulgurite"
_HEADER_BYTES = 1 << 16  # of a frame's JSON, tensors' names and shapes included
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class FrameError(InputError):
    """A message that is none: it says what is wrong with it."""


@dataclass(frozen=True)
class TensorRule:
    """What a tensor of a message has to be.

    Args:
        shape: Its sizes; None stands for any from 1 on.
        dtypes: Its types; the first is what it is read as by people.
        required: Whether it has to be there.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    required: bool = True

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise a FrameError for a tensor of another type or shape than [*shape], or with numbers that are not finite."""
        if tensor.dtype not in self.dtypes:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise FrameError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}. Legal: {legal}.")
        fits = len(tensor.shape) == len(self.shape) and all(
            size >= 1 if wanted is None else size == wanted for size, wanted in zip(tensor.shape, self.shape)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise FrameError(f"{name} has the shape [{', '.join(map(str, tensor.shape))}]. Legal: [{wanted}].")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FrameError(f"{name} holds numbers that are not finite.")


@dataclass(frozen=True)
class MessageRule:
    """What a message of a kind has to hold.

    Args:
        fields: Type of each field; a field whose type is given as a tuple with ``NoneType`` may be missing.
        tensors: Rule of each tensor.
    """

    fields: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)
    tensors: Mapping[str, TensorRule] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """A message.

    Args:
        kind: What it is.
        fields: Plain JSON by name.
        tensors: By name.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the frame's bytes."""
        header = json.dumps({"version": VERSION, "kind": self.kind, "fields": dict(self.fields)})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return save(tensors, metadata={_KEY: header})


def decode(data: bytes, rules: Mapping[str, MessageRule]) -> Frame:
    """Read a frame of one of some kinds.

    Args:
        data: Its bytes.
        rules: Rule of each kind that may come.

    Raises:
        FrameError: If it is damaged, of another version or kind, or breaks its rule; the message says how.
    """
    kind, fields = _header(data)
    if kind not in rules:
        raise FrameError(f"A message of kind {kind!r:.40} is not expected here. Legal: {', '.join(rules)}.")
    rule = rules[kind]
    for name in fields:
        if name not in rule.fields:
            raise FrameError(f"{kind} has a field {name!r:.40}. Legal: {', '.join(rule.fields) or 'none'}.")
    for name, types in rule.fields.items():
        value = fields.get(name)
        legal = types if isinstance(types, tuple) else (types,)
        if type(value) not in legal:  # a bool is no int here
            raise FrameError(f"{kind}: field {name}={value!r:.40} is no {' or '.join(one.__name__ for one in legal)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise FrameError(f"{kind}: field {name}={value} is not finite.")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise FrameError(f"A frame is damaged: {error!s:.200}") from error
    for name in tensors:
        if name not in rule.tensors:
            raise FrameError(f"{kind} has a tensor {name!r:.40}. Legal: {', '.join(rule.tensors) or 'none'}.")
    for name, wanted in rule.tensors.items():
        if name in tensors:
            wanted.check(f"{kind}: {name}", tensors[name])
        elif wanted.required:
            raise FrameError(f"{kind} lacks the tensor {name}.")
    return Frame(kind, fields, tensors)


def _header(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return a frame's kind and fields, without touching its tensors."""
    if len(data) < 8 or not 2 <= int.from_bytes(data[:8], "little") <= min(_HEADER_BYTES, len(data) - 8):
        raise FrameError("A frame is damaged: it does not begin with the length of its header.")
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8"))
        told = json.loads(header["__metadata__"][_KEY])
        version, kind, fields = told["version"], told["kind"], told["fields"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError("A frame is damaged: its header is no JSON of this protocol.") from error
    if version != VERSION:
        raise FrameError(f"A frame is of protocol version {version!r:.40}; this side speaks {VERSION}.")
    if not isinstance(kind, str) or not isinstance(fields, dict):
        raise FrameError("A frame is damaged: its kind or its fields are none.")
    return kind, fields
