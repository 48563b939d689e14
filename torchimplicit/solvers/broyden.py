"""Broyden's method with a low-rank inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.basis import inner, less
from torchimplicit.precision import UnitRows, safe_norm, widened
from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.history import History
from torchimplicit.validation import check_count


class InverseEstimate(NamedTuple):
    """An estimate :math:`G` of :math:`A^{-1}` per sample; the step is :math:`s=Gr`.

    Full steps make it a product of factors :math:`I+s_{j+1}s_j^T/s_j^Ts_j` (Kelley 1995, section 7.3), and so
    :math:`G=\\gamma(I+\\sum_j s_{j+1}\\sum_{i\\le j}c_{ji}s_i^T)`: only the steps are kept, and a product takes two
    passes over them. Here :math:`A=\\partial R/\\partial z` and :math:`r=-R`, as in
    :class:`~torchimplicit.problems.system.System`.

    Attributes:
        steps: the steps s, one more than there are factors.
        factors: the coefficients c, ``[batch, memory, memory]``, of which the first ``updates`` rows are in use.
        gamma: :math:`\\gamma`, ``[batch, 1]``; ``None`` for 1.
        unit: ``[dim]``, the state is divided by it in ``steps``; ``None``: it has its own unit.
    """

    steps: History
    factors: Tensor
    gamma: Tensor | None = None
    unit: Tensor | None = None

    @property
    def updates(self) -> int:
        """The number of rank-one updates."""
        return max(0, self.steps.filled - 1)

    def _known(self) -> tuple[Tensor, Tensor, Tensor]:
        """The steps :math:`s_i` and :math:`s_{j+1}` of the factors, ``[batch, updates, dim]``, and their
        coefficients."""
        count = self.updates
        steps = self.steps.ring
        return steps.narrow(1, 0, count), steps.narrow(1, 1, count), self.factors[:, :count, :count]

    def _scaled(self, r: Tensor) -> Tensor:
        return r if self.gamma is None else self.gamma * r

    def times(self, r: Tensor) -> Tensor:
        """:math:`G r` for ``[batch, dim]``."""
        before, after, c = self._known()
        base = self._scaled(r if self.unit is None else r / self.unit)
        out = base if not self.updates else less(base, _product(c, -inner(before, base)), after)
        return out if self.unit is None else out * self.unit

    def transposed_times(self, r: Tensor) -> Tensor:
        """:math:`G^T r` for ``[batch, dim]``."""
        before, after, c = self._known()
        r = r if self.unit is None else r * self.unit
        out = self._scaled(r if not self.updates else less(r, _product(c.mT, -inner(after, r)), before))
        return out if self.unit is None else out / self.unit

    def stepped(self, r: Tensor) -> tuple[Tensor, InverseEstimate]:
        """Update the estimate by the secant condition of the last step, which led to the residual ``-r``.

        Returns:
            The next step :math:`G_+r` and the updated estimate :math:`G_+`.
        """
        # A s = -(r - r_last), so G+ y = -s with y = r - r_last. The step was s = G r_last, so that G y = g - s with
        # g = G r. Sherman-Morrison: G+ = G + g (G^T s)^T / (s.s - s.g), and so G+ r = g s.s / (s.s - s.g).
        count, base = self.updates, self._scaled(r)
        _, after, c = self._known()
        both = self.steps.beside(count, base)
        # one pass over the steps for the inner products of both vectors with all of them
        last_products, residual_products = torch.bmm(both, self.steps.vectors.mT).unbind(1)
        square = last_products.narrow(1, count, 1)
        row, weights = torch.ones_like(square), residual_products.narrow(1, 0, count)
        if count:
            row = torch.cat((_product(c.mT, last_products.narrow(1, 1, count)), row), 1)
            weights = _product(c, weights)
        ahead = (row * residual_products).sum(1, keepdim=True)  # s.g = (G^T s).r
        gap = square - ahead
        # the update divides by s.s - s.g: where that cancels, there is none
        flat = gap.abs() <= 1e-8 * square
        # s.s / (s.s - s.g), which an infinite gap turns into 1
        factor = 1 + ahead / gap.masked_fill(flat, torch.inf)
        steps = self.steps.put_less(count + 1, base, factor, weights * -factor, after)
        factors = self.factors.clone() if torch.is_grad_enabled() else self.factors
        factors[:, count, : count + 1] = row / square.masked_fill(flat, torch.inf)
        return steps.ring.select(1, count + 1), self._replace(steps=steps, factors=factors)


def _product(matrix: Tensor, v: Tensor) -> Tensor:
    """Products of small matrices with vectors ``[batch, k]``."""
    return torch.bmm(matrix, v.unsqueeze(2)).squeeze(2)


class BroydenState(NamedTuple):
    """The estimate of the inverse, which holds the last step too; for half precision it is kept in float32."""

    inverse: InverseEstimate


@final
@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method, with the inverse as a sum of rank-one updates (Broyden 1965).

    The first step is the plain one; for a root or a minimum it is :math:`\\gamma r` in the problem's own units, with
    :math:`|\\gamma|=\\lVert r\\rVert/\\lVert Ar\\rVert` and the sign of :math:`r^TAr`, from one product with the
    Jacobian. When the memory is full, the method restarts: dropping only the oldest updates was tried, and diverged on
    linear contractions.

    Args:
        memory: number of rank-one updates that the inverse holds.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
    """

    memory: int = 50
    mixes_parts: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def check(self) -> None:
        check_count(self, "memory")

    def start(self, point: Point) -> Any:
        return None

    def wants_product(self) -> bool:
        return True

    def step(self, evaluate: Evaluator, point: Point, state: BroydenState | None, progress: Progress) -> Move:
        residual = widened(point.residual)
        if state is None or state.inverse.updates == self.memory:
            inverse = self._empty(point) if state is None else state.inverse
            step = inverse._scaled(residual)
            steps = History(inverse.steps.ring, 0).put(0, step)
            inverse = inverse._replace(steps=steps)
        else:
            step, inverse = state.inverse.stepped(residual)
        return Move(point.z + step.to(point.z.dtype), BroydenState(inverse))

    def _empty(self, point: Point) -> InverseEstimate:
        room = max(1, min(self.memory, self.max_steps - 1))  # no more updates than there are steps
        steps = History.empty(point.z, room + 1)
        return InverseEstimate(steps, steps.ring.new_zeros(len(point.z), room, room), unit_of(point))


def unit_of(point: Point) -> Tensor | None:
    """The factor :math:`\\gamma` that gives the first residual the state's unit, ``[batch, 1]``; ``None`` where the
    residual has that unit already."""
    if point.product is None:
        return None
    # rows of unit size, since the squares of small ones would underflow
    r, image = UnitRows.of(widened(point.residual)), UnitRows.of(widened(point.product))
    unit = (image.factor / r.factor).squeeze(1)
    norm, state = torch.linalg.vector_norm(r.unit, dim=1), safe_norm(widened(point.z))
    size = norm / torch.linalg.vector_norm(image.unit, dim=1) * unit
    # where the map is nearly flat, step no further than the state is long
    size = torch.where(state > 0, torch.minimum(size, state / norm * r.factor.squeeze(1)), size)
    gamma = torch.where((r.unit * image.unit).sum(dim=1) < 0, -size, size)
    return torch.where(gamma.isfinite() & (gamma != 0), gamma, 1)[:, None]
