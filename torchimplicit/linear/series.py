"""The Neumann series in the common case, with the memory of a loop written by hand: the right-hand side and one
vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.base import LinearSolution
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.solution import Report


class Begun(NamedTuple):
    """A series that was broken off: the iterate ``[batch, dim]``, the steps of each sample, int64 ``[batch]``, and the
    number of products."""

    value: Tensor
    steps: Tensor
    products: int


def series(
    operator: LinearOperator, b: Tensor, *, damping: float, rtol: float, atol: float, max_steps: int
) -> LinearSolution | Begun | None:
    """Iterate :math:`y \\leftarrow y + \\lambda (b - Ay)` from zero, while the residual of every unsolved row falls in
    every step: then the latest iterate is the best one, and no other needs to be kept.

    Residuals are those of the whole operator at the iterate itself. A row that is solved stays where it is.

    Args:
        operator: A.
        b: right-hand sides, ``[batch, dim]``.
        damping: :math:`\\lambda`.
        rtol, atol: tolerances of each row.
        max_steps: the most steps.

    Returns:
        The solution. Where a residual did not fall, or where rows are coupled so that a solved row is no longer solved,
        the iterate from which the common loop goes on. ``None``, to leave everything to the common loop, for vectors
        that are not finite, or so small or large that their squares under- or overflow; a zero vector is among them,
        since its norm cannot be told from an underflow.
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
            # a row whose residual exceeds that of zero starts over from zero
            return Begun(y.where((norm < size)[:, None], 0.0), steps, products)
        if not left or products == max_steps:
            break
        if left < len(b):
            r = r.masked_fill_(~going[:, None], 0.0)
        y = torch.add(y, r, alpha=damping)
        del r  # only y is held while the next product is taken
    relative = norm / size.where(size > 0, 1.0)
    report = Report(going.to(torch.int64), steps, relative, float(products), condition=torch.zeros_like(size))
    return LinearSolution(y.clone() if y is b else y, report)
