"""A party's side of the owner's service: calls that are asked again until they are answered."""

import logging
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError
from .frames import Frame, FrameError, decode
from .owner import UnknownStep
from .prefix import Prefix
from .protocol import SERVICE, TOKEN_KEY, SplitShape, begin_frame, load_grpc, replies

log = logging.getLogger(__name__)
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds before a call is asked again; the last one goes on


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
        InputError: If the certificate cannot be read.
    """

    def __init__(self, address: str, *, token: str, certificate: Path, patience: float = 60.0, deadline: float = 300.0) -> None:
        try:
            trusted = Path(certificate).read_bytes()
        except OSError as error:
            raise InputError(f"certificate={str(certificate)!r} cannot be read: {error}.") from error
        self.address, self.patience, self.deadline = address, patience, deadline
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        grpc = self._grpc = load_grpc()
        self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), options=unlimited)
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
        found = dict(self._call(Frame("health"), SplitShape(1, 1, 1)).fields)
        self._shape = SplitShape(found["hidden_size"], found["key_value_size"], found["layers"] - found["cut"])
        return found

    def begin(self, step: int, prefix: Prefix) -> None:
        """See ``OwnerLayers.begin``."""
        self._call(begin_frame(step, prefix))

    def forward(self, step: int, batch: int, states: Tensor) -> Tensor:
        """See ``OwnerLayers.forward``."""
        return self._call(Frame("forward", {"step": step, "batch": batch}, {"states": states})).tensors["states"]

    def backward(self, step: int, batch: int, gradient: Tensor) -> Tensor:
        """See ``OwnerLayers.backward``."""
        return self._call(Frame("backward", {"step": step, "batch": batch}, {"gradient": gradient})).tensors["gradient"]

    def collect(self, step: int) -> list[Tensor]:
        """See ``OwnerLayers.collect``."""
        (rows,) = self._call(Frame("collect", {"step": step})).tensors.values()
        return list(rows)

    def _call(self, frame: Frame, shape: SplitShape | None = None) -> Frame:
        if shape is None and self._shape is None:
            self.health()
        rules = replies(shape or self._shape)  # type: ignore[arg-type]
        data = self._ask(frame.kind, frame.encode())
        return decode(data, {frame.kind: rules[frame.kind]})

    def _ask(self, name: str, data: bytes) -> bytes:
        call = self._channel.unary_unary(f"/{SERVICE}/{name}")
        until = time.monotonic() + self.patience
        for attempt in range(1 << 30):
            try:
                answer: bytes = call(data, metadata=self._metadata, timeout=self.deadline)
            except self._grpc.RpcError as error:
                self._consider(error, name, until)
                pause = _PAUSES[min(attempt, len(_PAUSES) - 1)]
                log.info("The owner at %s does not answer; asking again in %.2g s", self.address, pause)
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
        if code not in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED):
            raise InputError(f"The owner at {self.address} refuses {name} ({code.name.lower()}): {details}") from error
        if time.monotonic() >= until:
            raise OwnerLost(
                f"The owner at {self.address} did not answer {name} for {self.patience:g} seconds ({details}). Is it running, "
                "and is its certificate the one that you were given? Start again with --ckpt_path last when it is back."
            ) from error
