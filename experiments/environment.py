"""What a result was made with: versions, commit, machine, seeds, data."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__

_PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "torchmetrics",
    "jsonargparse",
    "numpy",
    "safetensors",
    "zstandard",
)
# A document or a result that changes is another matter.
_CODE = (":(glob)*.py", "modules", "datamodules", "callbacks", "experiments", ":!experiments/*/results/*")


def environment(
    *, seed: int | None = None, data: dict[str, str] | None = None, command: list[str] | None = None
) -> dict[str, Any]:
    """Return the record that stands beside every run and in every result.

    Args:
        seed: Seed of the run.
        data: Hashes of its data.
        command: Words of the command line.
    """
    return {
        "fulgurite": __version__,
        **_commit(),
        "command": command,
        "seed": seed,
        "data": data or {},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return {"commit": None, "clean": None}

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "clean": not git("status", "--porcelain", "--", *_CODE),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
