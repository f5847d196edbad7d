"""Emulators: a smaller stand-in for the owner's model, on which a party tunes before it ever calls the owner."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...files import publish_folder, write_json
from ..student import block_influence, decoder_layers
from .client import OwnerClient
from .prefix import StandsFor
from .protocol import PIECE_BYTES

MANIFEST = "emulator.json"
_VERSION = 1


@dataclass
class EmulatorSpec:
    """Which of the owner's layers an emulator keeps.

    Args:
        layers: How many, or the indices of all that are kept.
        identical: The first so many layers are kept, and stay as they are in the owner's model to the bit, with the embedding and
            the head: what a party may run itself in a split.
        by: Which of the others are kept: ``even`` spreads them over the depth, the last one included; ``block_influence`` drops
            those that change their input least (ShortGPT, arXiv 2403.03853), measured on the first tokens of the training data.
        fused: Folder that ``FusionCompression`` exported with ``shape.kept_layers``: its layers instead of ones that are kept.
        calibration_tokens: Tokens on which block influence is measured.
    """

    layers: int | list[int] = 16
    identical: int = 4
    by: Literal["even", "block_influence"] = "block_influence"
    fused: str | None = None
    calibration_tokens: int = 4096

    def check(self, layers: int) -> None:
        """Raise an InputError for an emulator that cannot be made of a model with so many layers."""
        if self.by not in get_args(EmulatorSpec.__annotations__["by"]):
            raise InputError(f"emulator.by={self.by!r} is unknown. Legal: even, block_influence.")
        count = self.layers if isinstance(self.layers, int) else len(self.layers)
        if isinstance(self.layers, list) and (
            sorted(set(self.layers)) != self.layers or any(not 0 <= layer < layers for layer in self.layers)
        ):
            raise InputError(f"emulator.layers={self.layers}: legal are rising indices from 0 to {layers - 1}, each once.")
        if self.fused is None and not 2 <= count < layers:
            raise InputError(f"emulator.layers={self.layers}: legal are 2 to {layers - 1} layers of the model's {layers}.")
        if self.fused is None and not 1 <= self.identical < count:
            raise InputError(
                f"emulator.identical={self.identical}: legal are 1 to {count - 1}: a layer for the party, and one left to "
                "be distilled."
            )
        if isinstance(self.layers, list) and self.layers[: self.identical] != list(range(self.identical)):
            raise InputError(
                f"emulator.layers={self.layers} leaves out one of the first {self.identical}, which a party needs as they are "
                "(emulator.identical)."
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether ``choose`` needs tokens."""
        return self.fused is None and isinstance(self.layers, int) and self.by == "block_influence"

    def choose(self, model: PreTrainedModel, calibration: dict[str, Tensor] | None) -> list[int]:
        """Return the indices of the layers that are kept.

        Args:
            model: The owner's.
            calibration: Batch for ``block_influence``, of ``input_ids`` [batch, length].

        Raises:
            InputError: If it cannot be made, or there are no calibration tokens.
        """
        layers = len(decoder_layers(model))
        self.check(layers)
        if isinstance(self.layers, list):
            return self.layers
        first, rest = list(range(self.identical)), self.layers - self.identical
        if self.by == "even":
            step = (layers - self.identical) / rest
            return first + [int(self.identical + step * (place + 1) + 0.5) - 1 for place in range(rest)]
        if calibration is None:
            raise InputError(
                "emulator.by='block_influence' needs tokens of the training data: fit with a datamodule of this suite, or give "
                "by='even' or a list of layers."
            )
        influence = block_influence(model, calibration)
        order = influence.argsort(descending=True, stable=True).tolist()
        return first + sorted([layer for layer in order if layer >= self.identical][:rest])


def fused_layers(folder: str) -> list[int]:
    """Return for each layer of a fused model the large model's layer that has the greatest share in it.

    Raises:
        InputError: If the folder does not say so.
    """
    try:
        depth = json.loads((Path(folder) / "fusion.json").read_text("utf-8"))["depth"]
        found = [max(range(len(row)), key=lambda layer: abs(row[layer])) for row in depth]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"emulator.fused={folder!r} has no fusion.json with coefficients in depth: fit FusionCompression with fewer layers, "
            "and shape.kept_layers."
        ) from error
    if sorted(set(found)) != found:
        raise InputError(f"emulator.fused={folder!r}: its layers stand for {found}, which is no rising order.")
    return found


