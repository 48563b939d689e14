"""Vectors of each row that every step combines: how they lie in memory, and the products with them.

They are passed over as seldom as may be, since for states of some thousands of numbers that is what a step costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 400
"""Batched products of matrices that have fewer numbers are slow on CPUs."""


def room(like: Tensor, capacity: int) -> Tensor:
    """Memory for ``capacity`` vectors like the rows of ``like``: ``[rows, capacity, dim]``, each ``[:, i]`` being
    contiguous, so that it is read and written as the state is."""
    return like.new_empty(capacity, *like.shape).transpose(0, 1)


def inner(basis: Tensor, v: Tensor) -> Tensor:
    """The inner products, ``[rows, k]``, of ``v`` (``[rows, dim]``) with ``basis`` (``[rows, k, dim]``)."""
    if basis.shape[1] * basis.shape[2] < _SMALL:
        return (basis * v.unsqueeze(1)).sum(-1)
    return torch.bmm(v.unsqueeze(1), basis.mT).squeeze(1)


def less(v: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """``v`` without the sum of the vectors of ``basis`` times ``weights`` (``[rows, k]``)."""
    count = basis.shape[1]
    if count * basis.shape[2] >= _SMALL:
        weights = weights.contiguous()  # or else the products are taken one by one
        return torch.baddbmm(v.unsqueeze(1), weights.unsqueeze(1), basis, alpha=-1).squeeze(1)
    if count > 3:
        return v - (basis * weights.unsqueeze(2)).sum(1)
    for i in range(count):
        v = torch.addcmul(v, weights.narrow(1, i, 1), basis.select(1, i), value=-1)
    return v
