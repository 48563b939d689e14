"""Matrix-free equilibration: diagonal scalings that give the rows and columns of a matrix about the same norm."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator, Product

ROUNDS, PROBES = 5, 3
"""How often the norms of rows and columns are estimated, and by how many random vectors each time."""


@torch.no_grad()
def equilibrated(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    """Diagonals :math:`D_l, D_r`, ``[batch, dim]``, for which the rows and columns of :math:`D_lAD_r` have norms of
    about one (Bradley and Murray 2011).

    Norms are estimated by products with random signs, the same ones in every call, in up to ``2 * ROUNDS * PROBES``
    products. The diagonals are powers of two, so that scaling rounds nothing. For a symmetric operator both are the
    same tensor; without a transposed product only the rows are scaled.
    """
    left = torch.ones(operator.batch, operator.dim, dtype=operator.dtype, device=operator.device)
    right, flipped = left, operator.transposed_product
    # signs from a chaotic sequence instead of a generator, whose state belongs to the user
    number = torch.arange(1, PROBES * operator.dim + 1, dtype=torch.float64, device=operator.device)
    signs = torch.sin(number.square()).sign().reshape(PROBES, operator.dim).to(operator.dtype)

    def sizes(product: Product, first: Tensor, last: Tensor) -> Tensor:
        square = torch.stack([(last * product(first * v)).square() for v in signs]).mean(dim=0)
        return torch.where((square > 0) & (square < torch.inf), square, 1).sqrt()

    for _ in range(ROUNDS):
        if operator.symmetric:
            left = right = left / sizes(operator.product, right, left).sqrt()
            continue
        left = left / sizes(operator.product, right, left)
        if flipped is not None:
            right = right / sizes(flipped, left, right)
    left = torch.exp2(left.log2().round())
    return left, left if operator.symmetric else torch.exp2(right.log2().round())
