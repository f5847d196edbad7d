"""A small model whose weights are made, whenever they are needed, by operators from the frozen weights of a large one.

It is the ``transformers`` model of the small config with its linear layers, embedding and head exchanged:

    small layer l, each matrix:  sum over j of  coefficient[l, j] * (out_operator_j @ W_j @ in_operator_j.T)

where j runs over the large layers that l sees. Norms are the small model's own, and start as the operators say.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..student import decoder_layers, shared_parts
from .layout import READS_RESIDUAL, WRITES_RESIDUAL, embedding_scale, fold_gains, gain, is_norm, linear_of, set_gain
from .operators import Dense, Operator, Selection, matrix_of
from .shape import FusionShape

_WRITTEN_BY = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "mlp.gate_proj": "neurons",
    "mlp.up_proj": "neurons",
}
_READ_BY = {"self_attn.o_proj": "attended", "mlp.down_proj": "activations"}


class FusionOperators(nn.Module):
    """The operators of a whole model; those that are absent leave a width as it is.

    Args:
        layers: For each large layer its operators by name: ``query``, ``key`` and ``value`` on what these projections write,
            ``attended`` on what the output projection reads, ``neurons`` on what gate and up projection write, ``activations``
            on what the down projection reads.
        residual: On the residual stream: on all that is written to it, and on embedding and head.
        reading: On what is read from the residual stream; None takes ``residual``.
    """

    def __init__(
        self, layers: Iterable[dict[str, nn.Module]], *, residual: nn.Module | None = None, reading: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict(by_name) for by_name in layers)
        self.residual = residual
        self.reading = residual if reading is None else reading

    def of(self, layer: int, name: str) -> tuple[Operator | None, Operator | None]:
        """Return the operators on what a projection of a large layer writes, and on what it reads."""
        own = dict(self.layers[layer].items())  # type: ignore[operator]
        if name in READS_RESIDUAL:
            written = _WRITTEN_BY[name]
            return own.get(written), self.reading  # type: ignore[return-value]
        read = _READ_BY[name]
        return self.residual, own.get(read)  # type: ignore[return-value]


class DepthCoefficients(nn.Module):
    """How much each large layer gives to a small one.

    Args:
        layers: Indices of the large layers that it sees.
        centre: The one that it starts as.
    """

    def __init__(self, layers: list[int], centre: int) -> None:
        super().__init__()
        self.layers = layers
        self.weight = nn.Parameter(torch.tensor([float(layer == centre) for layer in layers]))


@dataclass
class _Part:
    linear: nn.Linear
    out: Operator | None
    into: Operator | None

    def weight(self) -> Tensor:
        found = self.linear.weight if self.into is None else self.into.reduce(self.linear.weight)
        return found if self.out is None else self.out.reduce(found.T).T

    def bias(self) -> Tensor:
        return self.linear.bias if self.out is None else self.out.reduce(self.linear.bias)

    def product(self, tensor: Tensor) -> Tensor:
        wide = tensor if self.into is None else self.into.expand(tensor)
        found = functional.linear(wide, self.linear.weight, self.linear.bias)
        return found if self.out is None else self.out.reduce(found)

    def costs(self) -> tuple[int, int]:
        """Return the multiplications of making the small weight, and of a token through the large one."""
        out = self.out.cost() if self.out is not None else 0
        into = self.into.cost() if self.into is not None else 0
        large_out, large_in = self.linear.weight.shape
        small_in = large_in if self.into is None else self.into.small
        return large_out * into + small_in * out, into + large_in * large_out + out


class FusedLinear(nn.Module):
    """A projection of the small model.

    Small batches go through the operators and the large weight one after another, large ones through the small weight, which
    is made for them: whichever has fewer multiplications. A weight's making is not kept for the backward pass but done again.

    Args:
        parts: The large projections that it sees, with their operators.
        mix: Coefficients of the parts; None for a single one.
    """

    def __init__(self, parts: list[_Part], mix: DepthCoefficients | None) -> None:
        super().__init__()
        self._parts = parts  # in a list: the large weights are no part of this module, the operators belong to the model
        self._mix = [mix]
        self.out_features, self.in_features = _Part.weight(parts[0]).shape
        costs = [part.costs() for part in parts]
        self._making, self._through = sum(cost for cost, _ in costs), sum(cost for _, cost in costs)

    def _sum(self, terms: list[Tensor]) -> Tensor:
        mix = self._mix[0]
        if mix is None:
            return terms[0]
        return sum((share * term for share, term in zip(mix.weight, terms)), start=torch.zeros((), device=terms[0].device))

    def weight(self) -> Tensor:
        """Return the small weight [out, in]."""
        return self._sum([part.weight() for part in self._parts])

    def bias(self) -> Tensor | None:
        """Return the small bias [out], where the architecture has one."""
        return None if self._parts[0].linear.bias is None else self._sum([part.bias() for part in self._parts])

    def _centre(self) -> _Part:
        mix = self._mix[0]
        return self._parts[0 if mix is None else int(mix.weight.argmax())]

    def can_start_anywhere(self, frozen_too: bool) -> bool:
        """Whether ``start_at`` may be called: the operator on what is read is dense, or there is none at all.

        Args:
            frozen_too: Whether the frozen weight may be changed.
        """
        part = self._centre()
        return isinstance(part.into, Dense) or (frozen_too and part.into is None and part.out is None)

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Make this module's weight another, by its operator on what is read, or where it has none by the frozen weight itself.

        Args:
            weight: The one that it shall be [out, in].
        """
        part = self._centre()
        missing = (weight - self.weight()).double()
        if isinstance(part.into, Dense):
            wide = part.linear.weight.double()
            rows = wide if part.out is None else part.out.reduce(wide.T).T
            # The smallest change of the operator whose product with the rows is what is missing.
            change = rows.T @ torch.linalg.solve(rows @ rows.T, missing)
            part.into.weight.add_(change.T)
        else:
            part.linear.weight.add_(missing)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the projection [..., out] of a tensor [..., in]."""
        tokens = tensor.numel() // tensor.shape[-1]
        if tokens * self._through < self._making + tokens * self.out_features * self.in_features:
            return self._sum([part.product(tensor) for part in self._parts])
        weight = checkpoint(self.weight, use_reentrant=False) if torch.is_grad_enabled() else self.weight()
        return functional.linear(tensor, weight, self.bias())


class FusedTable(nn.Module):
    """The embedding or the head of the small model: the large one's table of tokens, behind the residual operator.

    A batch goes through the operator and never needs the small table.

    Args:
        large: The large model's embedding or head.
        operator: On the residual stream.
        scale: By how much the small table is larger than the operator makes it.
    """

    bias = None

    def __init__(self, large: nn.Module, operator: Operator | None, scale: float) -> None:
        super().__init__()
        self._large, self._operator, self._scale = [large], [operator], scale
        self.is_embedding = isinstance(large, nn.Embedding)

    @property
    def weight(self) -> Tensor:
        """The large table [vocabulary, large hidden size], whose product with ``expand``'s states gives the logits."""
        return self._large[0].weight  # type: ignore[return-value]

    def small_weight(self) -> Tensor:
        """Return the small table [vocabulary, hidden size]."""
        operator = self._operator[0]
        return self.weight if operator is None else operator.reduce(self.weight) * self._scale

    def expand(self, states: Tensor) -> Tensor:
        """Return final hidden states [..., hidden size] as ones that the large head reads [..., large hidden size]."""
        operator = self._operator[0]
        return states if operator is None else operator.expand(states) * self._scale

    def forward(self, tensor: Tensor) -> Tensor:
        """Return embeddings [..., hidden size] of token ids [...], or logits [..., vocabulary] of states [..., hidden size]."""
        if not self.is_embedding:
            return functional.linear(self.expand(tensor), self.weight)
        wide, operator = self._large[0](tensor), self._operator[0]
        return wide if operator is None else operator.reduce(wide)


