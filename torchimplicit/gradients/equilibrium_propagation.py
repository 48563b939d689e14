"""Gradients from a nudged equilibrium."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients.base import Found, Gradient, Task
from torchimplicit.gradients.nodes import Grads, estimate, report, solved_by_rule
from torchimplicit.problems import System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solution import Report
from torchimplicit.solvers import Outcome, Solver, iterate
from torchimplicit.validation import check_positive


@final
@dataclass(frozen=True, kw_only=True)
class EquilibriumPropagation(Gradient):
    """Equilibrium propagation (Scellier and Bengio 2017; symmetric: Laborieux et al. 2021) for :class:`Minimum`.

    The energy is tilted by the incoming cotangent, :math:`T = E + \\beta\\langle u, p\\rangle`, and minimized again
    from the solution :math:`p^0`. The estimate is
    :math:`[\\partial_\\theta E(p^\\beta) - \\partial_\\theta E(p^0)]/\\beta`, whose error is
    :math:`O(\\beta)`, or the symmetric difference over :math:`\\pm\\beta`, whose error is :math:`O(\\beta^2)`. Since it
    needs the cotangent alone, any loss may follow. Where :math:`p^0` is not stationary, as under
    :func:`~torchimplicit.regularizers.fixed_point_correction`, the energy is tilted by
    :math:`-\\langle P\\nabla E(p^0), p\\rangle`, held fixed, so that it is. Reverse mode, first order.

    Args:
        nudge: :math:`\\beta`, relative to the size of the cotangent: the tilt is ``nudge`` times :math:`u` scaled to
            unit norm per sample, so that the displacement does not depend on the scale of the loss. It must stay below
            the least eigenvalue of the (projected) Hessian times the distance over which the energy is quadratic.
        symmetric: whether to take the symmetric difference (two minimizations in place of one).
        solver: for the nudged minimizations; ``None``: the solver of the forward pass. Its tolerance must be far below
            the nudge: it is set to ``1e-6 * nudge`` (``1e-3 * nudge`` in single precision; absolute, on the gradient's
            norm) where its ``atol`` is not smaller.
    """

    nudge: float = 1e-3
    symmetric: bool = True
    solver: Solver | None = None

    def __post_init__(self) -> None:
        check_positive(self, "nudge")

    def supports(self, system: System, solver: Solver) -> str | None:
        if isinstance(system, MinimumSystem):
            return None
        return "EquilibriumPropagation differentiates a Minimum, which has an energy: for this problem use Implicit()"

    def attach(self, task: Task, z0: Tensor, params: Sequence[Tensor]) -> Found:
        return solved_by_rule(task, self, z0, params)

    def adjoint(self, task: Task, u: Tensor, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]) -> Grads:
        """The cotangents of the wanted parameters."""

        def compute(task: Task, u: Tensor, z: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
            return self._estimate(task, u, z, params, wanted)

        grads = iter(estimate(task, compute, "EquilibriumPropagation", u, z, params))
        return tuple(next(grads) if w else None for w in wanted)

    def tangent(self, task: Task, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        """Not to be had."""
        raise UnsupportedDerivativeError(
            "EquilibriumPropagation has no forward mode: it needs the cotangent of a loss. Use Implicit() there"
        )

    def _estimate(
        self, task: Task, u: Tensor, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor]:
        system = task.system
        assert isinstance(system, MinimumSystem)
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        tilt = u / torch.where(length > 0, length, 1)
        solver = self._tightened(self.solver or task.solver, z.dtype)
        with torch.no_grad():
            # makes z stationary where it is not quite, or not at all (an iterate on the way)
            level = system.at(z, params).residual

        def slope(beta: float) -> Tensor:
            return level + beta * tilt

        def nudged(beta: float) -> Outcome:
            return iterate(solver, _tilted(system, slope(beta)), z, params)

        above = nudged(self.nudge)
        below = nudged(-self.nudge) if self.symmetric else None
        span = 2 * self.nudge if self.symmetric else self.nudge
        figures = [above.report] if below is None else [above.report, below.report]
        report(task, _joined(figures))
        # d/dtheta of sum_i |u_i| (E_i(p_above) - E_i(p_below)) / span, one backward pass for all samples
        weight = length[:, 0] / span
        leaves = [p.detach().requires_grad_(w) for p, w in zip(params, wanted, strict=True)]
        with torch.enable_grad():
            difference = system.lagrangian(above.z, leaves, slope(self.nudge))
            if below is None:
                difference = difference - system.lagrangian(z, leaves, level)
            else:
                difference = difference - system.lagrangian(below.z, leaves, slope(-self.nudge))
            total = (weight * difference).sum()
        inputs = [p for p, w in zip(leaves, wanted, strict=True) if w]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads, strict=True)]

    def _tightened(self, solver: Solver, dtype: torch.dtype) -> Solver:
        atol = self.nudge * (1e-6 if dtype == torch.float64 else 1e-3)  # single precision gives no more
        return replace(solver, rtol=0.0, atol=min(atol, solver.atol or atol), keep_trajectory=False)


def _tilted(system: MinimumSystem, slope: Tensor) -> MinimumSystem:
    """``system`` with the energy tilted by ``slope`` (``[batch, dim]``)."""
    energy: Callable[..., Tensor] = system.fn

    def tilted(z: Tensor, *params: Tensor) -> Tensor:
        return energy(z, *params) + (slope * z).sum(dim=1)

    return replace(system, fn=tilted, row_params=None)


def _joined(reports: list[Report]) -> Report:
    """The worse of two solves, sample for sample."""
    first = reports[0]
    for other in reports[1:]:
        first = Report(
            torch.maximum(first.status, other.status),
            first.steps + other.steps,
            torch.maximum(first.residual, other.residual),
            first.evaluations + other.evaluations,
        )
    return first
