"""Types of numbers, and which of them a device computes in at speed.

A processor with instructions for bfloat16 is about twice as fast in it as in float32. One without them takes such numbers,
too, but at a tenth of float32's speed or less. So what is not trained has ``auto`` by default, and so has the configs' precision.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16", "float16"]
FrozenDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of weights that are not trained; ``auto`` is ``bfloat16`` where it is fast, ``float32`` elsewhere."""


def compute_device() -> str:
    """Return ``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


_meant: list[str] = []


@contextmanager
def meant_for(device: str) -> Iterator[None]:
    """Let ``auto`` mean, within the block, what it does on a machine with such a device: for estimates made on another one.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    _meant.append(device)
    try:
        yield
    finally:
        _meant.pop()


def fast_in_bfloat16(device: str | None = None) -> bool:
    """Return whether a device multiplies matrices of bfloat16 faster than those of float32.

    Args:
        device: ``cpu`` or ``cuda``; None takes ``compute_device``. A GPU that is not here is taken for one of today.
    """
    if (device or (_meant or [compute_device()])[-1]) == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    # PyTorch has no such kernels for Apple's processors.
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or (able.get("bf16") and sys.platform != "darwin"))


def frozen_dtype(dtype: FrozenDtype, device: str | None = None) -> Dtype:
    """Return the type in memory of weights that are not trained.

    Args:
        dtype: What a setting says.
        device: ``cpu`` or ``cuda``; None takes ``compute_device``.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if fast_in_bfloat16(device) else "float32"
