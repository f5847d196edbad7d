"""The owner's side of a split model in training: its layers at work for several parties, one call at a time.

A party trains so: it begins an optimizer step with the prefix rows of the owner's layers; then, for each batch of that step, it
sends the states before the cut (``forward``) and, when its loss is known, the gradient of what it got (``backward``); at last it
asks for the gradient of the rows (``collect``). Every call carries the numbers of the optimizer step and of the batch. A call
that was answered and is asked again gives the same answer and changes nothing, so a reply that was lost on the way costs no step.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InputError
from .prefix import Prefix, plugged_in
from .split import ModelPart, with_virtual, without_virtual
from .turns import Turns


class UnknownStep(InputError):
    """The owner does not know a step or a text (any more), for it was restarted, or this is too old. Send it from its begin."""


@dataclass(frozen=True, eq=False)
class HeadRequest:
    """What a party asks of a head that the owner keeps (``head: owner``), instead of states.

    Args:
        positions: Row and position of the states whose logits are wanted [n, 2], int64; virtual positions are not counted.
        candidates: Ids whose logits are wanted [m], int64; None for the whole vocabulary.
        labels: Right ids, or places among the candidates where there are some [n], int64. With them, the owner gives the
            cross-entropy in nats [n] and no logits.
    """

    positions: Tensor
    candidates: Tensor | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "HeadRequest":
        """Return the same question with its tensors on a device."""
        asked = (self.positions, self.candidates, self.labels)
        return HeadRequest(*(None if one is None else one.to(device) for one in asked))  # type: ignore[arg-type]

    def equals(self, other: "HeadRequest | None") -> bool:
        """Return whether both ask the same."""
        if other is None:
            return False
        pairs = [(self.positions, other.positions), (self.candidates, other.candidates), (self.labels, other.labels)]
        return all(one is two or (one is not None and two is not None and torch.equal(one, two)) for one, two in pairs)


@dataclass(eq=False)
class _Batch:
    """What is kept of a batch between its calls."""

    given: Tensor  # states that were sent, a leaf of the graph
    head: HeadRequest | None
    output: Tensor
    graph: Tensor | None  # the output with its graph, until the backward pass, or until others need the room
    gradient: Tensor | None = None  # of ``given``, once asked for


@dataclass
class _Session:
    """A party's optimizer step."""

    step: int
    length: int
    prefix: Prefix | None
    batches: dict[int, _Batch] = field(default_factory=dict)
    collected: list[Tensor] | None = None
    touched: float = 0.0


def brings_its_virtual_states(prefix: Prefix | None, layers: int) -> bool:
    """Return whether states come with their virtual positions: where one of the owner's layers reads them.

    None does where prompts stand there from the first layer on, or where every layer has its own keys and values.

    Args:
        prefix: Rows of the owner's layers, counted from the cut on.
        layers: How many layers the owner has.
    """
    if prefix is None:
        return True
    own = prefix.settings.layers or ()
    return own[:1] != (0,) if prefix.settings.kind == "prompts" else len(own) < layers


def in_place(part: ModelPart, prefix: Prefix | None) -> AbstractContextManager[None]:
    """Put a prefix's rows, if there are some, into the owner's layers."""
    return nullcontext() if prefix is None else plugged_in(part.body, prefix)


