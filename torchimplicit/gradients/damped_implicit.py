"""Damped implicit differentiation, for minima with a nearly singular Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearOperator, LinearSolution, LinearSolver
from torchimplicit.linear.extremes import extreme_eigenvalues
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.preconditioners import as_preconditioner
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_nonnegative, check_positive, check_type


@final
@dataclass(frozen=True, kw_only=True)
class DampedImplicit(LinearEstimate):
    """Implicit differentiation of :class:`Minimum` with :math:`\\beta` added to the Hessian:
    :math:`(PHP + \\beta I)\\,g = Pu`.

    As the smallest eigenvalue of the Hessian goes to zero, the exact derivative grows without bound; below zero it has
    the wrong sign. With :math:`\\beta > |\\lambda_{min}|` the damped derivative stays bounded: it is that of the
    minimum of the energy plus :math:`\\tfrac\\beta2\\lVert p-p^0\\rVert^2`, and the limit of one-sided equilibrium
    propagation with a nudge of that curvature. Reverse and forward mode, first order.

    Args:
        damping: :math:`\\beta`, for all samples; ``None``: per sample the smallest value that raises the smallest
            eigenvalue to ``margin`` times the largest, so that a well-conditioned minimum is differentiated exactly.
        margin: the ratio of the extreme eigenvalues for ``damping=None``.
        linear_solver: for the damped systems; ``None``: as for :class:`Implicit`.
        subspace: the most products that ``damping=None`` takes to find the extreme eigenvalues; a preconditioner of
            the linear solver reduces them to a few.

    Raises:
        ValueError: a number is out of range; or, at the solve, the problem is not a :class:`Minimum`.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    damping: float | None = None
    margin: float = 1e-3
    linear_solver: LinearSolver | None = None
    subspace: int = 128

    def __post_init__(self) -> None:
        check_nonnegative(self, "damping", optional=True)
        check_positive(self, "margin")
        check_type(self, "linear_solver", LinearSolver, optional=True)

    def supports(self, system: System, solver: Solver) -> None:
        if not isinstance(system, MinimumSystem):
            raise ValueError(
                "DampedImplicit is for a Minimum, which has a Hessian, on a single LinearEquality or none: "
                "use Implicit()"
            )

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        solver = task.linear.adjoint_solver(self.linear_solver, tape.z)
        dim = tape.z.shape[1]
        solution = task.system.solve_linear(
            tape, transposed, b, solver, lambda operator: self._shift(operator, solver, dim)
        )
        report(task.linear.record, solution.report)
        return solution

    def shift(self, task: SolveTask, tape: Linearization) -> Tensor:
        """The damping of each sample, ``[batch]``."""
        return self._shift(
            task.system.operator(tape, False), task.linear.adjoint_solver(self.linear_solver, tape.z), tape.z.shape[1]
        )

    def _shift(self, operator: LinearOperator, solver: LinearSolver, dim: int) -> Tensor:
        if self.damping is not None:
            return torch.full((operator.batch,), self.damping, dtype=operator.dtype, device=operator.device)
        preconditioner = None
        if isinstance(solver, IterativeSolver) and operator.dim == dim:  # it does not fit samples joined into one
            preconditioner = as_preconditioner(solver.preconditioner)
        least, largest = extreme_eigenvalues(operator, self.subspace, preconditioner=preconditioner)
        # the beta for which (least + beta) / (largest + beta) is about the margin; zero where it is larger already
        return (self.margin * torch.maximum(largest, -least) - least).clamp_min(0).to(operator.dtype)
