"""Small bases of vectors per row: how they lie in memory, and products with them.

For states of some thousands of numbers the cost of a step is the number of passes over these vectors, so each helper
makes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 400
"""Below this many numbers a batched matrix product is slower on CPUs than an elementwise one."""


def room(like: Tensor, capacity: int) -> Tensor:
    """Uninitialized memory for ``capacity`` vectors like the rows of ``like``: ``[rows, capacity, dim]``, with each
    ``[:, i]`` contiguous like the state, so that it is read and written in one piece."""
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
        weights = weights.contiguous()  # otherwise baddbmm falls back to one product per row
        return torch.baddbmm(v.unsqueeze(1), weights.unsqueeze(1), basis, alpha=-1).squeeze(1)
    if count > 3:
        return v - (basis * weights.unsqueeze(2)).sum(1)
    for i in range(count):
        v = torch.addcmul(v, weights.narrow(1, i, 1), basis.select(1, i), value=-1)
    return v


def less_(v: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """:func:`less` in the place of ``v``."""
    count = basis.shape[1]
    if count == 1:
        return v.addcmul_(weights, basis.select(1, 0), value=-1)
    if count * basis.shape[2] < _SMALL:
        return v.sub_((basis * weights.unsqueeze(2)).sum(1))
    v.unsqueeze(1).baddbmm_(weights.contiguous().unsqueeze(1), basis, alpha=-1)
    return v