@dataclass(frozen=True)
class EmulatorManifest:
    """What an emulator stands for.

    Args:
        model: Fingerprint of the owner's model.
        layers: Of the owner's model.
        stands_for: For each of the emulator's layers, that of the owner's model which it is, or is made of most.
        identical: Number of first layers that are the owner's to the bit.
        title: Name of the owner's model.
        licence: Of the owner's model, if known.
        files: SHA-256 of each file beside the manifest.
    """

    model: str
    layers: int
    stands_for: tuple[int, ...]
    identical: int
    title: str
    licence: str | None
    files: dict[str, str]

    @property
    def whole(self) -> StandsFor:
        """What a prefix of the emulator needs to be carried over."""
        return StandsFor(self.model, self.layers, self.stands_for)

    def save(self, folder: Path) -> None:
        """Write it into an emulator's folder."""
        write_json(Path(folder) / MANIFEST, {"format": "fulgurite-emulator", "version": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "EmulatorManifest":
        """Read the manifest of a folder, and check the folder's files by it.

        Raises:
            InputError: If there is none, it is of another version, or a file is missing or not the manifest's.
        """
        folder = Path(folder)
        try:
            told = json.loads((folder / MANIFEST).read_text("utf-8"))
            if told.pop("format") != "fulgurite-emulator" or told.pop("version") != _VERSION:
                raise InputError(f"{folder / MANIFEST} is of another version than {_VERSION}. Ask for a new emulator.")
            found = cls(**{**told, "stands_for": tuple(told["stands_for"])})
            for name, digest in found.files.items():
                if digest_of(folder / name) != digest:
                    raise InputError(f"{folder / name} is not the emulator's: its hash is another. Fetch the emulator again.")
        except FileNotFoundError as error:
            raise InputError(
                f"{str(folder)!r} is no emulator: it has no {Path(error.filename).name}. Give one that the owner made with "
                "EmulatorDistillation."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / MANIFEST} is damaged: {error}.") from error
        return found


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class EmulatorFiles:
    """An emulator's folder, offered for download.

    Args:
        folder: It has a manifest.

    Raises:
        InputError: If it is no whole emulator.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = EmulatorManifest.load(self.folder)
        names = [*self.manifest.files, MANIFEST]
        self.files = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": digest_of(self.folder / name)} for name in names
        }

    def piece(self, file: str, offset: int) -> Tensor:
        """Return the bytes of a file from a place on, a piece at most, uint8.

        Raises:
            InputError: If the emulator has no such file, or the file no such place.
        """
        if file not in self.files or not 0 <= offset < self.files[file]["bytes"]:  # type: ignore[operator]
            raise InputError(f"file={file!r:.80}, offset={offset} is no place in the emulator. Legal: {', '.join(self.files)}.")
        with open(self.folder / file, "rb") as opened:
            opened.seek(offset)
            return torch.frombuffer(bytearray(opened.read(PIECE_BYTES)), dtype=torch.uint8)


def download(client: OwnerClient, folder: Path, *, progress: Callable[[int, int], None] = lambda done, whole: None) -> None:
    """Fetch an owner's emulator; what a stopped download left is gone on with.

    Args:
        client: Of the owner.
        folder: To write to; it appears when all files are there and whole.
        progress: Called with the bytes that are there and that there will be.

    Raises:
        InputError: If the folder is there already, the owner offers none, or a file does not come out as the owner says.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{str(folder)!r} is there already. Give another folder, or delete it.")
    files = client.manifest()
    if not files or any(Path(name).name != name or name in (".", "..") for name in files):
        raise InputError("The owner's list of files is none: names with folders are not taken.")
    parts = folder.with_name(f".{folder.name}.part")
    parts.mkdir(parents=True, exist_ok=True)
    whole = sum(int(file["bytes"]) for file in files.values())
    done = 0
    for name, told in files.items():
        part = parts / name
        size = part.stat().st_size if part.exists() else 0
        if size > told["bytes"]:
            size = 0
        with open(part, "ab") as opened:
            opened.truncate(size)
            while size < told["bytes"]:
                data = client.read(name, size)
                opened.write(data)
                size += len(data)
                progress(done + size, whole)
        done += size
        if digest_of(part) != told["sha256"]:
            part.unlink()
            raise InputError(
                f"{name} did not arrive as the owner says (another hash): it was deleted. Call again to fetch it anew."
            )
    for path in parts.iterdir():
        if path.name not in files:  # of a download before, from an owner that had other files
            path.unlink()
    publish_folder(parts, folder)
    EmulatorManifest.load(folder)
