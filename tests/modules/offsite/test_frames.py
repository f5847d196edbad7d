"""Messages come back as they were sent, and what is no message is refused by name."""

import json
import random

import pytest
import torch
from safetensors.torch import save

from fulgurite.modules.offsite.frames import VERSION, Frame, FrameError, MessageRule, TensorRule, decode

RULES = {
    "forward": MessageRule(
        {"step": str, "lengths": list, "note": (str, type(None))},
        {
            "states": TensorRule((None, None, 4)),
            "rows": TensorRule((2, 4), required=False),
            "places": TensorRule((None,), (torch.int64,), required=False),
        },
    ),
    "health": MessageRule(),
}
GOOD = Frame("forward", {"step": "a-1", "lengths": [3, 2]}, {"states": torch.arange(24.0).view(2, 3, 4)})


def raw(header, tensors=None):
    return save(tensors or {}, metadata={"fulgurite": json.dumps(header)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_message_comes_back_as_it_was_sent(dtype):
    tensors = {"states": GOOD.tensors["states"].to(dtype), "places": torch.tensor([1, 2])}
    found = decode(Frame("forward", GOOD.fields, tensors).encode(), RULES)
    assert (found.kind, found.fields) == ("forward", GOOD.fields)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert decode(Frame("health").encode(), RULES) == Frame("health")


def changed(fields=None, **tensors):
    return Frame("forward", {**GOOD.fields, **(fields or {})}, {**GOOD.tensors, **tensors}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with the length"),
        (b"\xff" * 64, "does not begin with the length"),
        ((10**9).to_bytes(8, "little") + b"{}" * 50, "does not begin with the length"),
        ((4).to_bytes(8, "little") + b"abcd", "no JSON of this protocol"),
        (save({"states": torch.zeros(1)}), "no JSON of this protocol"),
        (raw(["version"]), "no JSON of this protocol"),
        (raw({"version": VERSION + 1, "kind": "health", "fields": {}}), "is of protocol version 2; this side speaks 1"),
        (raw({"version": VERSION, "kind": 3, "fields": {}}), "its kind or its fields are none"),
        (raw({"version": VERSION, "kind": "steal", "fields": {}}), "kind 'steal' is not expected here. Legal: forward, health"),
        (GOOD.encode()[:-3], "A frame is damaged"),
        (GOOD.encode() + b"more", "A frame is damaged"),
        (changed({"step": 3}), "field step=3 is no str"),
        (changed({"lengths": True}), "field lengths=True is no list"),
        (changed({"other": 1}), "has a field 'other'. Legal: step, lengths, note"),
        (Frame("forward", {"step": "a"}, GOOD.tensors).encode(), "field lengths=None is no list"),
        (Frame("forward", GOOD.fields).encode(), "lacks the tensor states"),
        (changed(weights=torch.zeros(1)), "has a tensor 'weights'. Legal: states, rows, places"),
        (changed(states=torch.zeros(2, 3, 5)), r"states has the shape \[2, 3, 5\]. Legal: \[any, any, 4\]"),
        (changed(states=torch.zeros(2, 0, 4)), r"states has the shape \[2, 0, 4\]"),
        (changed(rows=torch.zeros(2)), r"rows has the shape \[2\]. Legal: \[2, 4\]"),
        (changed(states=torch.zeros(2, 3, 4, dtype=torch.float64)), "is of type float64. Legal: float32, bfloat16, float16"),
        (changed(places=torch.zeros(2)), "is of type float32. Legal: int64"),
        (changed(states=torch.full((2, 3, 4), float("nan"))), "states holds numbers that are not finite"),
        (changed(rows=torch.full((2, 4), float("inf"))), "rows holds numbers that are not finite"),
    ],
)
def test_what_is_no_message_is_refused_by_name(data, message):
    with pytest.raises(FrameError, match=message):
        decode(data, RULES)


def test_random_and_damaged_frames_are_refused_or_messages():
    generator = random.Random(0)
    good = GOOD.encode()
    refused = 0
    for number in range(10_000):
        if number % 3 == 0:
            data = generator.randbytes(generator.randrange(200))
        elif number % 3 == 1:
            data = bytearray(good)
            for _ in range(generator.randrange(1, 6)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            data = bytes(data)
        else:
            data = good[: generator.randrange(len(good))]
        try:
            found = decode(data, RULES)
        except FrameError:
            refused += 1
        else:  # a number in a tensor or a letter in a field has changed
            assert found.kind == "forward"
            assert found.tensors["states"].shape == (2, 3, 4)
    assert refused > 8000
