"""The Gauss-Newton adjoint of least-squares problems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LSMR, Dense, LinearSolution, LinearSolver
from torchimplicit.linear.pseudo_inverse import RectangularOperator, pseudo_solve
from torchimplicit.precision import at_precision
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_type

SMALL = 256
"""The Jacobian is assembled up to this many unknowns and residuals, where no linear solver is named."""


@final
@dataclass(frozen=True, kw_only=True)
class GaussNewton(LinearEstimate):
    """The Gauss-Newton adjoint of :class:`LeastSquares`: solves :math:`(J^TJ)g=u`, with :math:`J^TJ` in place of the
    Hessian.

    Exact where the residuals vanish at the solution, or are linear in the state; elsewhere its relative error is about
    that of :math:`J^TJ` as a Hessian. :math:`J^TJ` is positive semidefinite everywhere; where it is singular, its
    pseudo-inverse is taken. Reverse and forward mode, first order.

    Args:
        linear_solver: for :math:`J` and :math:`J^T`, see :func:`linear_solve`; ``None``: :class:`Dense` where they are
            small, else :class:`LSMR`.

    Raises:
        TypeError: ``linear_solver`` is not a linear solver.
        ValueError: at the solve, if the problem is not a :class:`LeastSquares`.
    """

    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)

    def supports(self, system: System, solver: Solver) -> None:
        if not isinstance(system, MinimumSystem) or system.residuals is None:
            raise ValueError(
                "GaussNewton differentiates a LeastSquares, which has residuals: for this problem use Implicit()"
            )

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        system = task.system
        assert isinstance(system, MinimumSystem)
        assert system.residuals is not None
        of_residuals = Linearization(system.residuals, tape.z, tape.params)
        batch, inner = b.shape
        outer = of_residuals.out.shape[1]
        small = max(inner, outer) <= SMALL and batch * max(inner, outer) ** 2 <= 2**22
        solver = at_precision(self.linear_solver or (Dense() if small else LSMR()), task.linear.precision)
        operator = RectangularOperator(
            product=of_residuals.jvp,
            transposed_product=of_residuals.vjp,
            batch=batch,
            inner=inner,
            outer=outer,
            dtype=b.dtype,
            device=b.device,
            coupling=system.coupling,
        )
        # (J^T J)^+ b = J^+ J^{T+} b: two solves with the condition of J instead of one with its square
        half = pseudo_solve(solver, operator.flipped(), b)
        solution = pseudo_solve(solver, operator, half.value)
        figures = replace(solution.report, evaluations=half.report.evaluations + solution.report.evaluations)
        report(task.linear.record, figures)
        return LinearSolution(solution.value, figures)