def fuse(
    large: PreTrainedModel,
    shape: FusionShape,
    operators: FusionOperators,
    *,
    centres: list[int] | None = None,
    field: int = 0,
) -> PreTrainedModel:
    """Return the small model that operators make of a large one; only operators, coefficients and norms can be trained.

    Args:
        large: The large model; it is frozen, and must live as long as the small one. Where the residual operator mixes
            or layers are mixed, the gains of its norms are folded into the projections behind them, which changes no number
            that it computes.
        shape: Of the small model, all sizes filled in.
        operators: Of the large model's widths.
        centres: For each small layer the large one that it starts as, rising; None for all layers as they are.
        field: Receptive field in depth: a small layer sees the large layers up to this far from its centre; the first and the
            last, and those that ``shape.kept_layers`` keeps, see their centre alone.
    """
    large.requires_grad_(False)
    if field or not (operators.residual is None or isinstance(operators.residual, Selection)):
        fold_gains(large)
    sources = decoder_layers(large)
    centres = list(range(len(sources))) if centres is None else centres
    config = shape.config(large.config, centres)
    small = _skeleton(config, large)
    residual = operators.to(large.device).residual
    used: set[int] = set()
    for place, (layer, centre) in enumerate(zip(decoder_layers(small), centres)):
        reach = field if max(1, shape.kept_layers) <= place < len(centres) - 1 else 0
        seen = list(range(max(0, centre - reach), min(len(sources), centre + reach + 1)))
        used |= set(seen)
        mix = DepthCoefficients(seen, centre).to(large.device) if len(seen) > 1 else None
        if mix is not None:
            layer.depth_coefficients = mix
        for name in (*READS_RESIDUAL, *WRITES_RESIDUAL):
            parts = [_Part(sources[j].get_submodule(name), *operators.of(j, name)) for j in seen]  # type: ignore[arg-type]
            layer.set_submodule(name, FusedLinear(parts, mix))
        for name, norm in layer.named_modules():
            if is_norm(norm):
                within_heads = name.startswith("self_attn")
                _start_norm(norm, sources[centre].get_submodule(name), None if within_heads else residual)
    base, original = small.base_model, large.base_model
    _start_norm(base.norm, original.norm, residual)  # type: ignore[arg-type]
    scale = embedding_scale(large) / embedding_scale(small)
    if residual is not None and scale != 1:
        set_gain(base.norm, gain(base.norm) / scale)  # type: ignore[arg-type]
    base.embed_tokens = FusedTable(original.embed_tokens, residual, scale)  # type: ignore[arg-type]
    small.lm_head = FusedTable(large.get_output_embeddings(), residual, scale)  # type: ignore[arg-type]
    if shape.kept_layers:
        for kept in shared_parts(small, shape.kept_layers):
            kept.requires_grad_(False)
    for unused in set(range(len(sources))) - used:
        operators.layers[unused].requires_grad_(False)
    small.operators = operators
    return small


