"""Broyden's method with a low-rank inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.precision import UnitRows, safe_norm, widened
from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.history import History
from torchimplicit.validation import check_count


class InverseEstimate(NamedTuple):
    """:math:`G = \\gamma I + \\sum_j u_j v_j^T`, per sample: an estimate of :math:`A^{-1}`, so that the step is
    :math:`G r`.

    :math:`A=\\partial R/\\partial z` and :math:`r=-R`, as in :class:`~torchimplicit.problems.system.System`. ``None``
    for :math:`\\gamma`, ``[batch, 1, 1]``, stands for 1."""

    u: History
    v: History
    gamma: Tensor | None = None

    def times(self, rs: Tensor) -> Tensor:
        """:math:`G r` for ``[batch, k, dim]``."""
        return self._apply(rs, self.u, self.v)

    def transposed_times(self, rs: Tensor) -> Tensor:
        """:math:`G^T r` for ``[batch, k, dim]``."""
        return self._apply(rs, self.v, self.u)

    def _apply(self, rs: Tensor, left: History, right: History) -> Tensor:
        base = rs if self.gamma is None else self.gamma * rs
        if not left.filled:
            return base
        weights = torch.bmm(rs, right.vectors.transpose(1, 2))
        return torch.baddbmm(base, weights, left.vectors)


class BroydenState(NamedTuple):
    """The step :math:`s = G r` that was taken last, half precision kept in float32, and the inverse :math:`G`."""

    move: Tensor
    inverse: InverseEstimate


@final
@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method, with the inverse as a sum of rank-one updates (Broyden 1965).

    Starts from the plain step, for a root or a minimum from one in the problem's own units: :math:`\\gamma r` with
    :math:`|\\gamma|=\\lVert r\\rVert/\\lVert Ar\\rVert` and the sign of :math:`r^TAr`, by one product with the
    Jacobian. Starts anew when the memory is full: dropping only the oldest updates was tried, and diverged on linear
    contractions.

    Args:
        memory: how many rank-one updates the inverse holds.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.
    """

    memory: int = 50
    remembers: ClassVar[bool] = True

    def check(self) -> None:
        check_count(self, "memory")

    def start(self, point: Point) -> Any:
        return None

    def wants_product(self) -> bool:
        return True

    @staticmethod
    def _begun(point: Point, inverse: InverseEstimate) -> Move:
        move = inverse.times(widened(point.residual)[:, None])[:, 0]
        return Move(point.z + move.to(point.z.dtype), BroydenState(move, inverse))

    def step(self, evaluate: Evaluator, point: Point, state: BroydenState | None, progress: Progress) -> Move:
        z, residual = point.z, point.residual
        if state is None:
            room = max(1, min(self.memory, self.max_steps - 1))  # no more updates than there are steps
            inverse = InverseEstimate(History.empty(z, room), History.empty(z, room), unit_of(point))
            return self._begun(point, inverse)
        s, inverse, slot = state.move, state.inverse, state.inverse.u.filled
        if slot == self.memory:
            empty = InverseEstimate(History(inverse.u.ring, 0), History(inverse.v.ring, 0), inverse.gamma)
            return self._begun(point, empty)
        # The secant condition: A s = -(r - r_last), so G+ y = -s with y = r - r_last. The step was s = G r_last, so
        # that G y = g - s with g = G r, and one product with G gives both (Kelley 1995, section 7.3).
        g = inverse.times(widened(residual)[:, None])[:, 0]
        left = inverse.transposed_times(s[:, None])[:, 0]
        ahead, square = ((s * other).sum(dim=1, keepdim=True) for other in (g, s))
        # Sherman-Morrison: G+ = G + u (G^T s)^T with u = -(s + G y) / (s.G y) = g / gap; no update where that is 0 / 0.
        gap = square - ahead
        gap = torch.where(gap.abs() > 1e-8 * square, gap, torch.inf)
        move = torch.addcmul(g, g, ahead / gap)  # G+ r
        inverse = InverseEstimate(inverse.u.put(slot, g, gap), inverse.v.put(slot, left), inverse.gamma)
        return Move(z + move.to(z.dtype), BroydenState(move, inverse))


def unit_of(point: Point) -> Tensor | None:
    """:math:`\\gamma` at the first point; ``None`` where the residual is in the state's unit."""
    if point.product is None:
        return None
    r, image = UnitRows.of(widened(point.residual)), UnitRows.of(widened(point.product))  # squares would underflow
    unit = (image.factor / r.factor).squeeze(1)
    norm, state = torch.linalg.vector_norm(r.unit, dim=1), safe_norm(widened(point.z))
    size = norm / torch.linalg.vector_norm(image.unit, dim=1) * unit
    # where the map is nearly flat, no further than the state is long
    size = torch.where(state > 0, torch.minimum(size, state / norm * r.factor.squeeze(1)), size)
    gamma = torch.where((r.unit * image.unit).sum(dim=1) < 0, -size, size)
    return torch.where(gamma.isfinite() & (gamma != 0), gamma, 1)[:, None, None]
