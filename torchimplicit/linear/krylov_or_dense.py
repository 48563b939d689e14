"""A Krylov method first, and a factorization for the samples that it does not solve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver, solve_each
from torchimplicit.linear.confirmed import REPEATED, true_residual
from torchimplicit.linear.dense import Dense
from torchimplicit.linear.equilibrate import PROBES, ROUNDS, equilibrated
from torchimplicit.linear.gmres import GMRES
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.precision import default_rtol, safe_norm
from torchimplicit.solution import Report, Status
from torchimplicit.validation import check_count, check_nonnegative, check_type

LONGER, DIRECTIONS, REFINEMENTS = 5, 400, 4
"""The second attempt where the matrix is too large to factorize: the factor on ``max_steps``, the most directions that
GMRES may keep, and how often the residual is solved for."""


@final
@dataclass(frozen=True, kw_only=True)
class KrylovOrDense(BlockSolver):
    """A Krylov method for about as many steps as assembling the matrix takes products, then :class:`Dense` for the
    samples that are not solved.

    No system costs much more than twice what the better of the two would have cost, and an ill-conditioned system is
    solved if it is small enough to be factorized. Where the matrices are too large, the Krylov method has all of its
    ``max_steps``. What it leaves is tried once more, in units in which rows and columns have about the same size (a few
    products estimate them), with ``LONGER`` times as many steps; :class:`GMRES` then keeps as many directions as fit
    into ``entries``. The residuals in the report are those of the whole operator.

    Attributes:
        krylov: the Krylov method.
        entries: the most entries of the matrices that are assembled, over all samples that are left.
        rtol, atol: tolerances of each sample for both methods; ``None``: ``eps(dtype)**(2/3)``.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``krylov`` is not an :class:`IterativeSolver`.
    """

    krylov: IterativeSolver = field(default_factory=GMRES)
    entries: int = 2**24
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_type(self, "krylov", IterativeSolver)
        check_count(self, "entries", least=0)
        check_nonnegative(self, "rtol", optional=True)
        check_nonnegative(self, "atol")

    def init(self) -> LinearSolver:
        krylov = self.krylov.init()
        assert isinstance(krylov, IterativeSolver)
        return replace(self, krylov=krylov)

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        return default_rtol(dtype) if self.rtol is None else self.rtol, self.atol

    @property
    def confirms(self) -> bool:
        return True

    def joined(self, operator: LinearOperator, joined: LinearOperator) -> LinearSolver:
        krylov = self.krylov.joined(operator, joined)
        assert isinstance(krylov, IterativeSolver)
        return replace(self, krylov=krylov)

    def _first(self, operator: LinearOperator, dtype: torch.dtype) -> IterativeSolver:
        """The Krylov method with this solver's tolerances and the steps of the first attempt."""
        rtol, atol = self.tolerances(dtype)
        factorizes = operator.dim**2 <= self.entries
        steps = max(40, operator.dim // 2) if factorizes else self.krylov.max_steps
        return replace(self.krylov, rtol=rtol, atol=atol, max_steps=min(steps, self.krylov.max_steps))

    @torch.no_grad()
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        rtol, atol = self.tolerances(b.dtype)
        krylov = self._first(operator, b.dtype)
        solution = krylov.solve(operator, b, x0)
        report = solution.report
        left = (report.status == Status.MAX_STEPS) | (report.status == Status.BREAKDOWN)
        rows = left.nonzero().squeeze(1)
        if solution.strayed or not len(rows):
            return solution
        # restricting the operator costs an evaluation of the rows: only where a quarter of them is saved
        apart = operator.restrict is not None and 4 * len(rows) <= 3 * operator.batch
        if (len(rows) if apart else operator.batch) * operator.dim**2 > self.entries:
            if krylov.max_steps < self.krylov.max_steps:
                solution = replace(self.krylov, rtol=rtol, atol=atol).solve(operator, b, solution.value)
                rows = (~solution.report.converged & (solution.report.status != Status.NONFINITE)).nonzero().squeeze(1)
            return self._again(operator, b, solution, rows) if len(rows) and not solution.strayed else solution
        dense = Dense(rtol=rtol, atol=atol)
        if apart:
            assert operator.restrict is not None
            part = operator.restrict(rows)
            direct, setup = dense.solve(part, b[rows]), part.setup_rows / max(1, operator.batch)
            share = len(rows) / operator.batch
        else:
            whole = dense.solve(operator, b)
            direct, setup, share = _taken(whole, rows), 0.0, 1.0
        spent = report.evaluations + setup + share * direct.report.evaluations
        return self._merged(operator, b, solution, direct, rows, spent)

    @torch.no_grad()
    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        solution = self._first(operator, b.dtype).solve_block(operator, b)
        if solution.strayed or bool(solution.report.converged.all()):
            return solution
        return solve_each(self, operator, b)

    def _again(self, operator: LinearOperator, b: Tensor, solution: LinearSolution, rows: Tensor) -> LinearSolution:
        """Solve the ``rows`` once more, equilibrated and with more steps and directions."""
        if operator.null is not None or self.krylov.preconditioner is not None:  # both belong to the old units
            return solution
        left, right = equilibrated(operator)
        rtol, atol = self.tolerances(b.dtype)
        krylov = replace(self.krylov, atol=0.0, max_steps=LONGER * self.krylov.max_steps)
        if isinstance(krylov, GMRES):
            most = self.entries // (2 * operator.batch * operator.dim)
            krylov = replace(krylov, restart=max(krylov.restart, min(DIRECTIONS, most)))
        scaled, chosen = operator.in_units(left, right), torch.zeros_like(b[:, :1], dtype=torch.bool)
        chosen = chosen.index_fill(0, rows, True)
        value, spent, steps = solution.value, solution.report.evaluations + 2 * ROUNDS * PROBES, solution.report.steps
        for _ in range(REFINEMENTS):  # a residual that is small in the new units may not be small in the old ones
            rest = torch.where(chosen, b - operator.product(value), 0)
            share = float(((rtol * safe_norm(b) + atol) / safe_norm(rest)).nan_to_num(1.0).amin())
            if share >= 1:
                break
            more = replace(krylov, rtol=max(min(0.5 * share, 0.1), rtol)).solve(scaled, left * rest)
            step = right * more.value
            value = torch.where(chosen & step.isfinite().all(dim=1, keepdim=True), value + step, value)
            spent, steps = spent + more.report.evaluations + 1, steps + more.report.steps
        report = replace(solution.report, steps=steps)
        direct = LinearSolution(value[rows], Report(report.status[rows], steps[rows], report.residual[rows], 0.0))
        return self._merged(operator, b, replace(solution, report=report), direct, rows, spent)

    def _merged(
        self,
        operator: LinearOperator,
        b: Tensor,
        solution: LinearSolution,
        direct: LinearSolution,
        rows: Tensor,
        spent: float,
    ) -> LinearSolution:
        """``solution`` with the ``rows`` of ``direct``, where those have the smaller true residuals."""
        before, later = solution.report, direct.report
        value = solution.value.index_copy(0, rows, direct.value.to(solution.value.dtype))
        relative, above = true_residual(operator, b, value, self.tolerances(b.dtype))
        relative = relative.to(before.residual.dtype)
        # a row that was solved to the rounding of a product counts as solved if this product confirms its residual
        rounded = later.converged & (relative[rows] <= REPEATED * later.residual)
        above &= ~torch.zeros_like(above).index_copy(0, rows, rounded)
        chosen = torch.zeros_like(above).index_fill(0, rows, True) & ~(relative >= before.residual)
        status = torch.where(above, int(Status.BREAKDOWN), int(Status.CONVERGED))

        def merged(new: Tensor | None, old: Tensor | None) -> Tensor | None:
            if new is None:
                return old
            old = torch.full_like(before.residual, torch.nan) if old is None else old
            return torch.where(chosen, old.index_copy(0, rows, new.to(old.dtype)), old)

        figures = Report(
            torch.where(chosen, status, before.status),
            before.steps,
            torch.where(chosen, relative, before.residual),
            spent + 1,
            curvature=merged(later.curvature, before.curvature),
            condition=merged(later.condition, before.condition),
        )
        return LinearSolution(torch.where(chosen[:, None], value, solution.value), figures)


def _taken(solution: LinearSolution, rows: Tensor) -> LinearSolution:
    """The solution of the samples ``rows`` alone."""
    figures: dict[str, Any] = {
        name: figure[rows] if isinstance(figure, Tensor) else figure for name, figure in vars(solution.report).items()
    }
    return LinearSolution(solution.value[rows], Report(**figures))
