"""The Neumann series where all goes well, in the memory of a loop written by hand: right-hand side and one vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.base import LinearSolution
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.solution import Report


class Begun(NamedTuple):
    """Where a series has come to, ``[batch, dim]``, in how many steps, int64 ``[batch]``, and in how many products."""

    value: Tensor
    steps: Tensor
    products: int


def series(
    operator: LinearOperator, b: Tensor, *, damping: float, rtol: float, atol: float, max_steps: int
) -> LinearSolution | Begun | None:
    """:math:`y \\leftarrow y + \\lambda (b - Ay)` from zero, all rows together, as long as the residual of every row
    that is not solved gets smaller in every step: the latest iterate is the best one then, and no other is kept.

    Every residual is that of the whole operator at the iterate itself. A row that is solved stays where it is.

    Returns:
        the solution; where a residual has not got smaller, or that of a row that was solved is none any more, since
        rows depend on each other, what the common loop is to go on from; ``None`` where that is to take it all, as for
        vectors that are not finite, or so small or large that their squares are not. Zero is
        among these, for it may be what a small one's squares come to.
    """
    size = norm = torch.linalg.vector_norm(b, dim=-1)
    tolerance = (rtol * size).add_(atol)
    least = torch.finfo(b.dtype).tiny ** 0.5 / max(rtol, torch.finfo(b.dtype).eps)
    going = size > tolerance
    left, odd = torch.stack((going, ~(size < 1 / least) | (size < least))).any(1).tolist()
    if odd:
        return None
    steps, products = torch.zeros_like(size, dtype=torch.int64), 0
    y = torch.zeros_like(b) if not left else b if damping == 1.0 else damping * b
    while left:
        steps += going
        products += 1
        r = b - operator.product(y)
        before, norm = norm, torch.linalg.vector_norm(r, dim=-1)
        above = norm > tolerance
        worse = torch.where(going, ~(norm < before), above)
        going = above
        left, odd = torch.stack((going, worse)).sum(1).tolist()
        if odd:
            # what has got worse than nothing begins anew
            return Begun(y.where((norm < size)[:, None], 0.0), steps, products)
        if not left or products == max_steps:
            break
        if left < len(b):
            r = r.masked_fill_(~going[:, None], 0.0)
        y = torch.add(y, r, alpha=damping)
        del r  # no vector but y is held while the next product is taken
    relative = norm / size.where(size > 0, 1.0)
    report = Report(going.to(torch.int64), steps, relative, float(products), condition=torch.zeros_like(size))
    return LinearSolution(y.clone() if y is b else y, report)
