"""The owner's side of a split model: its layers at work for several parties, one step at a time.

A party trains so: it sends the prefix rows of the owner's layers once for an optimizer step; then, for each batch of that step,
the states before the cut (``forward``) and, when its loss is known, the gradient of what it got (``backward``); at last it asks
for the gradient of the rows (``collect``). Every call carries the numbers of the optimizer step and of the batch. A call that was
answered and is asked again gives the same answer and changes nothing, so a reply that was lost on the way costs no step.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InputError
from .prefix import Prefix, plugged_in
from .split import ModelPart, with_virtual, without_virtual


class UnknownStep(InputError):
    """The owner does not know a step (any more), for it was restarted or the step is too old: send it from its rows on."""


@dataclass(eq=False)
class _Batch:
    """What is kept of a batch between its calls."""

    given: Tensor  # states that were sent, a leaf of the graph
    output: Tensor
    graph: Tensor | None  # the output with its graph, until the backward pass, or until others need the room
    gradient: Tensor | None = None  # of ``given``, once asked for


@dataclass
class _Session:
    """A party's optimizer step."""

    step: int
    prefix: Prefix
    batches: dict[int, _Batch] = field(default_factory=dict)
    collected: list[Tensor] | None = None
    touched: float = 0.0


class OwnerLayers:
    """The owner's layers, for parties that train prefixes.

    Args:
        part: The layers; their weights are frozen.
        lifetime: Seconds of silence after which a party's step is dropped; it then sends the step again.
        most_graphs: Batches, of all parties, whose activations are kept for their backward pass; for others they are computed
            again.
        most_batches: Batches of an optimizer step whose states are kept, for each party.
        most_sessions: Parties at once; the one that was silent longest makes room.
        clock: Tells the seconds.

    Raises:
        InputError: If a bound is below 1.
    """

    def __init__(
        self,
        part: ModelPart,
        *,
        lifetime: float = 600.0,
        most_graphs: int = 2,
        most_batches: int = 64,
        most_sessions: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bounds = {"lifetime": lifetime, "most_graphs": most_graphs, "most_batches": most_batches, "most_sessions": most_sessions}
        for name, value in bounds.items():
            if value <= 0:
                raise InputError(f"{name}={value} keeps nothing. Legal: above 0.")
        self.part = part.requires_grad_(False).eval()
        self.lifetime, self.most_graphs, self._clock = lifetime, most_graphs, clock
        self.most_batches, self.most_sessions = most_batches, most_sessions
        self._sessions: dict[str, _Session] = {}
        self._graphs: deque[_Batch] = deque()  # those that have one, the oldest first
        self._lock = threading.Lock()

    def begin(self, party: str, step: int, prefix: Prefix) -> None:
        """Begin an optimizer step of a party; what was kept of its step before is dropped.

        Args:
            party: Its name.
            step: Number of the optimizer step; the same number again begins it anew.
            prefix: Rows of the owner's layers, counted from the cut on.

        Raises:
            InputError: If the prefix does not fit the layers, or leaves the first of them without rows.
        """
        if not prefix.settings.layers or prefix.settings.layers[0] != 0:
            raise InputError(
                f"The prefix has rows for the owner's layers {list(prefix.settings.layers or ())}, not for the first, 0: what "
                "stands at its virtual positions is not sent. Give it rows."
            )
        with self._lock:
            with plugged_in(self.part.body, prefix):  # under the lock, for its hooks are seen by whoever computes
                pass  # it fits
            self._forget_old()
            self._sessions.pop(party, None)
            while len(self._sessions) >= self.most_sessions:
                self._sessions.pop(min(self._sessions, key=lambda name: self._sessions[name].touched))
            self._sessions[party] = _Session(step, prefix, touched=self._clock())

    def forward(self, party: str, step: int, batch: int, states: Tensor) -> Tensor:
        """Return the states behind the owner's layers [rows, tokens, hidden size], without virtual positions.

        Args:
            party: Its name.
            step: Of ``begin``.
            batch: Number of the batch within the step.
            states: Behind the party's layers [rows, tokens, hidden size], padded on the right, without virtual positions; taken
                in the type of the owner's weights.

        Raises:
            UnknownStep: If the step was not begun, or is forgotten.
            InputError: If the batch's number was another batch's, or there are too many.
        """
        width = int(self.part.body.config.hidden_size)
        if states.dim() != 3 or states.shape[-1] != width or not states.numel():
            raise InputError(f"The states have the shape {list(states.shape)}. Legal: [rows, tokens, {width}].")
        states = states.detach().to(next(self.part.parameters()))
        with self._lock:
            session = self._session(party, step)
            known = session.batches.get(batch)
            if known is not None:
                if known.given.shape != states.shape or not torch.equal(known.given, states):
                    raise InputError(f"batch={batch} of step {step} was another batch. Give each its own number.")
                return known.output
            if len(session.batches) >= self.most_batches:
                raise InputError(
                    f"batch={batch}: step {step} has {self.most_batches} batches already, which is the owner's limit. Accumulate "
                    "fewer."
                )
            given = states.clone().requires_grad_()
            graph = self._through(given, session.prefix)
            session.batches[batch] = kept = _Batch(given, graph.detach(), graph)
            while len(self._graphs) >= self.most_graphs:
                self._graphs.popleft().graph = None
            self._graphs.append(kept)
            return kept.output

    def backward(self, party: str, step: int, batch: int, gradient: Tensor) -> Tensor:
        """Return the gradient of the states that were sent; that of the rows is added up until ``collect``.

        Args:
            party: Its name.
            step: Of ``begin``.
            batch: Of ``forward``.
            gradient: Of what ``forward`` returned, of its shape.

        Raises:
            UnknownStep: If the batch was not sent forward, or is forgotten.
            InputError: If the gradient is of another shape, or the step has been collected.
        """
        with self._lock:
            session = self._session(party, step)
            known = session.batches.get(batch)
            if known is None:
                raise UnknownStep(f"batch={batch} of step {step} was not sent forward, or is forgotten. Send the step again.")
            if known.gradient is not None:
                return known.gradient
            if session.collected is not None:
                raise InputError(f"step={step} has been collected: batch {batch} comes too late. Begin the next step.")
            if gradient.shape != known.output.shape:
                raise InputError(
                    f"The gradient of batch {batch} has the shape {list(gradient.shape)}. Legal: {list(known.output.shape)}."
                )
            if known.graph is None:
                known.graph = self._through(known.given, session.prefix)
            else:
                self._graphs.remove(known)
            known.graph.backward(gradient.to(known.graph.dtype))
            known.gradient, known.graph = known.given.grad, None
            assert known.gradient is not None
            return known.gradient

    def collect(self, party: str, step: int) -> list[Tensor]:
        """Return the gradient of the rows of each of the owner's layers that has some, summed over the step's batches.

        Args:
            party: Its name.
            step: Of ``begin``.

        Raises:
            UnknownStep: If the step was not begun, or is forgotten.
        """
        with self._lock:
            session = self._session(party, step)
            if session.collected is None:
                session.collected = [
                    torch.zeros_like(rows) if rows.grad is None else rows.grad.clone() for rows in session.prefix.rows
                ]
            return session.collected

    def _through(self, given: Tensor, prefix: Prefix) -> Tensor:
        length = prefix.settings.length
        positions = torch.arange(length + given.shape[1], device=given.device).expand(len(given), -1)
        with torch.enable_grad(), plugged_in(self.part.body, prefix):
            return without_virtual(self.part(with_virtual(given, length), position_ids=positions), length)

    def _session(self, party: str, step: int) -> _Session:
        self._forget_old()
        session = self._sessions.get(party)
        if session is None or session.step != step:
            raise UnknownStep(f"step={step} was not begun, or is forgotten. Send it from its rows on.")
        session.touched = self._clock()
        return session

    def _forget_old(self) -> None:
        old = self._clock() - self.lifetime
        for name in [name for name, session in self._sessions.items() if session.touched < old]:
            del self._sessions[name]