def _skeleton(config: Any, large: PreTrainedModel) -> PreTrainedModel:
    """Return the small model with everything but its norms to be exchanged, so with hardly any weights."""
    spare = copy.deepcopy(config)
    sizes = {"vocab_size": 1, "intermediate_size": 1, "pad_token_id": None}
    kept = {name: getattr(spare, name) for name in sizes}
    for name, size in sizes.items():
        setattr(spare, name, size)
    model = AutoModelForCausalLM.from_config(spare, dtype=large.dtype, attn_implementation=large.config._attn_implementation)
    for name, size in kept.items():
        setattr(model.config, name, size)
    for module in (model, model.base_model):
        if hasattr(module, "vocab_size"):
            module.vocab_size = config.vocab_size
    return model.to(large.device)


def _start_norm(norm: nn.Module, large: nn.Module, residual: Any) -> None:
    """Give a small norm the gain that is nearest to the large one's seen through the residual operator."""
    if residual is None or isinstance(residual, Selection):
        weight = large.weight.detach()  # type: ignore[operator]
        norm.weight.data.copy_(weight if residual is None else residual.reduce(weight))  # type: ignore[operator]
        return
    matrix = matrix_of(residual)
    # The norm of a vector is about kept, so its root mean square over fewer dimensions is larger.
    set_gain(norm, (matrix * gain(large) @ matrix.T).diagonal() * math.sqrt(residual.large / residual.small))


@torch.no_grad()
def materialise(fused: PreTrainedModel) -> PreTrainedModel:
    """Return the plain small model of the same numbers.

    Args:
        fused: As ``fuse`` returns it, trained or not.
    """
    plain = AutoModelForCausalLM.from_config(
        fused.config, dtype=fused.dtype, attn_implementation=fused.config._attn_implementation
    ).to(fused.device)
    for name, module in fused.named_modules():
        if isinstance(module, FusedLinear):
            linear = linear_of(plain, name)
            linear.weight.copy_(module.weight())
            if (bias := module.bias()) is not None:
                linear.bias.copy_(bias)
        elif isinstance(module, FusedTable) and (module.is_embedding or not fused.config.tie_word_embeddings):
            plain.get_submodule(name).weight.copy_(module.small_weight())
        elif is_norm(module):
            plain.get_submodule(name).weight.copy_(module.weight)
    return plain.train(fused.training)
