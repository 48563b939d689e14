"""The last few vectors of each sample, which accelerated methods combine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.basis import less, less_, room
from torchimplicit.precision import widened


class History(NamedTuple):
    """A ring buffer of vectors ``[batch, memory, dim]``, of which the first ``filled`` slots are in use. Each slot
    (``[:, i]``) is contiguous."""

    ring: Tensor
    filled: int

    @staticmethod
    def empty(like: Tensor, memory: int) -> History:
        """Room for ``memory`` vectors like the rows of ``like``; half precision is kept in float32."""
        return History(room(widened(like), memory), 0)

    @property
    def vectors(self) -> Tensor:
        """The stored vectors, ``[batch, filled, dim]``, in no particular order."""
        return self.ring[:, : self.filled]

    def beside(self, slot: int, vector: Tensor) -> Tensor:
        """The vector in ``slot`` and ``vector`` itself, ``[batch, 2, dim]``; the latter overwrites the next slot."""
        if self._out_of_place(vector):
            return torch.stack((self.ring[:, slot], vector), 1)
        self.ring[:, slot + 1] = vector
        return self.ring.narrow(1, slot, 2)

    def put(self, slot: int, vector: Tensor, over: Tensor | None = None) -> History:
        """Store ``vector`` (``[batch, dim]``), divided by ``over`` (``[batch, 1]``), in ``slot``; in place unless
        autograd records."""
        ring = self.ring
        if torch.is_grad_enabled():
            ring = ring.clone()  # autograd has saved the old ring for the backward pass
            ring[:, slot] = vector if over is None else vector / over
        elif over is None:
            ring[:, slot] = vector
        else:
            torch.div(vector, over, out=ring[:, slot])
        return History(ring, max(self.filled, slot + 1))

    def put_difference(self, slot: int, one: Tensor, other: Tensor, over: Tensor) -> History:
        """Store ``(one - other) / over`` in ``slot``, without a temporary vector where possible."""
        if self._out_of_place(one):
            return self.put(slot, widened(one - other), over)
        torch.sub(one, other, out=self.ring[:, slot]).div_(over)
        return History(self.ring, max(self.filled, slot + 1))

    def put_unit(self, slot: int, one: Tensor, other: Tensor, weight: Tensor | None) -> tuple[History, Tensor]:
        """Store ``weight * (one - other)`` in ``slot`` at unit length; returns its former length ``[batch, 1]`` too."""
        out_of_place = self._out_of_place(one)
        vector = widened(one - other) if out_of_place else torch.sub(one, other, out=self.ring[:, slot])
        if weight is not None:
            vector = vector * weight if out_of_place else vector.mul_(weight)
        # a vector of zeros keeps its length of (next to) zero instead of becoming NaN
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
        if out_of_place:
            return self.put(slot, vector, length), length
        vector.div_(length)
        return History(self.ring, max(self.filled, slot + 1)), length

    def put_less(self, slot: int, one: Tensor, factor: Tensor, weights: Tensor, basis: Tensor) -> History:
        """Store ``factor * one`` minus the sum of the vectors of ``basis`` (``[batch, k, dim]``) with ``weights``
        (``[batch, k]``); ``factor`` is ``[batch, 1]``."""
        if self._out_of_place(one):
            return self.put(slot, less(one * factor, weights, basis))
        less_(torch.mul(one, factor, out=self.ring[:, slot]), weights, basis)
        return History(self.ring, max(self.filled, slot + 1))

    def _out_of_place(self, vector: Tensor) -> bool:
        """Return whether the new entry cannot be computed in the ring itself."""
        return torch.is_grad_enabled() or vector.dtype != self.ring.dtype
