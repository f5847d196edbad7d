"""What a training would need, said before anything is loaded: memory of each device, time, and bytes between devices.

Models are made of their configs alone, with tensors that have shapes and no numbers; what the backward pass keeps is counted
while a batch is read. Time comes of the operations of a step, and of how fast this machine does those of two layers of the same
kind.
"""

import copy
import sys
import time
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.strategies import StrategyRegistry
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedModel

from ..datamodules.base import TokenDataModule
from ..errors import InputError, nearest
from ..modules.base import PretrainedModule, Rehearsal
from ..modules.linear_loss import default_chunk, linear_loss
from ..modules.precision import compute_device
from ..modules.pretrained import load_config
from .trainer import chosen_precision

_PROBED_OPERATIONS = {"cpu": 2 * 10**11, "cuda": 2 * 10**13}  # some seconds, or less
console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass
class Plan:
    """How a training would be spread, of the trainer's settings.

    Args:
        rows: Sequences a batch on each device.
        length: Tokens of a sequence at most.
        precision: Of the trainer.
        devices: Of all machines together.
        sharded: Whether weights, gradients and optimizer state are divided among them (FSDP), or each has all (DDP).
        accumulate: Batches of an optimizer step.
        steps: Optimizer steps; None where the trainer says none.
        device: ``cpu`` or ``cuda``.
    """

    rows: int
    length: int
    precision: str
    devices: int
    sharded: bool
    accumulate: int
    steps: int | None
    device: str = "cpu"

    @property
    def here(self) -> str:
        """Device on which times are measured: ``device``, where this machine has it."""
        return self.device if self.device == "cpu" else compute_device()

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of products; None where they have that of the weights."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)


