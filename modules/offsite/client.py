"""A party's side of the owner's service: calls that are asked again until they are answered."""

import logging
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError
from .frames import Frame, FrameError, decode
from .owner import HeadRequest, UnknownStep
from .prefix import Prefix
from .protocol import OUTPUTS, SERVICE, TOKEN_KEY, SplitShape, head_fields, load_grpc, output_of, replies, with_prefix

log = logging.getLogger(__name__)
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds before a call is asked again; the last one goes on

_SAY_AGAIN = 15.0  # seconds between two lines about an owner that does not answer
_DISTRUST = re.compile("CERTIFICATE_VERIFY_FAILED|Hostname Verification|security handshaker|WRONG_VERSION_NUMBER")
_NO_SHAPE = SplitShape(1, 1, 1)  # of calls that have nothing of the model's sizes


def check_address(address: str) -> None:
    """Refuse what is no ``host:port``.

    Raises:
        InputError: If it is none.
    """
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", address):
        raise InputError(f"address={address!r}: legal is host:port, such as owner.example.org:7421 or localhost:7421.")


class OwnerLost(InputError):
    """The owner has not answered for as long as a party waits."""


class OwnerClient:
    """The owner's layers over the network.

    Args:
        address: Of the owner, ``host:port``.
        token: The party's.
        certificate: PEM file of the certificate that the owner's is checked against.
        patience: Seconds for which a call is asked again while the owner cannot be reached.
        deadline: Seconds that the owner has for one call.

    Raises:
        InputError: If the address is no ``host:port``, or the certificate cannot be read.
    """

    def __init__(self, address: str, *, token: str, certificate: Path, patience: float = 60.0, deadline: float = 300.0) -> None:
        check_address(address)
        try:
            trusted = Path(certificate).read_bytes()
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=trusted.decode("ascii"))
        except (OSError, ValueError) as error:  # a damaged certificate is an OSError, too
            raise InputError(f"certificate={str(certificate)!r} cannot be read as a PEM certificate: {error}.") from error
        self.address, self.patience, self.deadline = address, patience, deadline
        options = {
            "max_receive_message_length": -1,
            "max_send_message_length": -1,
            # An owner that comes back is found at once, and a line that has gone dead is noticed.
            "initial_reconnect_backoff_ms": 100,
            "min_reconnect_backoff_ms": 1000,
            "max_reconnect_backoff_ms": 1000,
            "keepalive_time_ms": 20_000,
            "keepalive_timeout_ms": 10_000,
        }
        grpc = self._grpc = load_grpc()
        self._channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(trusted),
            options=[(f"grpc.{name}", value) for name, value in options.items()],
        )
        self._metadata = ((TOKEN_KEY, f"Bearer {token}"),)
        self._shape: SplitShape | None = None
        self.sent_bytes = self.received_bytes = 0

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def health(self) -> dict[str, Any]:
        """Return what the owner says of itself: ``model`` (fingerprint of its layers), ``cut``, ``layers``, sizes.

        Raises:
            InputError: As for every call: if the owner refuses it; ``OwnerLost`` if it does not answer.
        """
        found = dict(self._call(Frame("health"), _NO_SHAPE).fields)
        self._shape = SplitShape(found["hidden_size"], found["key_value_size"], found["layers"] - found["cut"])
        return found

    def manifest(self) -> dict[str, Any]:
        """Return ``bytes`` and ``sha256`` of each file of the emulator, by name."""
        return dict(self._call(Frame("manifest"), _NO_SHAPE).fields["files"])

    def read(self, file: str, offset: int) -> bytes:
        """Return the bytes of an emulator's file from a place on, a piece of it at most."""
        data = self._call(Frame("read", {"file": file, "offset": offset}), _NO_SHAPE).tensors["data"]
        return data.numpy().tobytes()

    def begin(self, step: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerLayers.begin``."""
        self._call(with_prefix("begin", {"step": step}, length, prefix))

    def forward(self, step: int, batch: int, states: Tensor, head: HeadRequest | None = None, *, train: bool = True) -> Tensor:
        """See ``OwnerLayers.forward``."""
        fields = {"step": step, "batch": batch, "train": train}
        return output_of(self._call(Frame("forward", fields, {"states": states, **head_fields(head)})))

    def backward(self, step: int, batch: int, gradient: Tensor, *, wanted: bool = True) -> Tensor | None:
        """See ``OwnerLayers.backward``; the gradient is sent back if it is ``wanted``."""
        fields = {"step": step, "batch": batch, "wanted": wanted}
        return self._call(Frame("backward", fields, {OUTPUTS[gradient.dim()]: gradient})).tensors.get("states")

    def collect(self, step: int) -> list[Tensor]:
        """See ``OwnerLayers.collect``."""
        return [row for rows in self._call(Frame("collect", {"step": step})).tensors.values() for row in rows]

    def open(self, text: int, length: int, prefix: Prefix | None) -> None:
        """See ``OwnerTexts.open``."""
        self._call(with_prefix("open", {"text": text}, length, prefix))

    def extend(self, text: int, place: int, states: Tensor, *, top: int = 0) -> dict[str, Tensor]:
        """See ``OwnerTexts.extend``."""
        return dict(self._call(Frame("extend", {"text": text, "place": place, "top": top}, {"states": states})).tensors)

    def _call(self, frame: Frame, shape: SplitShape | None = None) -> Frame:
        if shape is None and self._shape is None:
            self.health()
        rules = replies(shape or self._shape)  # type: ignore[arg-type]
        data = self._ask(frame.kind, frame.encode())
        return decode(data, {frame.kind: rules[frame.kind]})

    def _ask(self, name: str, data: bytes) -> bytes:
        call = self._channel.unary_unary(f"/{SERVICE}/{name}")
        until, said = 0.0, 0.0
        for attempt in range(1 << 30):
            try:
                answer: bytes = call(data, metadata=self._metadata, timeout=self.deadline)
            except self._grpc.RpcError as error:
                now = time.monotonic()
                until = until or now + self.patience  # counted from the first failure: a long call is no impatience
                self._consider(error, name, until)
                pause = _PAUSES[min(attempt, len(_PAUSES) - 1)]
                if now - said >= _SAY_AGAIN:
                    log.info("The owner at %s does not answer; asking again for %.0f s", self.address, max(until - now, 0))
                    said = now
                time.sleep(pause)
                continue
            self.sent_bytes += len(data)
            self.received_bytes += len(answer)
            return answer
        raise AssertionError("patience ends before")

    def _consider(self, error: Any, name: str, until: float) -> None:
        """Return where a call may be asked again; raise what the owner said otherwise."""
        code, details, status = error.code(), error.details() or "", self._grpc.StatusCode
        if code == status.FAILED_PRECONDITION:
            raise UnknownStep(details) from error
        if code == status.INVALID_ARGUMENT:
            raise FrameError(f"The owner refuses {name}: {details}") from error
        busy = code == status.RESOURCE_EXHAUSTED and "larger than" not in details
        if not busy and code not in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED):
            raise InputError(f"The owner at {self.address} refuses {name} ({code.name.lower()}): {details}") from error
        if _DISTRUST.search(details):
            raise InputError(
                f"The owner at {self.address} is not trusted ({details}). Give the certificate that the owner gave you, and its "
                "address by a name that the certificate is made out for."
            ) from error
        if time.monotonic() >= until:
            raise OwnerLost(
                f"The owner at {self.address} did not answer {name} for {self.patience:g} seconds ({details}). Is it running "
                "there? When it is back, a training goes on with --ckpt_path last."
            ) from error


@dataclass
class OwnerAccess:
    """How a party reaches the owner.

    Args:
        address: ``host:port``.
        token: File with the party's token.
        certificate: PEM file of the certificate that the owner's is checked against.
        patience: Seconds for which a call is asked again while the owner cannot be reached.
    """

    address: str
    token: str
    certificate: str
    patience: float = 60.0

    def client(self) -> OwnerClient:
        """Return the party's client.

        Raises:
            InputError: If a file cannot be read.
        """
        try:
            token = Path(self.token).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"owner.token={self.token!r} cannot be read: {error}.") from error
        return OwnerClient(self.address, token=token, certificate=Path(self.certificate), patience=self.patience)
