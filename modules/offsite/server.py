"""The owner's service: its layers behind gRPC, for parties that it knows, over TLS."""

from __future__ import annotations

import hmac
import logging
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import InputError
from .client import check_address
from .emulator import EmulatorFiles
from .frames import Frame, decode
from .owner import OwnerLayers, UnknownStep
from .protocol import OUTPUTS, SERVICE, TOKEN_KEY, SplitShape, head_of, load_grpc, output_of, prefix_of, requests
from .texts import OwnerTexts

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)
_CALLS_OF_ONE = 3  # of a party at the same time: one at work, the same one asked again, and a download


def shape_of(layers: OwnerLayers) -> SplitShape:
    """Return the sizes that parties have to know of the owner's layers."""
    part, config = layers.part, layers.part.body.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return SplitShape(int(config.hidden_size), int(config.num_key_value_heads * size), part.stop - part.start)


class OwnerServer:
    """Serves the owner's layers, and its emulator for download, until it is stopped.

    Every call needs the token of a party, and is answered in turn; without one, its message is not even waited for. A message
    that is none, or breaks a rule, is refused by name with ``INVALID_ARGUMENT``; a step that is not known, with
    ``FAILED_PRECONDITION``, which tells the party to send it again.

    Args:
        layers: The owner's layers.
        model: Fingerprint of the whole model that they are of.
        emulator: Files that parties may download; None where they get them in another way.
        texts: Texts in generation; None takes the usual bounds.
        tokens: Token of each party.
        certificate: PEM file of the server's certificate.
        key: PEM file of its private key.
        address: To listen at; port 0 takes a free one.
        most_message_bytes: Of a message; longer ones are refused before they are read.
        most_calls: Calls at the same time, three of each party; more are refused with ``RESOURCE_EXHAUSTED``, and asked again.
        most_wait: Seconds for which a call's message is waited for.

    Raises:
        InputError: If a limit is not above 0, there is no party, two have the same token, there are more than the layers take at
            once, a file is missing, or the address cannot be had.
    """

    def __init__(
        self,
        layers: OwnerLayers,
        *,
        model: str,
        emulator: EmulatorFiles | None = None,
        texts: OwnerTexts | None = None,
        tokens: Mapping[str, str],
        certificate: Path,
        key: Path,
        address: str = "localhost:0",
        most_message_bytes: int = 1 << 26,
        most_calls: int = 32,
        most_wait: float = 60.0,
    ) -> None:
        limits = {"most_message_bytes": most_message_bytes, "most_calls": most_calls, "most_wait": most_wait}
        for name, value in limits.items():
            if value <= 0:
                raise InputError(f"{name}={value}: legal is above 0.")
        if not tokens or any(len(token) < 16 for token in tokens.values()) or len(set(tokens.values())) < len(tokens):
            raise InputError("tokens: each party needs one of its own, of at least 16 characters, and there has to be a party.")
        if len(tokens) > layers.most_sessions:
            raise InputError(
                f"tokens: there are {len(tokens)} parties, but the layers take most_sessions={layers.most_sessions} at once. "
                "Raise it, or parties would push each other out."
            )
        self.layers, self.texts, self.emulator, self._model = layers, texts or OwnerTexts(layers), emulator, model
        self._tokens = {name: token.encode() for name, token in tokens.items()}
        self._most_wait = most_wait
        # A call counts until its handler is done and its reply has gone: one that its party cancels is still computed, and who
        # never reads its replies would have them pile up here.
        self._at_work = {name: threading.BoundedSemaphore(_CALLS_OF_ONE) for name in tokens}
        self._unread = {name: threading.BoundedSemaphore(_CALLS_OF_ONE) for name in tokens}
        self._on_their_way: dict[grpc.ServicerContext, float] = {}  # calls whose messages are to be there by then
        self._seen: set[str] = set()
        self._grumbled: dict[str, float] = {}
        self._stopped = threading.Event()
        self._shape = shape_of(layers)
        self._rules = requests(self._shape)
        check_address(address)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except OSError as error:  # ssl.SSLError is one
            raise InputError(
                f"certificate={str(certificate)!r}, key={str(key)!r} are no PEM files of a certificate and its key: {error}."
            ) from error
        grpc = self._grpc = load_grpc()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=most_calls, thread_name_prefix="owner"),
            options=[
                ("grpc.max_receive_message_length", most_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # or two owners would share a port, and a party would find the one or the other
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),  # parties look whether the line still stands
            ],
            maximum_concurrent_rpcs=most_calls,
        )
        # To the wire a unary call is a stream of one message; read as such, the token is looked at before the message is there.
        handlers = {name: grpc.stream_unary_rpc_method_handler(partial(self._answer, name)) for name in self._rules}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        credentials = grpc.ssl_server_credentials([(Path(key).read_bytes(), Path(certificate).read_bytes())])
        try:
            self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InputError(
                f"address={address!r} cannot be listened at: the port is taken, or the host is none of this machine's. Give "
                "another port, 0 for a free one, or 0.0.0.0 for all of the machine's addresses."
            ) from error

    def start(self) -> OwnerServer:
        """Begin to answer."""
        self._server.start()
        threading.Thread(target=self._forget, daemon=True, name="owner-forgets").start()
        threading.Thread(target=self._hurry, daemon=True, name="owner-hurries").start()
        return self

    def stop(self, grace: float = 1.0) -> None:
        """Answer no new calls, and end when those at work are done or ``grace`` seconds have gone by."""
        self._stopped.set()
        self._server.stop(grace).wait()

    def wait(self) -> None:
        """Wait until the server is stopped."""
        self._server.wait_for_termination()

    def _party(self, context: grpc.ServicerContext) -> str | None:
        given = dict(context.invocation_metadata()).get(TOKEN_KEY, "")
        offered = given.removeprefix("Bearer ").encode() if isinstance(given, str) else b""
        # All are compared, so that the time tells nothing of which one is nearest.
        found = [name for name, token in self._tokens.items() if hmac.compare_digest(token, offered)]
        return found[0] if found else None

    def _answer(self, name: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        status = self._grpc.StatusCode
        party = self._party(context)
        if party is None:
            self._grumble(f"A caller from {context.peer()} has no token of any party")
            context.abort(status.UNAUTHENTICATED, "The token is of no party. Ask the owner for yours.")
        assert party is not None
        if party not in self._seen:
            self._seen.add(party)
            log.info("Party %s is here, from %s", party, context.peer())
        if not self._at_work[party].acquire(blocking=False):
            context.abort(status.RESOURCE_EXHAUSTED, f"{_CALLS_OF_ONE} calls of this party are at work. Ask again.")
        try:
            return self._admitted(name, party, messages, context)
        finally:
            self._at_work[party].release()

    def _admitted(self, name: str, party: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        status = self._grpc.StatusCode
        if not self._unread[party].acquire(blocking=False):
            context.abort(status.RESOURCE_EXHAUSTED, f"{_CALLS_OF_ONE} replies to this party have not gone. Ask again.")
        if not context.add_callback(self._unread[party].release):
            self._unread[party].release()
            context.abort(status.CANCELLED, "The call is over.")
        self._on_their_way[context] = time.monotonic() + self._most_wait
        try:
            data = next(messages, b"")
        finally:
            self._on_their_way.pop(context, None)
        return self._considered(name, party, data, context)

    def _considered(self, name: str, party: str, data: bytes, context: grpc.ServicerContext) -> bytes:
        status = self._grpc.StatusCode
        try:
            frame = decode(data, {name: self._rules[name]})
            return self._reply(name, party, frame).encode()
        except UnknownStep as error:
            context.abort(status.FAILED_PRECONDITION, str(error))
        except InputError as error:
            self._grumble(f"A call {name} of party {party} is refused: {error}", party)
            context.abort(status.INVALID_ARGUMENT, str(error))
        except Exception:
            self._grumble(f"Call {name} of party {party} failed", f"{party} failed", with_trace=True)
            context.abort(status.INTERNAL, "The owner failed on this call; its log says how.")
        raise AssertionError("abort does not return")

    def _grumble(self, text: str, key: str = "", *, with_trace: bool = False) -> None:
        """Log what was refused or failed, of each key once a second at most: whoever calls cannot fill the owner's disk."""
        now = time.monotonic()
        if now - self._grumbled.get(key, -1.0) >= 1:
            self._grumbled[key] = now
            log.warning("%s", text, exc_info=with_trace)

    def _forget(self) -> None:
        """Drop what is too old, also where nobody calls."""
        while not self._stopped.wait(min(60.0, self.layers.lifetime / 2)):
            self.layers.forget_old()
            self.texts.forget_old()

    def _hurry(self) -> None:
        """Cancel calls whose messages do not come."""
        while not self._stopped.wait(min(1.0, self._most_wait / 4)):
            now = time.monotonic()
            for context in [context for context, end in self._on_their_way.copy().items() if end < now]:
                context.cancel()

    def _reply(self, name: str, party: str, frame: Frame) -> Frame:
        told, tensors, layers = frame.fields, frame.tensors, self.layers
        if name == "health":
            part, shape = layers.part, self._shape
            sizes = {"hidden_size": shape.hidden_size, "key_value_size": shape.key_value_size}
            return Frame(name, {"model": self._model, "cut": part.start, "layers": part.layers, **sizes})
        if name in ("manifest", "read"):
            if self.emulator is None:
                raise InputError("This owner offers no emulator for download. Ask how it gives it.")
            if name == "manifest":
                return Frame(name, {"files": self.emulator.files})
            return Frame(name, {}, {"data": self.emulator.piece(told["file"], told["offset"])})
        if name == "begin":
            layers.begin(party, told["step"], told["length"], prefix_of(frame))
            return Frame(name)
        if name == "forward":
            output = layers.forward(party, told["step"], told["batch"], tensors["states"], head_of(frame), train=told["train"])
            return Frame(name, {}, {OUTPUTS[output.dim()]: output})
        if name == "backward":
            gradient = layers.backward(party, told["step"], told["batch"], output_of(frame))
            return Frame(name, {}, {"states": gradient} if told["wanted"] else {})
        if name == "open":
            self.texts.open(party, told["text"], told["length"], prefix_of(frame))
            return Frame(name)
        if name == "extend":
            return Frame(name, {}, self.texts.extend(party, told["text"], told["place"], tensors["states"], top=told["top"]))
        gradients = layers.collect(party, told["step"])
        if not gradients:
            return Frame(name)
        return Frame(name, {}, {"prompts" if gradients[0].dim() == 2 else "key_values": torch.stack(gradients)})
