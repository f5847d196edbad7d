"""Optimizers for the command line's ``optimizer`` beside those of torch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from ..errors import InputError

_TABLE = 16  # a matrix this many times as long as wide is a vocabulary's table


class MuonAdamW(Optimizer):
    """Muon on matrices, AdamW on everything else: norms, coefficients, stacks of blocks, and the tables of a vocabulary.

    Muon (Jordan et al. 2024, torch's) makes every direction of a matrix's update equally large. That suits fusion's operators:
    they start as selections, whose entries move together under AdamW, so that a rate which teaches the rest breaks them.

    Args:
        params: Parameters to train; a matrix over 16 times as long as wide counts as a table.
        lr: Rate of the matrices: about how far a step turns one, since its spectral norm is near this.
        adamw_lr: Rate of everything else.
        weight_decay: Of both, decoupled.
        momentum: Of the matrices.

    Raises:
        InputError: If a rate or the weight decay is below 0, or there is nothing to train.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        adamw_lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise InputError(f"MuonAdamW: {name}={value} is below 0. Legal: 0 or more.")
        if not 0 <= momentum < 1:
            raise InputError(f"MuonAdamW: momentum={momentum}. Legal: 0 up to, not including, 1.")
        params = list(params)
        if not params:
            raise InputError("MuonAdamW: params is empty, so there is nothing to train.")
        self._rates: dict[str, float] = {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": params}], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: the matrices among them to Muon, the rest to AdamW.

        Args:
            param_group: ``params``, and where they differ ``lr``, ``adamw_lr``, ``weight_decay`` and ``momentum``; or a group
                that has all settings of Muon or of AdamW, as those of ``param_groups`` have.
        """
        if "ns_steps" in param_group or "betas" in param_group:
            super().add_param_group(param_group)
            self._share()
            return
        own = {**self._rates, **param_group}
        params = [own["params"]] if isinstance(own["params"], Tensor) else list(own["params"])
        matrices = [param for param in params if param.ndim == 2 and max(param.shape) <= _TABLE * min(param.shape)]
        chosen = {id(param) for param in matrices}
        rest = [param for param in params if id(param) not in chosen]
        if matrices:
            muon = Muon(matrices, lr=own["lr"], weight_decay=own["weight_decay"], momentum=own["momentum"])
            super().add_param_group(muon.param_groups[0])
        if rest:
            adamw = AdamW(rest, lr=own["adamw_lr"], weight_decay=own["weight_decay"], fused=True)
            super().add_param_group(adamw.param_groups[0])
        self._share()

    def _share(self) -> None:
        """Let torch's optimizers work on the groups and the state that schedules and checkpoints see."""
        self._parts: list[Optimizer] = []
        for group in self.param_groups:
            part = (Muon if "ns_steps" in group else AdamW)(group["params"])
            part.param_groups, part.state = [group], self.state
            self._parts.append(part)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over."""
        return {**super().__getstate__(), "_rates": self._rates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or copied state."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
