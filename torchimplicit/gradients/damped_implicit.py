"""Implicit differentiation of minima that are nearly none."""

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

    As the least eigenvalue of the Hessian goes to zero the exact derivative grows without bound, and beyond it has the
    wrong sign. With :math:`\\beta > |\\lambda_{min}|` the damped one stays bounded and points where the minimum of the
    energy plus :math:`\\tfrac\\beta2\\lVert p-p^0\\rVert^2` would go: it is the limit of one-sided equilibrium
    propagation with a nudge of that curvature. Reverse and forward mode, first order.

    Args:
        damping: :math:`\\beta`, for all samples; ``None``: the least for which the least eigenvalue becomes ``margin``
            times the largest, sample by sample, so that a well-conditioned minimum is differentiated exactly.
        margin: what ``damping=None`` asks for.
        linear_solver: for the damped systems; ``None``: as for :class:`Implicit`.
        subspace: the most products that ``damping=None`` takes to find the extreme eigenvalues; with the linear
            solver's preconditioner a few do.
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
        """What is added to each sample's Hessian, ``[batch]``."""
        return self._shift(
            task.system.operator(tape, False), task.linear.adjoint_solver(self.linear_solver, tape.z), tape.z.shape[1]
        )

    def _shift(self, operator: LinearOperator, solver: LinearSolver, dim: int) -> Tensor:
        if self.damping is not None:
            return torch.full((operator.batch,), self.damping, dtype=operator.dtype, device=operator.device)
        preconditioner = None
        if isinstance(solver, IterativeSolver) and operator.dim == dim:  # not of a batch that is one system
            preconditioner = as_preconditioner(solver.preconditioner)
        least, largest = extreme_eigenvalues(operator, self.subspace, preconditioner=preconditioner)
        # beta for which (least + beta) / (largest + beta) is about the margin; none where it is so already
        return (self.margin * torch.maximum(largest, -least) - least).clamp_min(0).to(operator.dtype)
