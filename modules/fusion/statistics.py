"""What a large model does on calibration text: what selections and folds are made from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..linear_loss import linear_loss, shift_labels
from ..pretrained import head_weight
from ..student import decoder_layers
from .layout import DOWN, OUTPUT, READS_RESIDUAL, linear_of, norm_before


class Moments:
    """Second moments of a width, summed over tokens.

    Args:
        width: Its size.
        device: Where they are summed.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add tokens [..., width]."""
        flat = rows.detach().reshape(-1, rows.shape[-1]).float()
        self.sum.addmm_(flat.T, flat)
        self.tokens += len(flat)


@dataclass
class Statistics:
    """Second moments of a whole model's activations.

    Args:
        activations: Of what each layer's down projection reads [layers] of [intermediate size] squared.
        attended: Of what each layer's output projection of attention reads [layers] of [heads * head size] squared.
        residual: Of the residual stream as projections read it: every token divided by its root mean square, summed over all
            norms before a projection [hidden size] squared.
    """

    activations: list[Moments]
    attended: list[Moments]
    residual: Moments


Rows = list[dict[str, Tensor]]
Uses = list[tuple[nn.Module, Callable[[Tensor], None]]]


@contextmanager
def _watched(uses: Uses) -> Iterator[None]:
    """Hand the first input of modules to functions while the model reads."""

    def hook(use: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: use(args[0])

    handles = [module.register_forward_pre_hook(hook(use)) for module, use in uses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_of(batch: dict[str, Tensor]) -> Rows:
    """Return a batch's rows as batches of one, without their padding.

    Args:
        batch: ``input_ids``, ``position_ids`` and ``labels`` [rows, length]; ``lengths`` [rows] where there is padding.
    """
    names = ("input_ids", "position_ids", "labels")
    lengths = batch["lengths"].tolist() if "lengths" in batch else [batch["input_ids"].shape[1]] * len(batch["input_ids"])
    return [{name: batch[name][row : row + 1, :length] for name in names} for row, length in enumerate(lengths)]


@torch.no_grad()
def second_moments(model: PreTrainedModel, rows: Rows) -> Statistics:
    """Read calibration text once.

    Args:
        model: Of a supported architecture.
        rows: Of ``rows_of``.
    """
    layers, device = decoder_layers(model), model.device
    downs, outputs = ([linear_of(layer, name) for layer in layers] for name in (DOWN, OUTPUT))
    found = Statistics(
        [Moments(linear.in_features, device) for linear in downs],
        [Moments(linear.in_features, device) for linear in outputs],
        Moments(model.config.hidden_size, device),
    )

    def normalised(states: Tensor) -> None:
        wide = states.float()
        found.residual.add(wide * wide.square().mean(dim=-1, keepdim=True).add(1e-12).rsqrt())

    norms = [norm for layer in layers for norm in {norm_before(layer, name) for name in READS_RESIDUAL}]
    uses: Uses = [(norm, normalised) for norm in norms]
    uses += [(module, moments.add) for module, moments in zip(downs, found.activations)]
    uses += [(module, moments.add) for module, moments in zip(outputs, found.attended)]
    with _watched(uses):
        for row in track(rows, description="Statistics"):
            model.base_model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    return found


def taylor_scores(model: PreTrainedModel, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Return to first order what it costs to drop what the down and output projections read (Molchanov et al., 1906.10771).

    Args:
        model: Of a supported architecture.
        rows: Of ``rows_of``.

    Returns:
        For each layer the mean over tokens of ``|x * d loss / d x|``: of the down projection's inputs [intermediate size], and of
        the output projection's [heads * head size].
    """
    layers = decoder_layers(model)
    modules = [[linear_of(layer, name) for layer in layers] for name in (DOWN, OUTPUT)]
    scores = [
        [torch.zeros(linear.in_features, dtype=torch.float32, device=model.device) for linear in linears] for linears in modules
    ]

    def watch(score: Tensor) -> Callable[[Tensor], None]:
        def use(inputs: Tensor) -> None:
            values = inputs.detach()

            def add(gradient: Tensor) -> None:
                score.add_((values * gradient).abs().flatten(0, -2).sum(dim=0).float())

            inputs.register_hook(add)

        return use

    uses: Uses = [(module, watch(score)) for linears, own in zip(modules, scores) for module, score in zip(linears, own)]
    tokens = 0
    model.requires_grad_(False)  # the embedded text's gradient is all that is wanted
    with _watched(uses), torch.enable_grad():
        for one in track(rows, description="Taylor"):
            embedded = model.get_input_embeddings()(one["input_ids"]).detach().requires_grad_(True)
            states = model.base_model(inputs_embeds=embedded, position_ids=one["position_ids"], use_cache=False).last_hidden_state
            targets = shift_labels(one["labels"])
            here = targets != -100
            parts = linear_loss(states[here], head_weight(model).detach(), targets[here])
            (parts.loss * parts.tokens).backward()
            tokens += parts.tokens
    model.requires_grad_(True)
    return tuple([score / max(tokens, 1) for score in own] for own in scores)  # type: ignore[return-value]
