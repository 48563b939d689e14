"""Small bases of vectors per row: how they lie in memory, and products with them.

For states of some thousands of numbers the cost of a step is the number of passes over these vectors, so each helper
makes one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 6
"""Memory of a :class:`Basis` is allocated for this many vectors at a time."""

_COPIED = 2**16
"""Below this many bytes for all rows, vectors of a :class:`Basis` are small."""

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


class Basis(NamedTuple):
    """``filled`` vectors of each row.

    Large ones lie in several blocks of memory: to grow, or to lose rows, they are not copied, since both copies would
    be the most that a solve holds. Small ones lie in one block, which is quicker.
    """

    blocks: tuple[Tensor, ...]
    filled: int

    @staticmethod
    def empty(like: Tensor, most: int) -> Basis:
        """For vectors like the rows of ``like``, ``most`` at most."""
        return Basis((room(like, min(_BLOCK, most)),), 0)

    def slot(self, i: int) -> Tensor:
        """The ``i``-th vector, ``[rows, dim]``, in its place."""
        if len(self.blocks) == 1:
            return self.blocks[0].select(1, i)
        size = self.blocks[0].shape[1]
        return self.blocks[i // size].select(1, i % size)

    def longer(self) -> Basis:
        """With one vector more, which is yet to be written."""
        first, blocks = self.blocks[0], self.blocks
        if self.filled == len(blocks) * first.shape[1]:
            like = first.select(1, 0)
            # rows may have left since the vectors were large: what lies in several blocks stays so
            small = len(blocks) == 1 and like.numel() * like.element_size() < _COPIED
            more = room(like, (2 if small else 1) * first.shape[1])
            if small:
                more.narrow(1, 0, self.filled).copy_(first)
            blocks = (more,) if small else (*blocks, more)
        return Basis(blocks, self.filled + 1)

    def _filled(self) -> list[Tensor]:
        size = self.blocks[0].shape[1]
        return [block.narrow(1, 0, min(size, self.filled - i * size)) for i, block in enumerate(self.blocks)]

    def inner(self, v: Tensor) -> Tensor:
        """:func:`inner`, with all vectors."""
        if len(self.blocks) == 1:
            return inner(self.blocks[0].narrow(1, 0, self.filled), v)
        return torch.cat([inner(block, v) for block in self._filled()], 1)

    def less(self, v: Tensor, weights: Tensor) -> Tensor:
        """:func:`less`, by all vectors."""
        if len(self.blocks) == 1:
            return less(v, weights, self.blocks[0].narrow(1, 0, self.filled))
        blocks = self._filled()
        for block, part in zip(blocks, weights.split([block.shape[1] for block in blocks], 1), strict=True):
            v = less(v, part, block)
        return v

    def select(self, rows: Tensor) -> Basis:
        """Return the basis of the rows ``rows`` (ascending, int64 ``[k]``), moved within the same memory."""
        for i in range(self.filled):
            vector = self.slot(i)
            vector[: len(rows)] = vector.index_select(0, rows)
        return Basis(tuple(block.narrow(0, 0, len(rows)) for block in self.blocks), self.filled)
