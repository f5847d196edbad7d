"""Linear maps between a large width and a small one: what fusion learns.

Seen from a weight [out, in] of the large model, the small one's is ``out_operator @ weight @ in_operator.T``, where an operator's
matrix is [small, large]. With one 1 in each row it selects; with more it fuses.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from ...errors import InputError


class Operator(Protocol):
    """A matrix [small, large], known by what it does to the last dimension of a tensor."""

    small: int
    large: int

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return ``tensor @ matrix.T``: [..., large] becomes [..., small]."""

    def expand(self, tensor: Tensor) -> Tensor:
        """Return ``tensor @ matrix``: [..., small] becomes [..., large]."""

    def cost(self) -> int:
        """Return the multiplications of one vector."""


class Selection(nn.Module):
    """The frozen operator that keeps some of the large width as they are: structured pruning.

    Args:
        indices: What each of the small width is of the large one [small].
        large: Size of the large width.
    """

    indices: Tensor

    def __init__(self, indices: Tensor, large: int) -> None:
        super().__init__()
        self.register_buffer("indices", indices.long())
        self.small, self.large = len(indices), large

    def reduce(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return tensor.index_select(-1, self.indices)

    def expand(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return tensor.new_zeros(*tensor.shape[:-1], self.large).index_copy(-1, self.indices, tensor)

    def cost(self) -> int:
        """See ``Operator``."""
        return 0


class Dense(nn.Module):
    """An operator whose every entry is learnt.

    Args:
        matrix: Where it starts [small, large].
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix.clone())
        self.small, self.large = matrix.shape

    def reduce(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return tensor @ self.weight.to(tensor.dtype).T

    def expand(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return tensor @ self.weight.to(tensor.dtype)

    def cost(self) -> int:
        """See ``Operator``."""
        return self.small * self.large


class BlockLocal(nn.Module):
    """An operator in which each of the small width sees only its own block of the large one.

    Args:
        matrix: Where it starts [small, large]; what lies outside of the blocks is lost.
        small_order: The small width's indices, block after block [small].
        large_order: The large width's indices, block after block [large].
        blocks: How many blocks there are; it divides both sizes.

    Raises:
        InputError: If it does not.
    """

    small_order: Tensor
    large_order: Tensor

    def __init__(self, matrix: Tensor, small_order: Tensor, large_order: Tensor, blocks: int) -> None:
        super().__init__()
        self.small, self.large = matrix.shape
        if blocks < 1 or self.small % blocks or self.large % blocks:
            raise InputError(f"{blocks} blocks do not divide a width of {self.large} fused to {self.small}.")
        small_order, large_order = (order.to(matrix.device, torch.long) for order in (small_order, large_order))
        self.register_buffer("small_order", small_order)
        self.register_buffer("large_order", large_order)
        ordered = matrix[small_order][:, large_order].view(blocks, self.small // blocks, blocks, self.large // blocks)
        self.weight = nn.Parameter(ordered.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone(memory_format=torch.contiguous_format))

    def reduce(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return self._in_blocks(tensor, self.large_order, self.small_order, "bsl,...bl->...bs")

    def expand(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        return self._in_blocks(tensor, self.small_order, self.large_order, "bsl,...bs->...bl")

    def _in_blocks(self, tensor: Tensor, order: Tensor, other: Tensor, product: str) -> Tensor:
        blocks = tensor.index_select(-1, order).unflatten(-1, (len(self.weight), -1))
        found = torch.einsum(product, self.weight.to(tensor.dtype), blocks).flatten(-2)
        return torch.empty_like(found).index_copy(-1, other, found)

    def cost(self) -> int:
        """See ``Operator``."""
        return self.weight.numel()


class HeadRotations(nn.Module):
    """An operator over query or key heads that commutes with rotary position embeddings.

    Rotary embeddings turn each pair of a head's dimensions (i, i + half) by an angle of its own; seen as a complex number, they
    multiply it. So a small head may be a sum of large heads, each pair times a complex number: it is turned and scaled, and never
    mixed with another pair.

    Args:
        heads: Which large head each small one starts as [small heads].
        large_heads: Heads of the large model.
        head_dim: Dimensions of a head, an even number.
    """

    def __init__(self, heads: Tensor, large_heads: int, head_dim: int) -> None:
        super().__init__()
        self.small, self.large = len(heads) * head_dim, large_heads * head_dim
        start = torch.zeros(2, len(heads), large_heads, head_dim // 2, dtype=torch.float32)  # real and imaginary parts
        start[0, torch.arange(len(heads)), heads] = 1.0
        self.weight = nn.Parameter(start)

    def reduce(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        real, imaginary = self.weight.to(tensor.dtype)
        first, second = tensor.unflatten(-1, (real.shape[1], 2, -1)).unbind(-2)
        turned = (
            torch.einsum("shp,...hp->...sp", real, first) - torch.einsum("shp,...hp->...sp", imaginary, second),
            torch.einsum("shp,...hp->...sp", real, second) + torch.einsum("shp,...hp->...sp", imaginary, first),
        )
        return torch.stack(turned, dim=-2).flatten(-3)

    def expand(self, tensor: Tensor) -> Tensor:
        """See ``Operator``."""
        real, imaginary = self.weight.to(tensor.dtype)
        first, second = tensor.unflatten(-1, (real.shape[0], 2, -1)).unbind(-2)
        turned = (
            torch.einsum("shp,...sp->...hp", real, first) + torch.einsum("shp,...sp->...hp", imaginary, second),
            torch.einsum("shp,...sp->...hp", real, second) - torch.einsum("shp,...sp->...hp", imaginary, first),
        )
        return torch.stack(turned, dim=-2).flatten(-3)

    def cost(self) -> int:
        """See ``Operator``."""
        return 2 * self.weight.numel()


def matrix_of(operator: Operator) -> Tensor:
    """Return an operator's matrix [small, large], float32."""
    device = next((tensor.device for tensor in (*operator.parameters(), *operator.buffers())), None)  # type: ignore[attr-defined]
    return operator.expand(torch.eye(operator.small, dtype=torch.float32, device=device))
