"""Units in which the rows and columns of a matrix are of one size, found by a few products."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator, Product

ROUNDS, PROBES = 5, 3
"""How often the sizes of rows and columns are measured, and by how many random vectors each time."""


@torch.no_grad()
def equilibrated(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    """Diagonals :math:`D_l, D_r`, ``[batch, dim]``, with which the rows and columns of :math:`D_lAD_r` have norms of
    about one (Bradley and Murray 2011): those of a random vector's image, in the mean. They are powers of two, and one
    and the same where the operator is symmetric; of one without its transpose the rows alone are measured. The vectors
    are the same in every call. It takes up to ``2 * ROUNDS * PROBES`` products.
    """
    left = torch.ones(operator.batch, operator.dim, dtype=operator.dtype, device=operator.device)
    right, flipped = left, operator.transposed_product
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
