"""Equilibrium propagation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.nodes import FirstOrderRule
from torchimplicit.linear.confirmed import separated
from torchimplicit.linear.extremes import extreme_eigenvalues
from torchimplicit.linear.preconditioners import as_preconditioner
from torchimplicit.notices import notice
from torchimplicit.precision import UnitRows
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization, check_unmoved
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import LBFGS, LevenbergMarquardt, Solver, SolverResult, iterate
from torchimplicit.solvers.given import Given
from torchimplicit.solvers.tolerance import least
from torchimplicit.validation import check_count, check_positive


@final
@dataclass(frozen=True, kw_only=True)
class EquilibriumPropagation(FirstOrderRule):
    """Equilibrium propagation (Scellier and Bengio 2017; symmetric: Laborieux et al. 2021) for :class:`Minimum`.

    The energy is tilted by the incoming cotangent, :math:`T = E + \\beta\\langle u, p\\rangle`, and minimized again
    from the solution :math:`p^0`. The estimate is
    :math:`[\\partial_\\theta E(p^\\beta) - \\partial_\\theta E(p^0)]/\\beta`, whose error is
    :math:`O(\\beta)`, or the symmetric difference over :math:`\\pm\\beta`, whose error is :math:`O(\\beta^2)`. It needs
    only the cotangent, so any loss may follow. Where :math:`p^0` is not stationary, as under
    :func:`~torchimplicit.regularizers.fixed_point_correction`, the fixed tilt
    :math:`-\\langle P\\nabla E(p^0), p\\rangle` is added to the energy, which makes it stationary. Reverse mode, first
    order.

    Args:
        nudge: :math:`\\beta`, relative to the size of the cotangent: the tilt is ``nudge`` times :math:`u` scaled to
            unit norm per sample, so that the displacement does not depend on the scale of the loss. It must stay below
            the smallest eigenvalue of the (projected) Hessian times the distance over which the energy is quadratic.
            ``None``: chosen per sample from that eigenvalue, so that the displacement is at most ``reach`` times the
            size of the solution; this takes up to ``subspace`` products, a few where the solver has a preconditioner.
        symmetric: whether to take the symmetric difference (two minimizations instead of one).
        solver: for the nudged minimizations; ``None``: the solver of the forward pass. Its tolerance must be far below
            the nudge: its ``atol`` is lowered to ``1e-6 * nudge`` (``1e-3 * nudge`` in single precision), on the norm
                of
            the gradient.
        curved: whether the nudge has the curvature of a quadratic loss,
            :math:`T = E + \\beta(\\langle u, p\\rangle + \\tfrac12\\lVert p-p^0\\rVert^2)`, as a nudge by
            :math:`\\tfrac12\\lVert p-p_{gs}\\rVert^2` has. One-sided, that is
            :class:`~torchimplicit.gradients.DampedImplicit` to first order in the displacement, with the nudge divided
            by the cotangent's norm as damping: it works where the Hessian is nearly singular, or indefinite.
        reach: the relative displacement for ``nudge=None``.
        subspace: the most products for ``nudge=None``.

    Raises:
        ValueError: a number is out of range; or, at the solve, the problem is not a :class:`Minimum`, or the solver
            cannot minimize a tilted energy.
    """

    nudge: float | None = 1e-3
    symmetric: bool = True
    solver: Solver | None = None
    curved: bool = False
    reach: float = 1e-3
    subspace: int = 128

    def __post_init__(self) -> None:
        if self.nudge is not None:
            check_positive(self, "nudge")
        check_positive(self, "reach")
        check_count(self, "subspace", 2)

    def supports(self, system: System, solver: Solver) -> None:
        if isinstance(self.solver or solver, (LevenbergMarquardt, Given)):
            raise ValueError(
                "EquilibriumPropagation minimizes a nudged energy, which is not a sum of squares, and takes steps: "
                "give it a solver for minima, EquilibriumPropagation(solver=LBFGS()), or use Implicit()"
            )
        if not isinstance(system, MinimumSystem):
            raise ValueError(
                "EquilibriumPropagation differentiates a Minimum, which has an energy, free or on a single "
                "LinearEquality: for this problem use Implicit()"
            )

    def tape(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Linearization:
        """The energies of the forward pass without a graph, to check the function against: the nudged energies are
        evaluated elsewhere."""
        tape = Linearization(task.system.fn, z, params)
        tape.out = tape.out.detach()
        return tape

    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> list[Tensor]:
        system = task.system
        assert isinstance(system, MinimumSystem)
        whole = UnitRows.of(u)
        size = torch.linalg.vector_norm(whole.unit, dim=1, keepdim=True)
        tilt = whole.unit / torch.where(size > 0, size, 1)
        length = whole.restored(size)
        solver = self.solver or task.solver
        nudge = self._nudges(system, z, params, solver)
        solver = self._tightened(solver, nudge)
        # the curvature of the nudge, per unit of it: for the cotangent's own length in place of the unit length
        curved = 1 / torch.where(length > 0, length, 1) if self.curved else None
        with torch.no_grad():
            # its residual is the tilt that makes z stationary, if it is not (quite): an iterate on the way
            now = system.at(z, params)
        if task.linear.tape is not None and now.energy is not None:
            check_unmoved(task.linear.tape.out, now.energy)
        level = now.residual

        def slope(beta: Tensor) -> Tensor:
            return level + beta * tilt

        def nudged(beta: Tensor) -> SolverResult:
            spring = None if curved is None else (beta * curved, z)
            return iterate(solver, _tilted(system, slope(beta), spring), z, params)

        def lagrangian(beta: Tensor, at: Tensor) -> Tensor:
            pull = slope(beta)
            if curved is not None:
                pull = pull + beta * curved * (at - z)
            return system.lagrangian(at, leaves, pull)

        above = nudged(nudge)
        below = nudged(-nudge) if self.symmetric else None
        figures = [above.report] if below is None else [above.report, below.report]
        report(task.linear.record, _joined(figures))
        # d/dtheta of sum_i |u_i| (E_i(p_above) - E_i(p_below)) / span, in one backward pass for all samples. The states
        # are constants in it: at a minimum of the nudged energy their motion adds nothing (Scellier and Bengio 2017)
        weight = (length / ((2 if self.symmetric else 1) * nudge))[:, 0]
        leaves = [p.detach().requires_grad_(w) for p, w in zip(params, needs_grad, strict=True)]
        with torch.enable_grad():
            difference = lagrangian(nudge, above.z)
            difference = difference - (
                lagrangian(torch.zeros_like(nudge), z) if below is None else lagrangian(-nudge, below.z)
            )
            total = (weight * difference).sum()
        inputs = [p for p, w in zip(leaves, needs_grad, strict=True) if w]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads, strict=True)]

    def _nudges(self, system: MinimumSystem, z: Tensor, params: Sequence[Tensor], solver: Solver) -> Tensor:
        """The nudge of each sample, ``[batch, 1]``."""
        if self.nudge is not None:
            return torch.full_like(z[:, :1], self.nudge)
        preconditioner = as_preconditioner(solver.preconditioner) if isinstance(solver, LBFGS) else None
        operator, samples = separated(system.operator(system.linearize(z, params), False))
        ends = extreme_eigenvalues(operator, self.subspace, preconditioner=preconditioner if samples == 1 else None)
        least, largest = (end.repeat_interleave(samples) for end in ends)
        if bool((least <= 0).any()):
            below = least[least <= 0]
            notice(
                "EquilibriumPropagation(nudge=None) at a saddle",
                f"{len(below)} of {len(z)} samples are not at a minimum: the Hessian's least eigenvalue is "
                f"{float(below.min()):.2g}. EquilibriumPropagation(nudge=None) takes its modulus; give a nudge and "
                "curved=True, symmetric=False, which holds there",
                ConvergenceWarning,
            )
        # the nudged minimum is about beta / stiffness away along the weakest direction
        stiffness = torch.maximum(least.abs(), torch.finfo(least.dtype).eps ** 0.5 * largest.abs())
        stiffness = torch.where(stiffness.isfinite() & (stiffness > 0), stiffness, 1)  # a Hessian of zeros
        size = torch.linalg.vector_norm(z, dim=1)
        return (self.reach * stiffness.to(z.dtype) * torch.where(size > 0, size, 1))[:, None]

    def _tightened(self, solver: Solver, nudge: Tensor) -> Solver:
        """``solver`` with a tolerance far below the nudge."""
        if solver.steps is not None:
            return replace(solver, keep_trajectory=False)
        # in single precision a smaller gradient is lost in rounding
        atol = float(nudge.min()) * (1e-6 if nudge.dtype == torch.float64 else 1e-3)
        asked = atol if solver.atol is None else least(solver.atol)
        return replace(solver, rtol=0.0, atol=min(atol, asked or atol), keep_trajectory=False)


def _tilted(system: MinimumSystem, slope: Tensor, spring: tuple[Tensor, Tensor] | None) -> MinimumSystem:
    """``system`` with ``<slope, z>`` added to the energy (``slope``: ``[batch, dim]``), and a spring of the stiffness
    ``[batch, 1]`` to a point ``[batch, dim]``, if there is one."""
    energy: Callable[..., Tensor] = system.fn

    def tilted(z: Tensor, *params: Tensor) -> Tensor:
        total = energy(z, *params) + (slope * z).sum(dim=1)
        if spring is not None:
            stiffness, point = spring
            total = total + 0.5 * (stiffness * (z - point).square()).sum(dim=1)
        return total

    return replace(system, fn=tilted, residuals=None, row_params=None)


def _joined(reports: list[Report]) -> Report:
    """The figures of several solves together: per sample the worst status and residual, and the sum of steps."""
    first = reports[0]
    for other in reports[1:]:
        worse = torch.maximum(first.status, other.status)
        first = Report(
            torch.where(worse == Status.STEPS_TAKEN, torch.minimum(first.status, other.status), worse),
            first.steps + other.steps,
            torch.maximum(first.residual, other.residual),
            first.evaluations + other.evaluations,
        )
    return first
