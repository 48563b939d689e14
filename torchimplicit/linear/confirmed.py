"""Solving a batch row by row, confirmed by a product of the whole operator, or as one system where rows are coupled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchimplicit.coupling import Coupling, broken_promise
from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver, solve_each
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.precision import UnitRows, working_dtype
from torchimplicit.solution import Report, Status

SLACK = 1.25
"""The true residual may exceed the tolerance, or the reported residual, by this factor."""

LOOKS = 4
"""Once the rows of a function were found independent this often after a linear solver had run out of steps, they are no
longer tested. The reported residuals are those of the whole operator in any case."""

REPEATED = 4
"""A residual of nothing but rounding may differ by this factor from one product to the next."""

Attempt = Callable[[LinearOperator, Tensor], LinearSolution]
"""Solves ``[k, batch, dim]``, or ``[batch, dim]``, with an operator of that batch."""


def solve_any(
    solver: LinearSolver,
    operator: LinearOperator,
    b: Tensor,
    shift: Callable[[LinearOperator], Tensor] | None = None,
) -> LinearSolution:
    """Solve for a right-hand side ``[batch, dim]``, or for a block ``[k, batch, dim]`` (together if the solver can).

    Rows are solved separately, each to its own tolerance. Where a product of the whole operator does not confirm the
    residuals because rows depend on each other, the batch is solved as one system, to the tolerance of the whole.

    Args:
        solver: the linear solver.
        operator: A.
        b: the right-hand sides.
        shift: gives for an operator the multiple of the identity to add to it, ``[batch]``; ``None``: nothing is added.
            A function, since the batch solved as one system has another operator.

    Raises:
        ValueError: rows depend on each other although the problem says ``rowwise=True``.
    """

    def shifted(operator: LinearOperator) -> LinearOperator:
        return operator if shift is None else operator.shifted(shift(operator))

    def attempt(operator: LinearOperator, b: Tensor) -> LinearSolution:
        return _in_its_best_way(solver, operator, b)

    def together(joined: LinearOperator, b: Tensor) -> LinearSolution:
        return _in_its_best_way(solver.joined(operator, joined), joined, b)

    if solver.truncated:
        return attempt(shifted(operator), b)
    if not solver.confirms:
        return confirmed(attempt, operator, b, solver.tolerances(b.dtype), together, shifted)
    coupling, rowwise = operator.coupling, shifted(operator)
    if coupling is None:
        return attempt(rowwise, b)
    spent = 0.0
    if not coupling.found:
        solution = attempt(rowwise, b)
        if not solution.strayed and (coupling.memory.apart >= LOOKS or bool(solution.report.converged.all())):
            return solution
        if not _seen_to_depend(coupling, rowwise):
            # the solve was abandoned for a coupling that there is not: without the suspicion it runs to its end
            return attempt(replace(rowwise, coupling=None), b) if solution.strayed else solution
        spent = solution.report.evaluations
    whole = _as_one_system(together, operator, b, shifted)
    return replace(whole, report=_costing(whole.report, spent))


def _seen_to_depend(coupling: Coupling, operator: LinearOperator) -> bool:
    """Test by products whether rows depend on each other, and remember the answer for the function.

    Raises:
        ValueError: they do, although the problem says ``rowwise=True``.
    """
    if not rows_depend(operator):
        coupling.memory.apart += 1
        return False
    if coupling.promised:
        broken_promise("the rows of f depend on each other, as its derivatives show")
    coupling.memory.found = True
    return True


@torch.no_grad()
def confirmed(
    attempt: Attempt,
    operator: LinearOperator,
    b: Tensor,
    tolerances: tuple[float, float],
    together: Attempt | None = None,
    shifted: Callable[[LinearOperator], LinearOperator] = lambda operator: operator,
) -> LinearSolution:
    """Solve by ``attempt`` and set residual and status to those of the whole operator, by one product; see
    :func:`solve_any`.

    Args:
        attempt: solves row by row.
        operator, b: the system.
        tolerances: the ``(rtol, atol)`` that a row is solved to. If both are zero, ``attempt`` takes a prescribed
            number of steps, and any residual is accepted as long as the report states it correctly.
        together: solves the batch as one system; ``None``: as ``attempt`` does.
        shifted: adds the shift to an operator, to that of the rows or to that of the batch as one system.
    """
    coupling, rowwise, spent = operator.coupling, shifted(operator), 0.0
    if coupling is None or not coupling.found:
        solution = attempt(rowwise, b)
        true = _true_residual(rowwise, b, solution, tolerances)
        suspect = true.above & (true.beyond(solution.report) | (sum(tolerances) > 0))
        if not bool(suspect.any()) or coupling is None or not _seen_to_depend(coupling, rowwise):
            return true.correct(solution)
        spent = solution.report.evaluations + true.products

    def confirmed_together(joined: LinearOperator, b: Tensor) -> LinearSolution:
        solution = (together or attempt)(joined, b)
        return _true_residual(joined, b, solution, tolerances).correct(solution)

    whole = _as_one_system(confirmed_together, operator, b, shifted)
    return replace(whole, report=_costing(whole.report, spent))


def separated(operator: LinearOperator) -> tuple[LinearOperator, int]:
    """The operator of independent systems, and how many samples each of them joins."""
    coupling = operator.coupling
    if coupling is None or coupling.promised or not (coupling.found or _seen_to_depend(coupling, operator)):
        return operator, 1
    return operator.joined(coupling.rows), coupling.rows


def _in_its_best_way(solver: LinearSolver, operator: LinearOperator, b: Tensor) -> LinearSolution:
    if b.ndim == 2:
        return solver.solve(operator, b)
    return solver.solve_block(operator, b) if isinstance(solver, BlockSolver) else solve_each(solver, operator, b)


@dataclass(frozen=True, kw_only=True)
class _TrueResidual:
    """The residual of a solution, by one product of the whole operator.

    Attributes:
        relative: ``[batch]``, its norm divided by that of the right-hand side, the largest over a block; NaN where the
            right-hand side is not finite.
        above: bool ``[batch]``, whether it exceeds the tolerance.
        products: number of products with single vectors that it took.
    """

    relative: Tensor
    above: Tensor
    products: float

    def beyond(self, report: Report) -> Tensor:
        """bool ``[batch]``: whether it exceeds the reported one."""
        return self.relative > SLACK * report.residual

    def correct(self, solution: LinearSolution) -> LinearSolution:
        """The solution with the true residuals in its report; a row that claims more than they show breaks down."""
        report = solution.report
        status = report.status.masked_fill(report.converged & self.above, int(Status.BREAKDOWN))
        residual = torch.where(self.relative.isnan(), report.residual, self.relative).to(report.residual.dtype)
        report = replace(report, status=status, residual=residual)
        return replace(solution, report=_costing(report, self.products))


def _true_residual(
    operator: LinearOperator, b: Tensor, solution: LinearSolution, tolerances: tuple[float, float]
) -> _TrueResidual:
    relative, above = true_residual(operator, b, solution.value, tolerances)
    if b.ndim == 3:
        relative, above = relative.amax(0), above.any(0)
    # a row that was solved to the rounding of a product counts as solved if this product confirms its residual
    above &= ~(solution.report.converged & (relative <= REPEATED * solution.report.residual))
    return _TrueResidual(relative=relative, above=above, products=1.0 if b.ndim == 2 else float(len(b)))


def true_residual(
    operator: LinearOperator, b: Tensor, value: Tensor, tolerances: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The residual of ``value`` (shaped like ``b``, ``[batch, dim]`` or ``[k, batch, dim]``) by a product of the whole
    operator.

    Returns:
        Its norm divided by that of ``b``, NaN where ``b`` is not finite; and bool, whether it exceeds the tolerance;
        ``[batch]`` or ``[k, batch]``.
    """
    rtol, atol = tolerances
    whole = UnitRows.of(b)
    value, rhs = value.where(whole.finite, 0.0), b.where(whole.finite, 0.0)
    product = operator.product(value) if b.ndim == 2 else block_product(operator)(value)
    right = operator.project(whole.unit)
    # scaled after the product, which may couple rows of different scales
    vector = operator.project(rhs - product) * whole.factor
    wide = working_dtype(b.dtype)
    size = torch.linalg.vector_norm(vector, dim=-1, dtype=wide)
    scale = torch.linalg.vector_norm(right, dim=-1, dtype=wide)
    unprojected = scale if operator.null is None else torch.linalg.vector_norm(whole.unit, dim=-1, dtype=wide)
    # no solution accounts for the rounding that the projection leaves of a right-hand side along the null vector
    tolerance = SLACK * (rtol * scale + atol * whole.factor.squeeze(-1)) + 16 * torch.finfo(b.dtype).eps * unprojected
    relative = (size / scale.where(scale > 0, 1)).where(whole.finite.squeeze(-1), torch.nan)
    return relative, size > tolerance


