"""Broyden's method with a low-rank inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.precision import widened
from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.history import History
from torchimplicit.validation import check_count


class InverseEstimate(NamedTuple):
    """:math:`G = I + \\sum_j u_j v_j^T`, per sample: an estimate of :math:`A^{-1}`, so that the step is :math:`G r`.

    :math:`A=\\partial R/\\partial z` and :math:`r=-R`, as in :class:`~torchimplicit.problems.system.System`.
    """

    u: History
    v: History

    def times(self, rs: Tensor) -> Tensor:
        """:math:`G r` for ``[batch, k, dim]``."""
        return self._apply(self.u, self.v, rs)

    def transposed_times(self, rs: Tensor) -> Tensor:
        """:math:`G^T r` for ``[batch, k, dim]``."""
        return self._apply(self.v, self.u, rs)

    @staticmethod
    def _apply(left: History, right: History, rs: Tensor) -> Tensor:
        if not left.filled:
            return rs
        weights = torch.bmm(rs, right.vectors.transpose(1, 2))
        return torch.baddbmm(rs, weights, left.vectors)


class BroydenState(NamedTuple):
    """The step taken last, the residual from which it was taken, and the inverse."""

    move: Tensor
    residual: Tensor
    inverse: InverseEstimate


@final
@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method, with the inverse as a sum of rank-one updates (Broyden 1965).

    Starts from the plain step, and starts anew when the memory is full: dropping only the oldest updates was tried,
    and diverged on linear contractions.

    Args:
        memory: how many rank-one updates the inverse holds.
        rtol, atol, max_steps, keep_trajectory, check_every: see :class:`Solver`.
    """

    memory: int = 50

    def check(self) -> None:
        check_count(self, "memory")

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: BroydenState | None, progress: Progress) -> Move:
        z, residual = point.z, point.residual
        if state is None:
            inverse = InverseEstimate(History.empty(z, self.memory), History.empty(z, self.memory))
            return Move(z + residual, BroydenState(residual, residual, inverse))
        s, inverse, slot = state.move, state.inverse, state.inverse.u.filled
        if slot == self.memory:
            inverse = InverseEstimate(History(inverse.u.ring, 0), History(inverse.v.ring, 0))
            return Move(z + residual, BroydenState(residual, residual, inverse))
        # The secant condition: A s = -(r - r_last), so G+ y = -s with y = r - r_last.
        pair = widened(torch.stack((residual, residual - state.residual), dim=1))
        wide = widened(s)
        g, gy = inverse.times(pair).unbind(dim=1)
        left = inverse.transposed_times(wide[:, None])[:, 0]
        # Sherman-Morrison: G+ = G + u (G^T s)^T with u = -(s + G y) / (s.G y); no update where that is 0 / 0.
        along, ahead, square = ((wide * other).sum(dim=1, keepdim=True) for other in (gy, g, wide))
        safe = along.abs() > 1e-8 * square
        u = torch.where(safe, -(wide + gy) / torch.where(safe, along, 1), 0)
        move = torch.addcmul(g, u, ahead).to(z.dtype)
        inverse = InverseEstimate(inverse.u.put(slot, u), inverse.v.put(slot, left))
        return Move(z + move, BroydenState(move, residual, inverse))
