"""``fulgurite labels``: statistics and verification of a soft-label store."""

import json

from jsonargparse import auto_cli
from rich.progress import track

from ..datamodules.soft_labels import SoftLabelStore


def stats(store: str) -> None:
    """Print what a store holds, as JSON: teacher, settings, counts, bytes a token, mass kept.

    Args:
        store: Folder of the store.
    """
    print(json.dumps(SoftLabelStore(store).stats(), indent=2))


def verify(store: str) -> None:
    """Read every block of a store and check it; the exit status is 2 at the first one that is damaged.

    Args:
        store: Folder of the store.
    """
    opened = SoftLabelStore(store)
    checked = sum(1 for _ in track(opened.verify(), total=len(opened), description="Verifying"))
    print(f"{store}: {checked} sequences, all whole")


def main(arguments: list[str]) -> None:
    """Run a command with the words of a command line."""
    auto_cli({"stats": stats, "verify": verify}, args=arguments, prog="fulgurite labels", as_positional=True)