def block_product(operator: LinearOperator) -> Callable[[Tensor], Tensor]:
    """Products with ``[k, batch, dim]``, in one call where the operator has a ``block_product``."""
    return operator.block_product or (lambda vs: torch.stack([operator.product(v) for v in vs]))


def rows_depend(operator: LinearOperator) -> bool:
    """Return whether the product in any row depends on another row.

    Any two row numbers differ in a binary digit. So for each digit, vectors that are nonzero only in the rows with a
    one are multiplied, and the images in the rows with a zero must vanish; and the other way round. That takes two
    products for each digit of the batch size.
    """
    number = torch.arange(operator.batch, device=operator.device)
    every = torch.arange(1, operator.batch * operator.dim + 1, device=operator.device, dtype=torch.float64)
    probe = torch.sin(every.square()).reshape(operator.batch, operator.dim).to(operator.dtype)  # nothing drawn
    for digit in range((operator.batch - 1).bit_length()):
        ones = (number >> digit & 1 == 1)[:, None]
        for sending in (ones, ~ones):
            image = torch.linalg.vector_norm(operator.product(probe * sending), dim=-1).nan_to_num(nan=0.0)
            received, sent = torch.stack(
                (image.where(~sending[:, 0], 0).amax(), image.where(sending[:, 0], 0).amax())
            ).tolist()
            if received > torch.finfo(operator.dtype).eps * sent:
                return True
    return False


