"""The exchange of gradients: what a DDP communication hook sends, keeps back and sums.

Every rank sends the entries that it selects; what is not sent stays in a residual and is added to the next gradient (error
feedback; Seide et al. 2014, Deep Gradient Compression, arXiv 1712.01887). Messages have the same length on all ranks, and travel
during the backward pass. Two ranks, or few entries, take an all-gather, and sum in the order of the ranks. Else there are two
phases: each rank gets one share of the vector from all others, sums it, and sends the sum, packed again; what that packing leaves
out stays in this rank's residual as well (DoubleSqueeze, arXiv 1905.05957). Either way replicas stay bitwise equal. Tensors of a
GPU sent by gloo, whose callbacks must not wait for another message, take the all-gather always.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ...files import write_atomic
from .clock import Clock, Mark
from .in_order import InOrder, group_beside
from .policy import BytesAt
from .wire import GROUP, Layout, Places, ValueBits, in_two_phases, pack, select, sparse_pays, sum_share, unpack

DenseFormat = Literal["float32", "float16"]


class GradientExchange:
    """State of the communication hook: residuals by parameter name, the rate, and the clock of the step.

    Args:
        names: Name of each parameter, by ``id``.
        dense_format: Type of the values in an exchange of everything, which then is an all-reduce.
        value_bits: Bits of a value in an exchange of some entries: 16 or 4.
        error_feedback: Keep what is not sent for the next step.
        clip: Largest norm of a rank's own gradient, before residuals are added; every bucket has its share by size. None clips
            nothing.
        momentum: Factor of momentum correction with factor masking (for an optimizer without momentum of its own); 0 for none.
        dense_below: Parameters with fewer entries, and those of one dimension, are always sent whole, as float16.
        some_unused: Whether a step may leave parameters unused: their gradient in a bucket is zero, and DDP does not apply what
            comes back. What was kept back of them then waits for a step that uses them.
        group: Process group; None for one process, which prunes its own gradient.
    """

    def __init__(
        self,
        names: dict[int, str],
        *,
        dense_format: DenseFormat = "float16",
        value_bits: ValueBits = 4,
        error_feedback: bool = True,
        clip: float | None = None,
        momentum: float = 0.0,
        dense_below: int = 2048,
        some_unused: bool = False,
        group: Any = None,
    ) -> None:
        self.names, self.dense_format, self.value_bits, self.error_feedback = names, dense_format, value_bits, error_feedback
        self.some_unused = some_unused
        self.clip, self.momentum, self.dense_below, self.group = clip, momentum, dense_below, group
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.dense_bytes = 4 if dense_format == "float32" else 2
        self.rate = 0.0
        self.flush = False  # send everything, residuals too, and keep nothing back
        self.turn = 0
        self.clock = Clock()
        self.residuals: dict[str, Tensor] = {}
        self.velocities: dict[str, Tensor] = {}
        self._unused: set[str] = set()  # of the bucket at hand
        self._workspaces: dict[tuple[str, ...], Tensor] = {}
        self.at_work: list[Any] = []  # on a GPU, until it is waited for
        self._in_order = InOrder()
        self._answer_group: Callable[[], Any] | None = None  # both of the second phase

    def is_small(self, parameter: Tensor) -> bool:
        """Whether a parameter [any] is always sent whole."""
        return parameter.dim() < 2 or parameter.numel() < self.dense_below

    def bytes_at(self, parameters: list[Tensor]) -> BytesAt:
        """Return the bytes of a step as a function of the rate, for gradients of these parameters [any each]."""
        small = sum(parameter.numel() for parameter in parameters if self.is_small(parameter))
        large = sum(parameter.numel() for parameter in parameters) - small
        return BytesAt(small, large, self.ranks, self.dense_bytes, self.value_bits)

    def save(self, file: Path) -> None:
        """Write what this rank keeps back."""
        kinds = {"residual": self.residuals, "velocity": self.velocities}
        tensors = {f"{kind}/{name}": tensor.contiguous() for kind, table in kinds.items() for name, tensor in table.items()}
        write_atomic(file, safetensors.torch.save(tensors))

    def load(self, file: Path, device: torch.device) -> None:
        """Go on with what ``save`` wrote."""
        for key, tensor in safetensors.torch.load_file(file, device=str(device)).items():
            kind, name = key.split("/", 1)
            (self.residuals if kind == "residual" else self.velocities)[name] = tensor

    # One bucket, step by step: gather what is to be sent, send it, sum what arrives.

    def exchange(self, buffer: Tensor, parameters: list[Tensor], total: int) -> Future[Tensor]:
        """Replace a bucket's gradient by the mean of what the ranks send of theirs.

        Args:
            buffer: Gradients of the parameters, one after another [entries].
            parameters: The parameters, in the order of the buffer.
            total: Entries of the whole model.

        Returns:
            A future of the buffer.
        """
        began = time.perf_counter()
        if self.clip is not None:
            limit = self.clip * (buffer.numel() / total) ** 0.5 / self.ranks**0.5
            buffer.mul_((limit / (buffer.norm() + 1e-12)).clamp(max=1.0))
        large, small = self._split(buffer, parameters)
        self._unused = {name for name, part in large + small if not part.any()} if self.some_unused else set()
        for name in self._unused & self.residuals.keys():
            self.residuals[name] = self.residuals[name].clone()  # out of the memory that this step fills
        self._add_residuals(buffer, parameters)
        keep = 1 - self.rate
        if self.rate == 0 or self.flush or not large or not sparse_pays(keep, self.ranks, self.dense_bytes, self.value_bits):
            result = self._send_all(buffer, parameters)
        elif in_two_phases(keep, self.ranks, self.value_bits) and not (buffer.is_cuda and dist.get_backend(self.group) == "gloo"):
            result = self._send_shares(buffer, large, small, keep)
        else:
            result = self._send_selection(buffer, large, small, keep)
        self.clock.worked(began)
        return result

    def _split(self, buffer: Tensor, parameters: list[Tensor]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        parts: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
        begin = 0
        for parameter in parameters:
            part = buffer[begin : begin + parameter.numel()]
            parts[self.is_small(parameter)].append((self.names[id(parameter)], part))
            begin += parameter.numel()
        return parts

    def _add_residuals(self, buffer: Tensor, parameters: list[Tensor]) -> None:
        """Add what was kept back, and the momentum; both only where there is some."""
        begin = 0
        for parameter in parameters:
            name, part = self.names[id(parameter)], buffer[begin : begin + parameter.numel()]
            begin += parameter.numel()
            if name in self._unused:
                continue
            if self.momentum:
                velocity = self.velocities.setdefault(name, torch.zeros_like(part, dtype=torch.float32))
                part.copy_(velocity.mul_(self.momentum).add_(part))
            residual = self.residuals.get(name)
            if residual is not None:
                part.add_(residual.to(part.dtype))

    def _send_all(self, buffer: Tensor, parameters: list[Tensor]) -> Future[Tensor]:
        """All-reduce the bucket; in float16, its rounding error is kept back."""
        exact = self.dense_format == "float32"
        message = buffer.div(self.ranks) if exact else buffer.div(self.ranks).clamp_(-65504, 65504).to(torch.float16)
        begin = 0
        for parameter in parameters:
            name, size = self.names[id(parameter)], parameter.numel()
            if name in self._unused and not self.flush:
                begin += size
                continue
            if self.flush:
                self.velocities.pop(name, None)  # of what was sent, momentum is forgotten
            if exact or self.flush or not self.error_feedback:
                self.residuals.pop(name, None)
            else:
                part = slice(begin, begin + size)
                self._keep(name, buffer[part].float() - message[part].float() * self.ranks)
            begin += size
        if self.ranks == 1:
            return _done(buffer.copy_(message))
        self.clock.bytes += 2 * (self.ranks - 1) / self.ranks * message.numel() * message.element_size()
        posted = self.clock.mark(buffer.device)
        work = dist.all_reduce(message, group=self.group, async_op=True)
        return work.get_future().then(lambda future: buffer.copy_(self._arrived(posted, future)))

    def _send_selection(
        self, buffer: Tensor, large: list[tuple[str, Tensor]], small: list[tuple[str, Tensor]], keep: float
    ) -> Future[Tensor]:
        """All-gather the selected entries of large parameters, and small parameters whole."""
        vector = self._vector(large)[: sum(part.numel() for _, part in large)]
        layout = Layout(len(vector), keep, self.value_bits)
        dense = torch.cat([part.float() for _, part in small]) if small else vector.new_empty(0)
        message = torch.empty(layout.bytes + 2 * dense.numel(), dtype=torch.uint8, device=buffer.device)
        places = select(vector, layout, self.turn)
        sent = pack(vector, places, layout, message[: layout.bytes])
        rounded = dense.clamp(-65504, 65504).to(torch.float16)
        message[layout.bytes :] = rounded.view(torch.uint8)
        vector[places] -= sent
        self._keep_back(large, vector, places)
        self._keep_back(small, dense - rounded.float(), None)
        if self.ranks == 1:
            return _done(self._sum(buffer, large, small, layout, [message], (places, sent)))
        self.clock.bytes += (self.ranks - 1) * message.numel()
        messages = [torch.empty_like(message) for _ in range(self.ranks)]
        posted = self.clock.mark(buffer.device)
        work = dist.all_gather(messages, message, group=self.group, async_op=True)
        if buffer.is_cuda:  # made on another stream than ``unpacked`` reads on: their memory must not go to others meanwhile
            self.at_work.append((messages, message, places, sent))

        def unpacked(future: Future) -> Tensor:
            self._arrived(posted, future)
            began = time.perf_counter()
            result = self._sum(buffer, large, small, layout, messages, (places, sent))
            self.clock.worked(began)
            return result

        return work.get_future().then(unpacked)

    def _send_shares(
        self, buffer: Tensor, large: list[tuple[str, Tensor]], small: list[tuple[str, Tensor]], keep: float
    ) -> Future[Tensor]:
        """Send each rank its share of what is selected, then all of them the sum of the own share; small parameters whole."""
        vector, device, turn, unused = self._vector(large), buffer.device, self.turn, self._unused
        shares = vector.view(self.ranks, -1)
        size = shares.shape[1]
        first, second = Layout(size, keep, self.value_bits), Layout(size, sum_share(keep, self.ranks), self.value_bits)
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        message = torch.empty(len(others), first.bytes, dtype=torch.uint8, device=device)
        selected: list[Tensor] = []
        for row, other in zip(message, others):
            places = select(shares[other], first, turn)
            shares[other][places] -= pack(shares[other], places, first, row)
            if isinstance(places, Tensor):
                selected.append(places + other * size)
        own = self._workspace("share", large).copy_(shares[self.rank])
        self._keep_back(large, vector, torch.cat(selected) if selected else slice(None))  # of the own share, see ``answer``
        dense = torch.cat([part.float() for _, part in small]) if small else vector.new_empty(0)
        mean = dense.div(self.ranks).clamp_(-65504, 65504).to(torch.float16)
        self._keep_back(small, dense - mean.float() * self.ranks, None)
        self.clock.bytes += len(others) * (first.bytes + second.bytes + 2 * mean.nbytes / self.ranks)
        received, group = torch.empty_like(message), self._group_of_answers(device)
        rows = [int(rank != self.rank) for rank in range(self.ranks)]
        posted = self.clock.mark(device)
        works = [dist.all_to_all_single(received, message, rows, rows, group=self.group, async_op=True)]
        if small:
            works.append(dist.all_reduce(mean, group=self.group, async_op=True))
        answers = [torch.empty(second.bytes, dtype=torch.uint8, device=device) for _ in range(self.ranks)]

        def answer() -> Future[Tensor]:
            for work in works:
                work.wait()
            self.clock.arrived(posted, device)
            began = time.perf_counter()
            for row in received:
                _add(own, *unpack(row, first))
            places = select(own, second, turn)
            message = torch.empty_like(answers[0])
            sent = pack(own, places, second, message)
            own[places] -= sent
            self._keep_rest(large, own, unused)
            self.clock.worked(began)
            answered = self.clock.mark(device)
            work = dist.all_gather(answers, message, group=group, async_op=True)
            if buffer.is_cuda:  # see ``_send_selection``
                self.at_work.append((message, places, sent))
            return work.get_future().then(lambda future: filled(answered, future, places, sent))

        def filled(answered: Mark, future: Future, places: Places, sent: Tensor) -> Tensor:
            self._arrived(answered, future, answer=True)
            began = time.perf_counter()
            sums = self._workspace("sums", large).zero_()
            for rank, (total, received) in enumerate(zip(sums.view(self.ranks, -1), answers)):
                _add(total, *((places, sent) if rank == self.rank else unpack(received, second)))
            _distribute(large, sums.div_(self.ranks))
            _distribute(small, mean)
            self.clock.worked(began)
            return buffer

        if not buffer.is_cuda:
            return self._in_order.do(answer)
        self.at_work.append((received, message, mean, answers))
        return works[0].get_future().then(lambda _: answer().wait())  # NCCL's come in order, and wait on the device alone

    def _group_of_answers(self, device: torch.device) -> Any:
        """Return the process group of the second phase; on a CPU, one whose order another thread may keep."""
        if device.type == "cuda":
            return self.group
        if self._answer_group is None:
            self._answer_group = group_beside(self.group)
        return self._answer_group()

    def _vector(self, large: list[tuple[str, Tensor]]) -> Tensor:
        """Return the large parameters' gradients one after another, and zeros up to equal shares."""
        entries = sum(part.numel() for _, part in large)
        vector = self._workspace("values", large)
        torch.cat([part for _, part in large], out=vector[:entries])
        vector[entries:] = 0
        return vector

    def _workspace(self, use: Literal["values", "sums", "share"], parts: list[tuple[str, Tensor]]) -> Tensor:
        """Return memory for a bucket's large parameters, up to equal shares of whole groups of entries, or for one of the shares.

        A bucket uses it at every step; fresh memory of this size costs more than all that is done in it.
        """
        names = [name for name, _ in parts]
        key = (use, *names)  # residuals are parts of it: other parameters, other memory
        if key not in self._workspaces:  # once DDP has arranged its buckets anew, those before it are of no use
            for other in [other for other in self._workspaces if other[0] == use and not set(names).isdisjoint(other[1:])]:
                del self._workspaces[other]
            size = -(-sum(part.numel() for _, part in parts) // (self.ranks * GROUP)) * GROUP
            self._workspaces[key] = torch.empty(size * (1 if use == "share" else self.ranks), device=parts[0][1].device)
        return self._workspaces[key]

    def _keep_back(self, parts: list[tuple[str, Tensor]], rest: Tensor, sent: Places | None) -> None:
        """Store what was not sent of each parameter; momentum of entries that were selected is forgotten (factor masking)."""
        begin = 0
        mask = None
        if self.momentum and isinstance(sent, Tensor):  # where all is sent, momentum goes on as in the dense exchange
            mask = torch.zeros_like(rest, dtype=torch.bool)
            mask[sent] = True
        for name, part in parts:
            rows = slice(begin, begin + part.numel())
            begin += part.numel()
            if name in self._unused:
                continue
            if self.error_feedback:
                self._keep(name, rest[rows])
            if mask is not None:
                self.velocities[name].masked_fill_(mask[rows], 0)

    def _keep_rest(self, large: list[tuple[str, Tensor]], rest: Tensor, unused: set[str]) -> None:
        """Store what this rank has not sent of the sum of its share, beside what waits of a parameter that it has not used."""
        if not self.error_feedback:
            return
        torch.nan_to_num_(rest, nan=0.0, posinf=0.0, neginf=0.0)
        begin = -self.rank * len(rest)  # of a parameter, as places of the share
        for name, part in large:
            low, high = max(0, begin), min(len(rest), begin + part.numel())
            if low < high:
                kept = self.residuals.setdefault(name, torch.zeros_like(part, dtype=torch.float32))[low - begin : high - begin]
                kept.copy_(rest[low:high] + kept if name in unused else rest[low:high])
            begin += part.numel()

    def _keep(self, name: str, residual: Tensor) -> None:
        # A gradient that is not finite must not poison all that follow.
        self.residuals[name] = torch.nan_to_num_(residual, nan=0.0, posinf=0.0, neginf=0.0)

    def _sum(
        self,
        buffer: Tensor,
        large: list[tuple[str, Tensor]],
        small: list[tuple[str, Tensor]],
        layout: Layout,
        messages: list[Tensor],
        own: tuple[Places, Tensor],
    ) -> Tensor:
        """Fill the bucket with the mean of all ranks' messages, in the order of the ranks; this rank's own is known unpacked."""
        total = self._workspace("sums", large)[: layout.size].zero_()
        dense: Tensor | None = None
        for rank, message in enumerate(messages):
            _add(total, *(own if rank == self.rank else unpack(message[: layout.bytes], layout)))
            values = message[layout.bytes :].clone().view(torch.float16).float()
            dense = values if dense is None else dense + values
        assert dense is not None
        _distribute(large, total.div_(len(messages)))
        _distribute(small, dense.div_(len(messages)))
        return buffer

    def _arrived(self, posted: Mark, future: Future, *, answer: bool = False) -> Any:
        """Stop the clock of a message, and raise what went wrong on its way."""
        value = future.value()
        value = value[0] if isinstance(value, list | tuple) else value
        self.clock.arrived(posted, value.device, answer=answer)
        return value


def _add(total: Tensor, places: Places, values: Tensor) -> None:
    """Add the entries at some places to a vector."""
    if isinstance(places, Tensor):
        total.index_add_(0, places, values)
    else:
        total += values


def _distribute(parts: list[tuple[str, Tensor]], vector: Tensor) -> None:
    """Fill parameters' places in a bucket, one after another."""
    begin = 0
    for _, part in parts:
        part.copy_(vector[begin : begin + part.numel()])
        begin += part.numel()


def _done(buffer: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(buffer)
    return future
