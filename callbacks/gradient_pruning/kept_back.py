"""What ranks have not sent when a checkpoint is saved, in files beside it."""

from pathlib import Path
from typing import Any

from ...errors import InputError
from .hook import GradientExchange

_KEY = "gradient_pruning_kept_back"  # where a checkpoint says which folders there are, its own last


class KeptBackFiles:
    """The files of one rank: those of the last two checkpoints, the one that a run goes on from among them.

    Args:
        run: Name of the run, the same on all ranks: several may share a folder.
    """

    def __init__(self, run: str = "") -> None:
        self.run = run
        self._folders: list[Path] = []

    def save(self, exchange: GradientExchange, root: Path, step: int, checkpoint: dict[str, Any]) -> None:
        """Write the file of a checkpoint, and tell the checkpoint of it; then remove the one that is too old.

        Args:
            exchange: Keeps back what is written.
            root: The run's folder.
            step: Of the checkpoint.
            checkpoint: What is being saved.
        """
        folder = root.absolute() / "kept-back" / f"{step}-{self.run}"
        exchange.save(_file(folder, exchange.rank))
        self._folders = [*(one for one in self._folders if one != folder), folder]
        checkpoint[_KEY] = [str(one) for one in self._folders[-2:]]
        while len(self._folders) > 2:
            _file(self._folders.pop(0), exchange.rank).unlink(missing_ok=True)

    def find(self, checkpoint: dict[str, Any], rank: int) -> Path:
        """Return the file of a checkpoint that a run goes on from.

        Raises:
            InputError: If it is gone.
        """
        self._folders = [Path(one) for one in checkpoint[_KEY]]
        file = _file(self._folders[-1], rank)
        if not file.is_file():
            raise InputError(
                f"{file} is missing: what rank {rank} had not sent when the checkpoint was saved. Those of the last two "
                "checkpoints are kept, each on the machine of its rank. Copy it there, take a newer checkpoint, or set "
                "at_checkpoint=drop to do without."
            )
        return file

    @staticmethod
    def has(checkpoint: dict[str, Any]) -> bool:
        """Return whether ranks kept something back when a checkpoint was saved."""
        return _KEY in checkpoint


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.safetensors"