@dataclass
class Need:
    """What one stage of a training needs, in bytes on each device, and in operations.

    Args:
        stage: Its name.
        trained: Parameters that are trained.
        weights: Bytes of weights.
        gradients: Bytes of gradients, with DDP's buckets.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes that are kept for the backward pass, with the loss's.
        operations: Floating-point operations of a step on each device.
        sent: Bytes that each device sends in a step.
        seconds: Of a step's operations, on this machine; 0 where that was not measured.
    """

    stage: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    operations: int
    sent: int
    seconds: float = 0.0

    @property
    def memory(self) -> int:
        """Bytes of all together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def needs(module: PretrainedModule, data: Any, plan: Plan) -> list[Need]:
    """Return what each stage of a training needs.

    Args:
        module: The system, whose models are not loaded.
        data: Its data module, which is not set up.
        plan: How it is spread.
    """
    stay = mock.patch.object(nn.Module, "to", lambda model, *to, **settings: model)  # such tensors cannot be moved, and need not
    with FakeTensorMode(), stay, torch.random.fork_rng(devices=[]):
        return [_need(stage, plan, module) for stage in module.rehearsals(data)]


def _need(stage: Rehearsal, plan: Plan, module: PretrainedModule) -> Need:
    weights = list(dict.fromkeys(weight for model in stage.models for weight in model.parameters()))
    trained = [weight for weight in weights if weight.requires_grad]
    frozen = sum(map(_bytes, weights)) - sum(map(_bytes, trained))
    with FlopCounterMode(display=False) as counter:
        activations = _kept_for_backward(stage, plan, module)
        _teach(stage, plan)
    activations += _kept_of_a_layer(stage, plan)
    optimizer = _optimizer_state(stage, trained)
    own = sum(map(_bytes, trained))
    share, whole = (plan.devices, _gathered(stage.models)) if plan.sharded else (1, 0)
    buckets = own if plan.devices > 1 and not plan.sharded else 0
    around = (plan.devices - 1) / plan.devices  # of what a ring sends
    return Need(
        stage.name,
        sum(weight.numel() for weight in trained),
        frozen + own // share + whole,
        own // share + whole + buckets,
        optimizer // share,
        activations,
        counter.get_total_flops() * plan.accumulate,
        int((3 if plan.sharded else 2) * around * own),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(models: list[nn.Module]) -> int:
    """Return the bytes that sharding gathers at a time: the largest layer, and what stands in none, such as the embedding."""
    layers = [layer for model in models for own in model.modules() if isinstance(own, nn.ModuleList) for layer in own]
    inside = {weight for layer in layers for weight in layer.parameters()}
    outside = {weight for model in models for weight in model.parameters()} - inside
    return max((sum(map(_bytes, layer.parameters())) for layer in layers), default=0) + sum(map(_bytes, outside))


def _kept_for_backward(stage: Rehearsal, plan: Plan, module: PretrainedModule) -> int:
    """Return the bytes that are kept when a batch is read, until the backward pass, which is then gone through."""
    with _precision("cpu", plan):
        kept, states = _kept(stage, _ids(plan))
        loss = states.float().sum()
        if stage.vocabulary:
            flat = states.flatten(0, -2)
            head = torch.empty(stage.vocabulary, flat.shape[-1], requires_grad=stage.head_trained)
            chunk = min(getattr(module, "loss_chunk_tokens", None) or default_chunk(plan.device), len(flat))
            loss = linear_loss(flat, head, torch.zeros(len(flat), dtype=torch.long), chunk_tokens=chunk).loss
            kept += 4 * 2 * chunk * stage.vocabulary  # logits, and their gradients
            kept += 4 * head.numel() if stage.head_trained else 0  # its gradient
            if plan.device == "cuda" and plan.autocast is not None:
                kept += (2 if stage.head_trained else 1) * 2 * head.numel()  # it, and a part of its gradient, in low precision
    loss.backward()
    return kept


def _teach(stage: Rehearsal, plan: Plan) -> None:
    """Let the teachers read a batch, as they do in training."""
    with torch.no_grad(), _precision("cpu", plan):
        for teacher in stage.teachers:
            teacher(input_ids=_ids(plan), use_cache=False)


def _kept_of_a_layer(stage: Rehearsal, plan: Plan) -> int:
    """Return the bytes that come to those of checkpoints in the backward pass, in which a layer at a time is read again."""
    parts = [part for model in stage.models for part in model.modules() if isinstance(part, PreTrainedModel)]
    checkpointed = [part for part in parts if part.is_activation_checkpointing]
    for model in checkpointed:
        model.activation_checkpointing_disable()
    with _precision("cpu", plan):
        return _kept(stage, _ids(plan))[0] // int(checkpointed[0].config.num_hidden_layers) if checkpointed else 0


def _ids(plan: Plan) -> Tensor:
    return torch.zeros(plan.rows, plan.length, dtype=torch.long)


def _kept(stage: Rehearsal, ids: Tensor) -> tuple[int, Tensor]:
    own = {tensor.untyped_storage()._cdata for model in stage.models for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = stage.read(ids)
    return sum(found.values()), states


def _precision(device: str, plan: Plan) -> torch.autocast:
    return torch.autocast(device, plan.autocast or torch.bfloat16, enabled=plan.autocast is not None)


def _optimizer_state(stage: Rehearsal, trained: list[nn.Parameter]) -> int:
    """Return the bytes that the optimizer remembers, as it does after a step."""
    optimizer = stage.optimizer(trained)
    for weight in trained:
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(map(_bytes, tensors))


def operations_per_second(config: Any, plan: Plan) -> float:
    """Measure how fast this machine trains two layers of a model, in floating-point operations a second.

    Args:
        config: The model's.
        plan: How it is trained.
    """
    device = plan.here
    small = copy.deepcopy(config.get_text_config())
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 2, 8, None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    dtype = torch.bfloat16 if plan.precision == "bf16-true" else torch.float32
    with torch.random.fork_rng(devices=[]):
        model: Any = AutoModel.from_config(small, dtype=dtype).to(device).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = min(plan.rows * plan.length, max(64, _PROBED_OPERATIONS[device] // (6 * parameters)))
    length = min(plan.length, tokens)
    ids = torch.zeros(tokens // length, length, dtype=torch.long, device=device)

    def step() -> None:
        with _precision(device, plan):
            loss = model(input_ids=ids, use_cache=False).last_hidden_state.float().mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        step()
    begin = time.perf_counter()
    step()
    return counter.get_total_flops() / (time.perf_counter() - begin)


def plan_of(trainer: Any, data: Any) -> Plan:
    """Return how a training is spread.

    Args:
        trainer: Settings of the Trainer, as parsed.
        data: The data module.
    """
    devices, strategy = trainer.get("devices"), trainer.get("strategy")
    if isinstance(devices, list) and devices:
        count = len(devices)
    elif str(devices) in ("auto", "-1", "None"):
        count = 1 if trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    elif str(devices).isdigit() and int(devices):
        count = int(devices)
    else:
        raise InputError(f"trainer.devices={devices!r} is no number of devices. Legal: 1 or more, a list of them, -1 or auto.")
    known = [*StrategyRegistry.available_strategies(), "auto"]
    if isinstance(strategy, str) and strategy not in known:
        raise InputError(f"trainer.strategy={strategy!r} is unknown.{nearest(strategy, known)}")
    kind = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", type(strategy).__name__))
    sharded = any(word in kind.lower() for word in ("fsdp", "modelparallel", "deepspeed"))
    steps, on_gpu = trainer.get("max_steps"), trainer.get("accelerator") in ("gpu", "cuda")
    return Plan(
        rows=data.batch_size,
        length=data.longest_sequence,
        precision=str(chosen_precision(trainer.get("precision"), trainer.get("accelerator")) or "32-true"),
        devices=count * int(trainer.get("num_nodes") or 1),
        sharded=sharded,
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        steps=steps if steps and steps > 0 else None,
        device="cuda" if on_gpu or (trainer.get("accelerator") != "cpu" and torch.cuda.is_available()) else "cpu",
    )


def show(module: Any, data: Any, trainer: Any) -> list[Need]:
    """Print what a training needs, and return what each stage needs.

    Args:
        module: The system.
        data: Its data module.
        trainer: Settings of the Trainer, as parsed.

    Raises:
        InputError: If system or data are of another kind than the suite's, or the Trainer could not train so.
    """
    for part, kind in ((module, PretrainedModule), (data, TokenDataModule)):
        if not isinstance(part, kind):
            raise InputError(f"--dry_run knows nothing of {type(part).__name__}, which is no {kind.__name__}. Leave it out.")
    plan = plan_of(trainer, data)
    if plan.sharded and (reason := module.why_not_sharded()):
        raise InputError(f"trainer.strategy={trainer.get('strategy')!r} splits the weights, and {reason}. Use ddp.")
    rate = operations_per_second(load_config(module.source.name), plan)
    found = [replace(need, seconds=need.operations / rate) for need in needs(module, data, plan)]
    table = Table(title="What each device needs", title_justify="left")
    for title in ("stage", "trained", "weights", "gradients", "optimizer", "activations", "memory", "a step", "sent a step"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for need in found:
        sizes = (need.weights, need.gradients, need.optimizer, need.activations, need.memory)
        unit, name = (2**30, "GiB") if need.memory >= 2**30 else (2**20, "MiB")
        said = [f"{size / unit:.2f} {name}" for size in sizes]
        table.add_row(need.stage, f"{need.trained:,}", *said, f"{need.seconds:.2f} s", f"{need.sent / unit:.2f} {name}")
    console.print(table)
    held = "weights divided among them" if plan.sharded else "each with all weights"
    spread = "one device" if plan.devices == 1 else f"{plan.devices} devices, {held}"
    longest = max(need.seconds for need in found)
    device = torch.cuda.get_device_name() if plan.here == "cuda" else "this machine's processor"
    console.print(
        f"{plan.rows} x {plan.length} tokens a batch, {plan.accumulate} batches a step, {plan.precision}, {spread}. Time: "
        f"without validation, the optimizer and the network, at the {rate / 1e9:,.1f} billion operations a second of {device}, "
        "measured on two layers.",
        highlight=False,
    )
    if plan.device == "cuda" and not torch.cuda.is_available():
        console.print("There is no GPU here: memory is that of the GPU asked for, time is not.", highlight=False)
    if plan.steps is not None:
        console.print(f"{plan.steps:,} steps: up to {_duration(plan.steps * longest)}.", highlight=False)
    return found


def _duration(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
