"""The callback that prunes gradients in a Lightning Trainer."""

import copy
import logging
import math
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...errors import InputError, RankLost
from ...process_group import leave_group_at_exit
from ..newest_checkpoint import NewestCheckpoint
from .adaptive import Adaptive
from .hook import DenseFormat, GradientExchange
from .kept_back import KeptBackFiles
from .policy import Measurement, PruningPolicy
from .wire import ValueBits

log = logging.getLogger(__name__)
AtCheckpoint = Literal["flush", "save", "drop"]
# What gloo and NCCL say when a peer is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Connection timed out",
    "Broken pipe",
    "NCCL",
    "gloo",
)


def _hook(state: "GradientPruning", bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Hand a bucket of DDP to the exchange; the argument has to be called ``bucket``."""
    return state._on_bucket(bucket)


class GradientPruning(Callback):
    """Sends only the largest entries of each gradient between the ranks of a DDP training, as few as the network asks for.

    For training over slow or unstable networks. What is not sent is added to the next gradient. Without DDP the same pruning acts
    on the one process's gradient, so that its effect on learning can be studied on one machine. Logs ``prune_rate``,
    ``step_seconds``, ``exposed_seconds`` (waiting for the network), ``bandwidth_mbit``; on a CPU ``packing_seconds`` (selecting,
    summing).

    Args:
        policy: Who decides the rate: ``Adaptive`` (default), ``PublishedRule``, ``FixedRate``, or your ``PruningPolicy``.
        warmup: Steps without pruning at the start; below 1, a share of the run's steps, whose number then has to be known.
        dense_format: Type of the values where everything is sent: ``float16``, or ``float32``, which is bitwise plain DDP.
        value_bits: Bits of a value where some entries are sent: 4 (a sign and three bits, a scale for each 256), or 16
            (bfloat16). What rounding takes off is kept for the next step, like what is not sent.
        error_feedback: Keep what is not sent for the next step. Without it, pruning at high rates loses most of the gradient.
        clip: Largest norm of a rank's own gradient before the exchange, times the root of the number of ranks; each bucket has
            its share by size. Null clips nothing. The Trainer's ``gradient_clip_val`` acts on the mean, after it.
        momentum: Factor of momentum correction (Deep Gradient Compression) for an optimizer without momentum; 0 for none.
        dense_below: Parameters with fewer entries, and those of one dimension, are always sent whole.
        at_checkpoint: What becomes of what was not sent yet: ``flush`` sends everything in the step before a checkpoint and in
            the one after it; ``save`` writes a file a rank beside the run, for the last two checkpoints; ``drop`` loses it.
        check_every: Compare all ranks' weights every so many steps, and stop where they differ; 0 never does. For debugging.

    Raises:
        InputError: If a value is out of range; at the start of training, if the strategy, the precision or manual
            optimisation does not allow it, or if ``warmup`` is a share of a run of unknown length; after the first step, if the
            module exchanges its gradients by itself.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientPruning(warmup=100)])
    """

    def __init__(
        self,
        policy: PruningPolicy | None = None,
        *,
        warmup: float = 0.05,
        dense_format: DenseFormat = "float16",
        value_bits: ValueBits = 4,
        error_feedback: bool = True,
        clip: float | None = None,
        momentum: float = 0.0,
        dense_below: int = 2048,
        at_checkpoint: AtCheckpoint = "flush",
        check_every: int = 0,
    ) -> None:
        if warmup < 0 or (warmup > 1 and warmup != int(warmup)):
            raise InputError(f"warmup={warmup}: legal is a share of the run from 0 to below 1, or a whole number of steps.")
        if dense_format not in ("float16", "float32"):
            raise InputError(f"dense_format={dense_format!r} is unknown. Legal: float16, float32.")
        if value_bits not in (4, 16):
            raise InputError(f"value_bits={value_bits} is unknown. Legal: 4, 16.")
        if clip is not None and clip <= 0:
            raise InputError(f"clip={clip} leaves nothing. Legal: above 0, or null.")
        if not 0 <= momentum < 1:
            raise InputError(f"momentum={momentum} is no factor of momentum. Legal: 0 to below 1.")
        if dense_below < 0 or check_every < 0:
            raise InputError(f"dense_below={dense_below}, check_every={check_every}: legal is 0 or more of each.")
        self.policy = policy or Adaptive()
        self.warmup = warmup
        self.settings: dict[str, Any] = {
            "dense_format": dense_format,
            "value_bits": value_bits,
            "error_feedback": error_feedback,
            "clip": clip,
            "momentum": momentum,
            "dense_below": dense_below,
        }
        if at_checkpoint not in ("flush", "save", "drop"):
            raise InputError(f"at_checkpoint={at_checkpoint!r} is unknown. Legal: flush, save, drop.")
        self.at_checkpoint, self.check_every = at_checkpoint, check_every
        self.exchange: GradientExchange | None = None
        self._unused_policy = copy.deepcopy(vars(self.policy))
        self._begin_anew()
        self._batch_begin = 0.0
        self._seconds = 0.0  # of the step's batches that are over
        self._hooked: DistributedDataParallel | None = None

    def _begin_anew(self) -> None:
        self.rate: float | None = None  # None in the warm-up
        self.warmup_rate = 0.0
        self._kept_back = KeptBackFiles()
        self._resumed: Path | None = None
        self._losses: list[Tensor] = []
        self._numbers: Tensor | None = None
        self._gathered: tuple[Any, list[Tensor]] | None = None

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"GradientPruning does not work with strategy={type(strategy).__name__}: it needs whole gradients on every rank, "
                "which FSDP and its like never have. Legal: ddp, or one device."
            )
        if not pl_module.automatic_optimization:
            raise InputError(
                "GradientPruning does not work with manual optimisation (automatic_optimization=False): it could not tell an "
                "optimizer step from another backward pass."
            )
        if getattr(pl_module, "phase", None) == "split":
            raise InputError(
                "GradientPruning does not work with phase: split: the owner's gradients come after it. Leave it out."
            )
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            raise InputError(
                "GradientPruning does not work with precision=16-mixed: what is kept back would be in the units of another loss "
                "scale. Use bf16-mixed."
            )
        if not trainer.global_step:  # else the same Trainer goes on; a checkpoint is loaded later
            vars(self.policy).update(copy.deepcopy(self._unused_policy))
            self._begin_anew()
        self._kept_back.run = trainer.strategy.broadcast(secrets.token_hex(4))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the exchange into DDP's backward pass."""
        self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        model = trainer.strategy.model if isinstance(trainer.strategy.model, DistributedDataParallel) else None
        some_unused = model is not None and (model.find_unused_parameters or model.static_graph)
        self.exchange = GradientExchange(names, **self.settings, some_unused=some_unused)
        if self._resumed is not None:
            self.exchange.load(self._resumed, pl_module.device)
            self._resumed = None
        self.parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self.entries = sum(parameter.numel() for parameter in self.parameters)
        self.bytes_at = self.exchange.bytes_at(list(self.parameters))
        if model is not None and model is not self._hooked:
            # Lightning registers hooks on CUDA alone and ignores them elsewhere.
            model.register_comm_hook(self, _hook)
            self._hooked = model
            leave_group_at_exit()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how long the run is, and prepare its first step."""
        total = trainer.estimated_stepping_batches  # in on_fit_start it would lose a checkpoint's place in the data
        self.total_steps = max(0, int(total)) if math.isfinite(total) else 0  # -1: epochs of unknown length
        if 0 < self.warmup < 1 and not self.total_steps:
            raise InputError(
                f"warmup={self.warmup} is a share of the run's steps, but nothing says how many there will be. Legal here: a "
                "number of steps, as in GradientPruning(warmup=100), or 0 for no warm-up. Or set the Trainer's max_steps."
            )
        self.warmup_steps = int(self.warmup if self.warmup >= 1 else self.warmup * self.total_steps)
        self._prepare_step(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; begin anew where the module trains other weights than before, as a next stage of fusion does."""
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        if len(trained) != len(self.parameters) or any(one is not other for one, other in zip(trained, self.parameters)):
            self._attach(trainer, pl_module)
            self._prepare_step(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            assert self.exchange is not None
            self.exchange.clock.restart()
            self._seconds = 0.0
        self._batch_begin = time.perf_counter()

    # One step

    def _prepare_step(self, trainer: Trainer) -> None:
        assert self.exchange is not None
        step = trainer.global_step
        if self.rate is None and step >= self.warmup_steps:
            self.rate = self.policy.start()
        exchange = self.exchange
        exchange.rate = self.warmup_rate if self.rate is None else self.rate
        exchange.turn = step
        # The step after a checkpoint too: a run that goes on begins with the buckets that DDP has before its first step, and
        # only an exchange of everything gives the same numbers in any buckets.
        near = self._saves_after(trainer, step) or self._saves_after(trainer, step - 1)
        exchange.flush = self.at_checkpoint == "flush" and near

    def _saves_after(self, trainer: Trainer, step: int) -> bool:
        """Whether the step of this number, counted from 0, ends in a checkpoint, or ends the run."""
        if step < 0:
            return False
        done = step + 1
        if trainer.max_steps == done or done == trainer.estimated_stepping_batches:
            return True
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, NewestCheckpoint) and done % callback.every_n_train_steps == 0:
                return True
            if not isinstance(callback, ModelCheckpoint):
                continue
            every = callback._every_n_train_steps
            if every and done % every == 0:
                return True
            epochs, batches = callback._every_n_epochs, trainer.num_training_batches
            if epochs and math.isfinite(batches) and done % (epochs * math.ceil(batches / trainer.accumulate_grad_batches)) == 0:
                return True
        return False

    def _on_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        assert self.exchange is not None
        if bucket.index() == 0:
            self._gather_numbers()
        return self.exchange.exchange(bucket.buffer(), bucket.parameters(), self.entries)

    def _gather_numbers(self) -> None:
        """Send the numbers of the step before along with this one's gradients; all ranks then decide on the same ones."""
        if self._numbers is None or self.exchange is None:
            return
        numbers, self._numbers = self._numbers, None
        parts = [torch.empty_like(numbers) for _ in range(self.exchange.ranks)]
        self._gathered = (dist.all_gather(parts, numbers, async_op=True), parts)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Without DDP: prune the gradient of this process."""
        exchange = self.exchange
        if exchange is None or isinstance(trainer.strategy.model, DistributedDataParallel):
            return
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        changes = exchange.rate or exchange.residuals or exchange.clip is not None or exchange.momentum
        if not changes or not parameters:
            return
        buffer = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])  # type: ignore[union-attr]
        exchange.exchange(buffer, list(parameters), self.entries).wait()
        begin = 0
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(buffer[begin : begin + parameter.numel()].view_as(parameter))
            begin += parameter.numel()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: take the decision for the next one."""
        exchange = self.exchange
        assert exchange is not None
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._losses.append(loss.detach().float() * trainer.accumulate_grad_batches)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            self._seconds += time.perf_counter() - self._batch_begin
            return
        if exchange.ranks > 1 and not exchange.clock.bytes:
            raise InputError(
                f"GradientPruning has nothing to send: {type(pl_module).__name__} exchanges its gradients by itself, as "
                "MultiTask with an aggregator does. Leave the callback out, or combine losses by a scalarizer or by "
                "FeatureWeighting."
            )
        mean = float(torch.stack(self._losses).mean()) if self._losses else float("nan")
        self._losses.clear()
        if (device := pl_module.device).type == "cuda":
            torch.cuda.synchronize(device)
            exchange.at_work.clear()
        seconds = self._seconds + time.perf_counter() - self._batch_begin
        busy, exposed = exchange.clock.times()
        packing = exchange.clock.packing if device.type == "cpu" else 0.0
        numbers = [mean, seconds, exposed, busy, exchange.clock.bytes, 0.0 if exchange.flush else exchange.rate, packing]
        own = torch.tensor(numbers, device=device, dtype=torch.float64)
        measurement = None
        if exchange.ranks == 1:
            measurement = Measurement.of_ranks([own], trainer.global_step, self.total_steps)
        elif self._gathered is not None:
            work, parts = self._gathered
            work.wait()
            self._gathered = None
            measurement = Measurement.of_ranks(parts, trainer.global_step - 1, self.total_steps)
        # What a checkpoint cannot hold of the other ranks is left out of an uninterrupted run as well.
        self._numbers = None if self._saves_after(trainer, trainer.global_step - 1) else own
        if measurement is not None:
            if self.rate is not None:
                self.rate = self.policy.decide(measurement, self.bytes_at)
            else:
                self.warmup_rate = self.policy.warm_up(measurement, self.bytes_at)
            self._log(pl_module, measurement)
        if self.check_every and trainer.global_step % self.check_every == 0:
            self._check_replicas(trainer)
        self._prepare_step(trainer)

    def _log(self, pl_module: LightningModule, measurement: Measurement) -> None:
        pl_module.log("prune_rate", measurement.rate)
        pl_module.log("step_seconds", measurement.step_seconds)
        pl_module.log("exposed_seconds", measurement.exposed_seconds)
        if pl_module.device.type == "cpu":
            pl_module.log("packing_seconds", measurement.packing_seconds)
        if measurement.bandwidth is not None:
            pl_module.log("bandwidth_mbit", measurement.bandwidth * 8 / 1e6)

    def _check_replicas(self, trainer: Trainer) -> None:
        assert self.exchange is not None
        if self.exchange.ranks == 1:
            return
        own = torch.stack([parameter.detach().double().sum() for parameter in self.parameters])
        parts = [torch.empty_like(own) for _ in range(self.exchange.ranks)]
        dist.all_gather(parts, own)
        for rank, other in enumerate(parts):
            if not torch.equal(parts[0], other):
                raise RuntimeError(f"The weights of rank {rank} differ from those of rank 0 after step {trainer.global_step}.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in one message that another rank is gone.

        Raises:
            RankLost: If the exchange failed.
        """
        lost = isinstance(exception, RuntimeError) and any(word in str(exception) for word in _LOST)
        if self.exchange is not None and self.exchange.ranks > 1 and lost:
            raise RankLost(
                f"The exchange of gradients failed after step {trainer.global_step}: another rank has ended, or the network was "
                f"away for longer than the process group's timeout. Start all ranks again from the last checkpoint "
                f"(--ckpt_path last). Rank {self.exchange.rank} saw: {str(exception).splitlines()[0]}"
            ) from exception

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the rate and what the policy knows."""
        kind = type(self.policy).__name__
        return {"rate": self.rate, "warmup_rate": self.warmup_rate, "kind": kind, "policy": self.policy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rate and the policy of a checkpoint; another policy begins anew."""
        kind = type(self.policy).__name__
        if state_dict["kind"] != kind:
            log.warning("The checkpoint's policy was %s: %s begins anew.", state_dict["kind"], kind)
            return
        self.rate, self.warmup_rate = state_dict["rate"], state_dict["warmup_rate"]
        self.policy.load_state_dict(state_dict["policy"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what this rank keeps back, or say what is lost where a checkpoint comes unforeseen."""
        exchange = self.exchange
        if exchange is None or not exchange.residuals or exchange.flush:
            return
        if self.at_checkpoint == "save":
            self._kept_back.save(exchange, Path(trainer.default_root_dir), trainer.global_step, checkpoint)
        elif self.at_checkpoint == "flush" and trainer.is_global_zero:
            log.warning(
                "A checkpoint was saved that the callback did not foresee: what its ranks had not sent yet is not in it, and a "
                "run that goes on from it loses that."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find what this rank kept back.

        Raises:
            InputError: If its file is gone.
        """
        if trainer.state.fn != "fit" or not self._kept_back.has(checkpoint):
            return
        if self.at_checkpoint == "save":
            self._resumed = self._kept_back.find(checkpoint, trainer.global_rank)
        else:
            log.warning("at_checkpoint=%s: what ranks had not sent at the checkpoint is not read, and lost.", self.at_checkpoint)
