"""Solving a batch row by row, confirmed by a product of the whole operator; as one system where that does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchimplicit.coupling import Coupling, broken_promise
from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver, solve_each
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.precision import UnitRows
from torchimplicit.solution import Report, Status

SLACK = 1.25
"""The factor up to which the true residual may exceed the tolerance, or the residual that was reported."""

LOOKS = 4
"""How often rows are seen not to depend on each other, where a linear solver's steps run out, until that is believed of
the function: its residuals are those of the whole operator all the same."""

REPEATED = 4
"""The factor by which a residual that is nothing but rounding may differ from one product to another."""

Attempt = Callable[[LinearOperator, Tensor], LinearSolution]
"""Solves ``[k, batch, dim]``, or ``[batch, dim]``, with an operator of that batch."""


def solve_any(
    solver: LinearSolver,
    operator: LinearOperator,
    b: Tensor,
    shift: Callable[[LinearOperator], Tensor] | None = None,
) -> LinearSolution:
    """Solve for one right-hand side ``[batch, dim]``, or for a block ``[k, batch, dim]`` in the solver's best way.

    Rows are solved apart, each to its own tolerance. Where one product of the whole operator does not confirm the
    residuals because the rows depend on each other, the batch is solved as one system, to a tolerance of its own.

    Args:
        shift: ``[batch]``, of an operator of that batch: what is added to its diagonal.
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
    coupling, meant = operator.coupling, shifted(operator)
    if coupling is None:
        return attempt(meant, b)
    spent = 0.0
    if not coupling.found:
        solution = attempt(meant, b)
        if not solution.strayed and (coupling.memory.apart >= LOOKS or bool(solution.report.converged.all())):
            return solution
        if not _seen_to_depend(coupling, meant):
            return attempt(replace(meant, coupling=None), b) if solution.strayed else solution
        spent = solution.report.evaluations
    whole = _as_one_system(together, operator, b, shifted)
    return replace(whole, report=_costing(whole.report, spent))


def _seen_to_depend(coupling: Coupling, operator: LinearOperator) -> bool:
    """Whether rows are seen to depend on each other, which is remembered; an error where it was promised that they do
    not."""
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
    """What ``attempt`` gives, its residual and status being those of the whole operator, by one product; see
    :func:`solve_any`.

    Args:
        attempt: solves row by row.
        operator, b: the system.
        tolerances: ``(rtol, atol)`` that a row is solved to. Where both are zero it takes a given number of steps, and
            an honest residual of any size will do.
        together: solves the batch as one system; ``None``: as ``attempt`` does.
        shifted: makes of an operator, of rows or of the batch as one system, the one that is meant.
    """
    coupling, meant, spent = operator.coupling, shifted(operator), 0.0
    if coupling is None or not coupling.found:
        solution = attempt(meant, b)
        true = _true_residual(meant, b, solution, tolerances)
        suspect = true.above & (true.beyond(solution.report) | (sum(tolerances) > 0))
        if not bool(suspect.any()) or coupling is None or not _seen_to_depend(coupling, meant):
            return true.correct(solution)
        spent = solution.report.evaluations + true.products

    def confirmed_together(joined: LinearOperator, b: Tensor) -> LinearSolution:
        solution = (together or attempt)(joined, b)
        return _true_residual(joined, b, solution, tolerances).correct(solution)

    whole = _as_one_system(confirmed_together, operator, b, shifted)
    return replace(whole, report=_costing(whole.report, spent))


def separated(operator: LinearOperator) -> tuple[LinearOperator, int]:
    """The operator of systems that do not depend on each other, and how many samples each of them is made of."""
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
    """Of a solution, by one product of the whole operator.

    Attributes:
        relative: ``[batch]``, its norm over that of the right-hand side, the worst over a block; NaN where either is
            not finite.
        above: bool ``[batch]``: beyond the tolerance.
        products: with single vectors.
    """

    relative: Tensor
    above: Tensor
    products: float

    def beyond(self, report: Report) -> Tensor:
        """bool ``[batch]``: beyond what was reported."""
        return self.relative > SLACK * report.residual

    def correct(self, solution: LinearSolution) -> LinearSolution:
        """The solution, with a report that has the true residuals."""
        report = solution.report
        status = report.status.masked_fill(report.converged & self.above, int(Status.BREAKDOWN))
        residual = torch.where(self.relative.isnan(), report.residual, self.relative).to(report.residual.dtype)
        report = replace(report, status=status, residual=residual)
        return replace(solution, report=_costing(report, self.products))


def _true_residual(
    operator: LinearOperator, b: Tensor, solution: LinearSolution, tolerances: tuple[float, float]
) -> _TrueResidual:
    rtol, atol = tolerances
    whole = UnitRows.of(b)
    value, rhs = solution.value.where(whole.finite, 0.0), b.where(whole.finite, 0.0)
    product = operator.product(value) if b.ndim == 2 else block_product(operator)(value)
    right = operator.project(whole.unit)
    vector = operator.project(rhs - product) * whole.factor
    wide = torch.promote_types(b.dtype, torch.float32)
    size = torch.linalg.vector_norm(vector, dim=-1, dtype=wide)
    scale = torch.linalg.vector_norm(right, dim=-1, dtype=wide)
    unprojected = scale if operator.null is None else torch.linalg.vector_norm(whole.unit, dim=-1, dtype=wide)
    # what a projection, or a product, leaves of a right-hand side that is nothing but rounding is rounding
    tolerance = SLACK * (rtol * scale + atol * whole.factor.squeeze(-1)) + 16 * torch.finfo(b.dtype).eps * unprojected
    relative = (size / scale.where(scale > 0, 1)).where(whole.finite.squeeze(-1), torch.nan)
    above = size > tolerance
    if b.ndim == 3:
        relative, above = relative.amax(0), above.any(0)
    # what was solved to the rounding of a product, as one more product confirms
    above &= ~(solution.report.converged & (relative <= REPEATED * solution.report.residual))
    return _TrueResidual(relative=relative, above=above, products=1.0 if b.ndim == 2 else float(len(b)))


def block_product(operator: LinearOperator) -> Callable[[Tensor], Tensor]:
    """Products with ``[k, batch, dim]``, taken together where the operator can."""
    return operator.block_product or (lambda vs: torch.stack([operator.product(v) for v in vs]))


def rows_depend(operator: LinearOperator) -> bool:
    """Whether a product in any row depends on another row.

    Any two rows differ in a binary digit of their number: for each digit, the rows with a one are asked for what they
    get from those with a zero, and the other way round. That takes twice as many products as there are digits.
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
    """Solve the rows that may depend on each other as one system; each of them gets its figures."""
    assert operator.coupling is not None
    rows = operator.coupling.rows
    groups = operator.batch // rows
    joined = shifted(operator.joined(rows))
    # the others are solved for without a row that is not finite
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