class OwnerLayers:
    """The owner's layers, for parties that train prefixes.

    Args:
        part: The layers; their weights are frozen.
        lifetime: Seconds of silence after which a party's step is dropped; it then sends the step again.
        most_graphs: Batches, of all parties, whose activations are kept for their backward pass; for others they are computed
            again.
        most_batches: Batches of an optimizer step whose states are kept, for each party.
        most_sessions: Parties at once; the one that was silent longest makes room.
        most_batch_tokens: Positions of a batch, virtual ones too: what a graph is kept of.
        most_step_tokens: Positions of all batches of an optimizer step, for each party.
        most_logits: Numbers in an answer of the head.
        most_step_logits: Numbers in all of its answers in an optimizer step, for each party.
        clock: Tells the seconds.

    Raises:
        InputError: If a bound is below 1, or one party's texts would change what another's mean.
    """

    def __init__(
        self,
        part: ModelPart,
        *,
        lifetime: float = 600.0,
        most_graphs: int = 2,
        most_batches: int = 64,
        most_sessions: int = 8,
        most_batch_tokens: int = 1 << 14,
        most_step_tokens: int = 1 << 17,
        most_logits: int = 1 << 24,
        most_step_logits: int = 1 << 26,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bounds = {"lifetime": lifetime, "most_graphs": most_graphs, "most_batches": most_batches, "most_sessions": most_sessions}
        bounds |= {"most_batch_tokens": most_batch_tokens, "most_step_tokens": most_step_tokens, "most_logits": most_logits}
        bounds["most_step_logits"] = most_step_logits
        for name, value in bounds.items():
            if value <= 0:
                raise InputError(f"{name}={value} keeps nothing. Legal: above 0.")
        rope = (getattr(part.body.config, "rope_parameters", None) or {}).get("rope_type")
        if rope in ("dynamic", "longrope"):
            raise InputError(
                f"model: its positions ({rope}) depend on the longest text that was read, here of any party. Give a model whose "
                "positions do not."
            )
        self.part = part.requires_grad_(False).eval()
        self.lifetime, self.most_graphs, self.most_logits, self.clock = lifetime, most_graphs, most_logits, clock
        self.most_batches, self.most_sessions = most_batches, most_sessions
        self.most_batch_tokens, self.most_step_tokens = most_batch_tokens, most_step_tokens
        self.most_step_logits = most_step_logits
        self._sessions: dict[str, _Session] = {}
        self._graphs: deque[_Batch] = deque()  # those that have one, the oldest first
        self.turns = Turns()
        """Held by whoever computes: a prefix in place is seen by every call."""

    @property
    def device(self) -> torch.device:
        """Where the layers are computed."""
        return next(self.part.parameters()).device

    def brings_virtual_states(self, prefix: Prefix | None) -> bool:
        """Return whether states behind a prefix come with their virtual positions."""
        return brings_its_virtual_states(prefix, self.part.stop - self.part.start)

    def begin(self, party: str, step: int, length: int, prefix: Prefix | None) -> None:
        """Begin an optimizer step of a party; what was kept of its step before is dropped.

        Args:
            party: Its name.
            step: Number of the optimizer step; the same number again begins it anew.
            length: Of the prefix: virtual positions before every text.
            prefix: Rows of the owner's layers, counted from the cut on; None where all rows stay with the party.

        Raises:
            InputError: If the prefix does not fit the layers.
        """
        if prefix is not None and prefix.settings.length != length:
            raise InputError(f"length={length}, but the prefix has {prefix.settings.length} rows.")
        with self.turns.of(party):
            with in_place(self.part, prefix):  # in turn, for its hooks are seen by whoever computes
                pass  # it fits
            self._forget_old()
            self._drop(party)
            while len(self._sessions) >= self.most_sessions:
                self._drop(min(self._sessions, key=lambda name: self._sessions[name].touched))
            prefix = None if prefix is None else prefix.to(self.device)
            self._sessions[party] = _Session(step, length, prefix, touched=self.clock())

    def forward(
        self, party: str, step: int, batch: int, states: Tensor, head: HeadRequest | None = None, *, train: bool = True
    ) -> Tensor:
        """Return the states behind the owner's layers [rows, tokens, hidden size], not the virtual ones, or the head's answer.

        Args:
            party: Its name.
            step: Of ``begin``.
            batch: Number of the batch within the step.
            states: Behind the party's layers [rows, tokens, hidden size], padded on the right, with virtual positions only where
                ``brings_virtual_states`` says so; taken in the type of the owner's weights.
            head: What is asked of the owner's head; None for states.
            train: Keep what ``backward`` needs; without it, the number of the batch is not used.

        Raises:
            UnknownStep: If the step was not begun, or is forgotten.
            InputError: If the batch's number was another batch's, there are too many, or the head cannot answer.
        """
        with self.turns.of(party):
            session = self._session(party, step)
            states = self._checked(states, session)
            head = None if head is None else self._checked_head(head, states, session)
            if not train:
                return self._through(states, session, head)
            known = session.batches.get(batch)
            if known is not None:
                same = head is known.head or (head is not None and head.equals(known.head))
                if not same or known.given.shape != states.shape or not torch.equal(known.given, states):
                    raise InputError(f"batch={batch} of step {step} was another batch. Give each its own number.")
                return known.output
            if len(session.batches) >= self.most_batches:
                raise InputError(
                    f"batch={batch}: step {step} has {self.most_batches} batches already, which is the owner's limit. Accumulate "
                    "fewer."
                )
            tokens = sum(kept.given[..., 0].numel() for kept in session.batches.values()) + states[..., 0].numel()
            if tokens > self.most_step_tokens:
                raise InputError(
                    f"batch={batch}: with it, step {step} has {tokens} tokens, above the owner's limit of "
                    f"{self.most_step_tokens}. Accumulate fewer, or smaller batches."
                )
            logits = sum(kept.output.numel() for kept in session.batches.values() if kept.head is not None)
            if head is not None and logits + self._answer_size(head) > self.most_step_logits:
                raise InputError(
                    f"batch={batch}: with it, step {step} has more logits than the owner's limit of {self.most_step_logits}. "
                    "Accumulate fewer, or name candidates."
                )
            given = states.clone().requires_grad_()
            self._make_room()
            graph = self._through(given, session, head)
            session.batches[batch] = kept = _Batch(given, head, graph.detach(), graph)
            self._graphs.append(kept)
            return kept.output

    def backward(self, party: str, step: int, batch: int, gradient: Tensor) -> Tensor:
        """Return the gradient of the states that were sent; that of the rows is added up until ``collect``.

        Args:
            party: Its name.
            step: Of ``begin``.
            batch: Of ``forward``.
            gradient: Of what ``forward`` returned, of its shape: [rows, length, hidden size], or logits.

        Raises:
            UnknownStep: If the batch was not sent forward, or is forgotten.
            InputError: If the gradient is of another shape, or the step has been collected.
        """
        with self.turns.of(party):
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
            try:
                if known.graph is None:
                    self._make_room()
                    known.graph = self._through(known.given, session, known.head)
                known.graph.backward(gradient.to(known.graph))
            except BaseException:
                self._drop(party)  # the rows' gradients may be half added
                raise
            self._release(known)
            known.gradient = known.given.grad
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
        with self.turns.of(party):
            session = self._session(party, step)
            if session.collected is None:
                rows = [] if session.prefix is None else list(session.prefix.rows)
                session.collected = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in rows]
            return session.collected

    def _checked(self, states: Tensor, session: _Session) -> Tensor:
        width = int(self.part.body.config.hidden_size)
        least = session.length + 1 if self.brings_virtual_states(session.prefix) else 1
        if states.dim() != 3 or states.shape[-1] != width or not len(states) or states.shape[1] < least:
            room = f", {session.length} virtual positions first," if least > 1 else ""
            raise InputError(f"The states have the shape {list(states.shape)}. Legal: [rows, tokens{room}, {width}].")
        tokens = len(states) * (states.shape[1] + (session.length if least == 1 else 0))
        if tokens > self.most_batch_tokens:
            raise InputError(
                f"A batch of {len(states)} rows has {tokens} tokens, virtual ones too; the owner's limit is "
                f"{self.most_batch_tokens}. Send smaller batches."
            )
        return states.detach().to(next(self.part.parameters()))

    def _checked_head(self, head: HeadRequest, states: Tensor, session: _Session) -> HeadRequest:
        if self.part.head is None:
            raise InputError("The owner's part of the model has no head.")
        tokens = states.shape[1] - (session.length if self.brings_virtual_states(session.prefix) else 0)
        limits = torch.tensor([len(states), tokens], device=head.positions.device)
        vocabulary = int(self.part.body.config.vocab_size)
        columns = vocabulary if head.candidates is None else len(head.candidates)
        wrong = (
            columns > vocabulary
            or bool(((head.positions < 0) | (head.positions >= limits)).any())
            or len(head.positions) > len(states) * tokens
        )
        for ids, end in ((head.candidates, vocabulary), (head.labels, columns)):
            wrong = wrong or (ids is not None and bool(((ids < 0) | (ids >= end)).any()))
        if wrong or (head.labels is not None and len(head.labels) != len(head.positions)):
            raise InputError(
                f"head: positions have to be within {limits.tolist()}, no more than there are; candidates below {vocabulary}, no "
                "more than that; "
                f"labels below {columns}, as many as positions."
            )
        if columns * len(head.positions) > self.most_logits:  # also where labels make one loss of them
            raise InputError(
                f"head: {len(head.positions)} positions with {columns} logits each are more than the owner's limit of "
                f"{self.most_logits}. Send smaller batches, or name candidates."
            )
        return head.to(self.device)

    def _through(self, given: Tensor, session: _Session, head: HeadRequest | None) -> Tensor:
        length, brought = session.length, self.brings_virtual_states(session.prefix)
        with torch.set_grad_enabled(given.requires_grad), in_place(self.part, session.prefix):
            states = given if brought or not length else with_virtual(given, length)
            positions = torch.arange(states.shape[1], device=given.device).expand(len(given), -1)
            found = without_virtual(self.part(states, position_ids=positions), length)
            if head is None:
                return found
            logits = self.part.logits(found[head.positions[:, 0], head.positions[:, 1]], head.candidates).float()
            if head.labels is None:
                return logits
            return torch.nn.functional.cross_entropy(logits, head.labels, reduction="none")

    def _session(self, party: str, step: int) -> _Session:
        self._forget_old()
        session = self._sessions.get(party)
        if session is None or session.step != step:
            raise UnknownStep(f"step={step} was not begun, or is forgotten. Send it from its rows on.")
        session.touched = self.clock()
        return session

    def forget_old(self) -> None:
        """Drop what was silent for too long; calls do so by themselves."""
        with self.turns.of(""):
            self._forget_old()

    def _forget_old(self) -> None:
        old = self.clock() - self.lifetime
        for name in [name for name, session in self._sessions.items() if session.touched < old]:
            self._drop(name)

    def _drop(self, party: str) -> None:
        session = self._sessions.pop(party, None)
        for batch in session.batches.values() if session is not None else ():
            self._release(batch)

    def _make_room(self) -> None:
        while len(self._graphs) >= self.most_graphs:
            self._graphs.popleft().graph = None

    def _release(self, batch: _Batch) -> None:
        batch.graph = None
        if batch in self._graphs:
            self._graphs.remove(batch)

    def _answer_size(self, head: HeadRequest) -> int:
        columns = int(self.part.body.config.vocab_size) if head.candidates is None else len(head.candidates)
        return len(head.positions) * (1 if head.labels is not None else columns)
