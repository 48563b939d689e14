"""The last few vectors of each sample, which the accelerated methods combine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.basis import room
from torchimplicit.precision import widened


class History(NamedTuple):
    """A ring of vectors ``[batch, memory, dim]``, of which the first ``filled`` slots hold something. Each slot
    (``[:, i]``) is contiguous."""

    ring: Tensor
    filled: int

    @staticmethod
    def empty(like: Tensor, memory: int) -> History:
        """Room for ``memory`` vectors like the rows of ``like``; half precision is kept in float32."""
        return History(room(widened(like), memory), 0)

    @property
    def vectors(self) -> Tensor:
        """What is held, ``[batch, filled, dim]``, in no particular order."""
        return self.ring[:, : self.filled]

    def put(self, slot: int, vector: Tensor, over: Tensor | None = None) -> History:
        """The history with ``vector`` (``[batch, dim]``), divided by ``over`` (``[batch, 1]``), in ``slot``; out of
        place where autograd looks on."""
        ring = self.ring
        if torch.is_grad_enabled():
            ring = ring.clone()
            ring[:, slot] = vector if over is None else vector / over
        elif over is None:
            ring[:, slot] = vector
        else:
            torch.div(vector, over, out=ring[:, slot])
        return History(ring, max(self.filled, slot + 1))

    def put_difference(self, slot: int, one: Tensor, other: Tensor, over: Tensor) -> History:
        """Likewise ``one - other``, without another vector in between."""
        if self._apart(one):
            return self.put(slot, widened(one - other), over)
        torch.sub(one, other, out=self.ring[:, slot]).div_(over)
        return History(self.ring, max(self.filled, slot + 1))

    def put_unit(self, slot: int, one: Tensor, other: Tensor, weight: Tensor | None) -> tuple[History, Tensor]:
        """Likewise ``one - other``, times ``weight`` where there is one, at unit length; and what its length was."""
        apart = self._apart(one)
        vector = widened(one - other) if apart else torch.sub(one, other, out=self.ring[:, slot])
        if weight is not None:
            vector = vector * weight if apart else vector.mul_(weight)
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
        if apart:
            return self.put(slot, vector, length), length
        vector.div_(length)
        return History(self.ring, max(self.filled, slot + 1)), length

    def _apart(self, vector: Tensor) -> bool:
        """Whether what is put here has to be computed elsewhere."""
        return torch.is_grad_enabled() or vector.dtype != self.ring.dtype