def _as_one_system(
    together: Attempt,
    operator: LinearOperator,
    b: Tensor,
    shifted: Callable[[LinearOperator], LinearOperator],
) -> LinearSolution:
    """Solve the rows that may depend on each other as one system, whose figures each of them gets."""
    assert operator.coupling is not None
    rows = operator.coupling.rows
    groups = operator.batch // rows
    joined = shifted(operator.joined(rows))
    # a right-hand side that is not finite counts as zero, so as not to spoil the whole system
    finite = UnitRows.of(b).finite
    clean = operator.project(b.where(finite, 0.0))
    flat = clean.reshape(*b.shape[:-2], groups, -1)
    solution = together(joined, flat)
    figures = {
        name: figure.repeat_interleave(rows, dim=0)
        for name, figure in vars(solution.report).items()
        if isinstance(figure, Tensor)
    }
    bad = ~(finite if b.ndim == 2 else finite.all(0)).squeeze(-1)
    figures["status"] = figures["status"].masked_fill(bad, int(Status.NONFINITE))
    value = operator.project(solution.value.reshape(b.shape)).where(finite, torch.nan)
    return LinearSolution(value, replace(solution.report, **figures))  # type: ignore[arg-type]


def _costing(report: Report, more: float) -> Report:
    return replace(report, evaluations=report.evaluations + more)
