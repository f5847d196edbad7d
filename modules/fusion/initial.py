"""The operators that fusion starts with: the best selection, folded, and ready to be learnt away from."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError
from ..student import decoder_layers
from .fused import FusionOperators
from .layout import DOWN, OUTPUT, linear_of
from .operators import BlockLocal, Dense, HeadRotations, Selection
from .selection import WidthSelection, fold
from .shape import FusionShape, head_dim
from .statistics import Statistics

Form = Literal["dense", "block", "frozen"]


@dataclass(frozen=True)
class OperatorForms:
    """How much of each operator is learnt.

    ``dense`` learns every entry, ``block`` lets each of the small width see its own block of the large one, ``frozen`` keeps the
    selection and its fold. A width that stays as it is has no operator, unless ``residual`` is ``dense``.

    Args:
        residual: On the residual stream; None is ``dense`` where the hidden size changes.
        neurons: On the neurons of the MLPs.
        heads: On query, key and value heads; of queries and keys, what commutes with rotary embeddings. ``block`` is ``dense``
            for queries and keys.
        block_size: Of a block, at most this much of the large width.
    """

    residual: Form | None = None
    neurons: Form = "dense"
    heads: Form = "dense"
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.residual == "block":
            raise InputError(
                "operators.residual='block': the directions of the residual stream have no blocks. Legal: dense, frozen."
            )
        if self.block_size < 2:
            raise InputError(f"operators.block_size={self.block_size} mixes nothing. Legal: 2 or more.")


def initial_operators(
    model: PreTrainedModel,
    shape: FusionShape,
    selections: list[WidthSelection],
    statistics: Statistics | None,
    held_out: Statistics | None,
    forms: OperatorForms,
    *,
    folded: bool = True,
) -> FusionOperators:
    """Return the operators of the selection: one 1 in each row, and a least-squares fold on what is read behind it.

    Args:
        model: The large model.
        shape: Of the small model, all sizes filled in.
        selections: What is kept of each layer.
        statistics: Of calibration text; None leaves numbers open.
        held_out: Of other text, which chooses the folds' ridge.
        forms: How much of each is learnt.
        folded: Whether what is kept of a width makes up for the rest by least squares.
    """
    config = model.config
    size, measured = head_dim(config), statistics is not None
    cut_neurons = shape.intermediate_size != config.intermediate_size
    cut_heads = (shape.num_attention_heads, shape.num_key_value_heads) != (
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    layers: list[dict[str, nn.Module]] = []
    for place, (layer, kept) in enumerate(zip(decoder_layers(model), selections)):
        own: dict[str, nn.Module] = {}
        if cut_neurons:
            read = _reading(layer, DOWN, kept.neurons, "activations", place, statistics if folded else None, held_out)
            own["neurons"], own["activations"] = _pair(kept.neurons, read, forms.neurons, forms.block_size, folded, measured)
        if cut_heads:
            heads, groups = _dimensions(kept.heads, size), _dimensions(kept.groups, size)
            read = _reading(layer, OUTPUT, heads, "attended", place, statistics if folded else None, held_out)
            _, own["attended"] = _pair(heads, read, forms.heads, forms.block_size, folded, measured)
            if forms.heads == "frozen":
                own["query"], own["key"] = Selection(heads, read.shape[1]), Selection(groups, config.num_key_value_heads * size)
                own["value"] = Selection(groups, config.num_key_value_heads * size)
            else:
                own["query"] = HeadRotations(kept.heads, config.num_attention_heads, size)
                own["key"] = HeadRotations(kept.groups, config.num_key_value_heads, size)
                own["value"] = Dense(_one_hot(groups, config.num_key_value_heads * size))
        layers.append(own)
    return FusionOperators(layers, residual=_residual(model, shape, statistics, forms))


def empty_operators(model: PreTrainedModel, shape: FusionShape, forms: OperatorForms, *, folded: bool) -> FusionOperators:
    """Return operators of the same sizes and kinds as ``initial_operators``, whose numbers are to be loaded.

    Args:
        model: The large model.
        shape: Of the small model, all sizes filled in.
        forms: How much of each is learnt.
        folded: See ``initial_operators``.
    """
    sizes = (shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads)
    first = WidthSelection(*(torch.arange(size or 0) for size in sizes))
    return initial_operators(model, shape, [first] * len(decoder_layers(model)), None, None, forms, folded=folded)


def _dimensions(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _one_hot(kept: Tensor, large: int) -> Tensor:
    return nn.functional.one_hot(kept, large).float()


def _reading(
    layer: nn.Module,
    name: str,
    kept: Tensor,
    what: str,
    place: int,
    statistics: Statistics | None,
    held_out: Statistics | None,
) -> Tensor:
    weight = linear_of(layer, name).weight.detach()
    if statistics is None:
        return _one_hot(kept, weight.shape[1])
    other = None if held_out is None else getattr(held_out, what)[place]
    return fold(kept, weight, getattr(statistics, what)[place], other)


def _pair(kept: Tensor, read: Tensor, form: Form, block_size: int, folded: bool, measured: bool) -> tuple[nn.Module, nn.Module]:
    """Return the operators on what writes a width and on what reads it; where nothing was measured, blocks in any order."""
    large = read.shape[1]
    if form == "dense":
        return Dense(_one_hot(kept, large)), Dense(read)
    if form == "frozen":
        return Selection(kept, large), Dense(read).requires_grad_(False) if folded else Selection(kept, large)
    blocks = _blocks(len(kept), large, block_size)
    small_order, large_order = _block_orders(kept, read, blocks) if measured else (torch.arange(len(kept)), torch.arange(large))
    return tuple(BlockLocal(matrix, small_order, large_order, blocks) for matrix in (_one_hot(kept, large), read))  # type: ignore[return-value]


def _blocks(small: int, large: int, block_size: int) -> int:
    """Return the fewest blocks that divide both widths with at most ``block_size`` of the large one in each."""
    for blocks in range(-(-large // block_size), small + 1):
        if small % blocks == 0 and large % blocks == 0:
            return blocks
    raise InputError(
        f"operators.block_size={block_size}: a width of {large} fused to {small} has no common blocks that small. Give a larger "
        "block_size, or a size in the shape that has more divisors in common."
    )


def _block_orders(kept: Tensor, read: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Put each of the rest into the block of kept ones that stands for most of it, as long as there is room."""
    small, large = read.shape
    members = kept.view(blocks, -1).tolist()
    room = large // blocks
    rest = sorted(set(range(large)) - set(kept.tolist()))
    nearness = read.abs().view(blocks, small // blocks, large).sum(dim=1)[:, rest]  # [blocks, rest]
    for place in nearness.amax(dim=0).argsort(descending=True, stable=True).tolist():
        for block in nearness[:, place].argsort(descending=True, stable=True).tolist():
            if len(members[block]) < room:
                members[block].append(rest[place])
                break
    return torch.arange(small), torch.tensor(members).flatten()


def _residual(
    model: PreTrainedModel, shape: FusionShape, statistics: Statistics | None, forms: OperatorForms
) -> nn.Module | None:
    """Return the operator on the residual stream: its principal directions, or the dimensions with the most energy."""
    width, small = int(model.config.hidden_size), shape.hidden_size
    assert small is not None
    if small == width:
        return Dense(torch.eye(width, dtype=torch.float32)) if forms.residual == "dense" else None
    moments = torch.eye(width, dtype=torch.float64) if statistics is None else statistics.residual.sum.double()
    if forms.residual == "frozen":
        return Selection(moments.diagonal().argsort(descending=True, stable=True)[:small].sort().values, width)
    _, directions = torch.linalg.eigh(moments)
    return Dense(directions.flip(1)[:, :small].T.float())
