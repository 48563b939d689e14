"""The last few vectors of each sample, which the accelerated methods combine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.precision import widened


class History(NamedTuple):
    """A ring of vectors ``[batch, memory, dim]``, of which the first ``filled`` slots hold something."""

    ring: Tensor
    filled: int

    @staticmethod
    def empty(like: Tensor, memory: int) -> History:
        """Room for ``memory`` vectors like the rows of ``like``; half precision is kept in float32."""
        ring = widened(like).new_empty(like.shape[0], memory, like.shape[1])
        return History(ring, 0)

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
