"""``fulgurite owner``: the owner's service, its certificates, a party's download of the emulator, and a trial of everything."""

import json
import logging
import re
import signal
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.progress import Progress

from ...errors import InputError
from ...files import write_json
from ...modules.offsite import ModelPart, OwnerAccess
from ...modules.offsite.certificates import make_certificates
from ...modules.offsite.emulator import EmulatorFiles, download
from ...modules.offsite.owner import OwnerLayers
from ...modules.offsite.server import OwnerServer
from ...modules.offsite.texts import OwnerTexts
from ...modules.precision import FrozenDtype, frozen_dtype
from ...modules.pretrained import load_config, load_model, model_fingerprint
from ...modules.span_attention import refuse_plan
from ..parsing import Parser
from .demo import demo
from .federation.trial import federate

log = logging.getLogger(__name__)


def certificates(folder: str, parties: list[str], hosts: list[str] = [], *, days: float = 30) -> None:  # noqa: B006  (read only)
    """Make a certificate for the owner and a token for each party, for a trial; without hosts, add parties to those in a folder.

    Args:
        folder: Where ``owner.crt`` (for everyone), ``owner.key`` and ``tokens.json`` (for the owner), and a ``.token`` file for
            each party are written.
        parties: Names of the parties, ``[north,south]``.
        hosts: Names or addresses at which parties reach the owner, ``[owner.example.org,10.0.0.7]``.
        days: For which the certificate is good.
    """
    make_certificates(Path(folder), hosts=hosts, parties=parties, days=days)
    print(f"{folder}: keep owner.key and tokens.json; give each party owner.crt and its .token file")
    if not hosts:
        print("Start the owner again, so that it reads the tokens of the new parties.")


def serve(
    model: str,
    *,
    certificate: str,
    key: str,
    tokens: str,
    emulator: str | None = None,
    cut: int | None = None,
    address: str = "localhost:7421",
    weights: FrozenDtype = "auto",
    device: str = "cpu",
    lifetime: float = 600.0,
    most_message_bytes: int = 1 << 26,
    most_batch_tokens: int = 1 << 14,
    most_step_tokens: int = 1 << 17,
    most_tokens: int = 8192,
    most_wait: float = 60.0,
    announce: str | None = None,
) -> None:
    """Serve the layers of a model behind a cut to parties that tune a prefix or write text, until stopped.

    Args:
        model: The whole model; see ``model.source`` of ``fit``.
        certificate: PEM file of the service's certificate.
        key: PEM file of its private key.
        tokens: JSON file with each party's token by name.
        emulator: Folder of ``EmulatorDistillation`` that parties may download.
        cut: First layer that stays here; all that an emulator has as they are are the party's where it is not given.
        address: To listen at; port 0 takes a free one.
        weights: Type of the weights, and of the numbers that are computed.
        device: Where the layers are computed, such as ``cuda``.
        lifetime: Seconds of silence after which what a party sent is forgotten; it then sends it again by itself.
        most_message_bytes: Of a message from a party.
        most_batch_tokens: Of a batch, virtual positions too.
        most_step_tokens: Of all batches of a party's optimizer step.
        most_tokens: Of a text that is written.
        most_wait: Seconds that a message may take to arrive.
        announce: JSON file to write the address into once the service answers.
    """
    config = load_config(model)
    refuse_plan(config)
    layers = config.get_text_config().num_hidden_layers
    offered = None if emulator is None else EmulatorFiles(Path(emulator))
    if cut is None:
        if offered is None:
            raise InputError("cut: give the first layer that stays here, or an emulator, which says so.")
        cut = offered.manifest.identical
    most = layers - 1 if offered is None else offered.manifest.identical
    if not 1 <= cut <= most:
        raise InputError(
            f"cut={cut}: legal are 1 to {most}, {'the emulator' if offered else 'the model'} has no other layers for that."
        )
    known = _tokens(tokens)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA fails by an assertion
        raise InputError(f"device={device!r} is not here ({error}). Legal: cpu, or a GPU of this machine.") from error
    whole = load_model(model, frozen_dtype(weights, torch.device(device).type))
    fingerprint = model_fingerprint(whole)
    if offered is not None and offered.manifest.model != fingerprint:
        raise InputError(f"emulator={emulator!r} was made of another model than model={model!r}.")
    owned = OwnerLayers(
        ModelPart(whole, cut, layers).to(device),
        lifetime=lifetime,
        most_sessions=len(known) or 1,
        most_batch_tokens=most_batch_tokens,
        most_step_tokens=most_step_tokens,
    )
    server = OwnerServer(
        owned,
        model=fingerprint,
        emulator=offered,
        texts=OwnerTexts(owned, most_tokens=most_tokens),
        tokens=known,
        certificate=Path(certificate),
        key=Path(key),
        address=address,
        most_message_bytes=most_message_bytes,
        most_wait=most_wait,
    ).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    host = address.rpartition(":")[0]
    print(f"Layers {cut} to {layers - 1} of {model} for {', '.join(known)} at {host}:{server.port}", flush=True)
    if announce is not None:
        write_json(Path(announce), {"address": f"{host}:{server.port}"})
    server.wait()


def _tokens(file: str) -> dict[str, str]:
    try:
        found = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"tokens={file!r} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(token, str) for token in found.values()):
        raise InputError(f"tokens={file!r}: legal is an object with each party's token by name.")
    return found


def fetch(folder: str, address: str, token: str, certificate: str) -> None:
    """Download an owner's emulator; a download that was stopped goes on.

    Args:
        folder: To write to; it appears when all is there and whole.
        address: Of the owner, ``host:port``.
        token: File with the party's token.
        certificate: PEM file of the certificate that the owner's is checked against.
    """
    client = OwnerAccess(address, token, certificate).client()
    with Progress() as progress:
        bar = progress.add_task("Fetching the emulator", total=None)
        download(client, Path(folder), progress=lambda done, whole: progress.update(bar, completed=done, total=whole))
    print(f"{folder}: the emulator of {address}")


_COMMANDS: dict[str, Any] = {"serve": serve, "certificates": certificates, "fetch": fetch, "demo": demo, "federate": federate}


def main(arguments: list[str]) -> None:
    """Run a command with the words of a command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fulgurite").setLevel(logging.INFO)
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    auto_cli(_COMMANDS, args=words, prog="fulgurite owner", as_positional=False, parser_class=Parser)
