"""The one loop of the iterative linear solvers.

It owns the tolerance test of every sample, the masks, the best iterate, the steps and the report, the dropping of
finished rows, and the check of the true residual. A method owns its step.

Rows stop at *checks*, each of which reads one small stack of counts from the device. When a row stops (it has
converged, gone non-finite, or broken down), its iterate is copied out, and its part of the method's state is set to
zero: every method keeps a zero row at zero, so the steps need no masks. Once enough rows have stopped, and the operator
can be restricted, they are dropped from the state instead.

A solve consists of one or more *cycles*. A cycle ends when all rows have stopped or the method's memory is full. After
the first cycle, one product of the whole operator gives the true residuals of all rows, and rows not within their
tolerance start again from where they are; after later cycles it is taken only where a residual is in doubt. If the
first true residual is far from the recurrence's and rows may depend on each other, the solve is abandoned, and the
caller solves the rows as one system.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear.base import LinearSolution
from torchimplicit.linear.cycle import CROWD, ROUNDING, Cycle, CycleResult, Method
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner
from torchimplicit.linear.rowwise import select
from torchimplicit.linear.system import LinearSystem
from torchimplicit.precision import UnitRows, safe_norm, working_dtype
from torchimplicit.solution import Report, Status

_DOUBT = 0.25
"""A recurrence's residual is trusted while its possible error is below this share of the tolerance or the residual."""

_STRAYED = 4.0
"""A true residual that exceeds the recurrence's by more than this factor may mean that rows depend on each other."""

_MARGIN = 1.01
"""A true residual may exceed its tolerance by this factor, for the rounding of a product."""

_PROGRESS = 0.99
"""A cycle has to reduce the residual to this share for another cycle to be worthwhile."""


def run(
    method: Method,
    operator: LinearOperator,
    b: Tensor,
    x0: Tensor | None,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    check_every: int,
    preconditioner: Preconditioner | None,
) -> LinearSolution:
    """Solve with ``method``, every row to ``||b - A x|| <= atol + rtol ||b||``.

    Args:
        method: the steps.
        operator: A.
        b: right-hand sides, ``[batch, dim]``.
        x0: the start; ``None`` for zero.
        rtol, atol, max_steps, check_every: see :class:`~torchimplicit.linear.IterativeSolver`.
        preconditioner: prepared here for the operator; ``None`` for none.
    """
    dtype = b.dtype
    b = b.to(working_dtype(dtype))
    # Rows are scaled to unit size by powers of two, so that no square underflows; but not for a truncated series, which
    # is right even for rows that depend on each other, as long as each keeps its own scale.
    whole = UnitRows.of(b) if method.watched else UnitRows.as_they_are(b)
    b = operator.project(whole.unit)
    scale = torch.linalg.vector_norm(b, dim=-1) if method.watched else safe_norm(b)
    tolerance = (rtol * scale).add_(whole.factor.squeeze(-1), alpha=atol)
    if operator.null is not None:
        # the projection of a b along the null vector is pure rounding, which no solution can account for
        eps = torch.finfo(dtype).eps
        tolerance = tolerance.maximum(8 * eps * torch.linalg.vector_norm(whole.unit, dim=-1))
    if not method.watched:  # a prescribed number of steps: a negative tolerance, so that no row stops early
        tolerance = torch.where((scale > 0) | (operator.coupling is not None), -1.0, tolerance)
    system = LinearSystem.of(operator, preconditioner, method.definite)
    x, r, norm = b.new_zeros(()).expand_as(b), b, scale
    if x0 is not None:
        guess = operator.project(x0.to(b.dtype) * whole.factor)
        residual = system.residual(b, guess)
        size = torch.linalg.vector_norm(residual, dim=-1)
        usable = size < torch.inf  # a start that is not finite is replaced by zero
        column = usable[:, None]
        x, r, norm = guess.where(column, x), residual.where(column, r), size.where(usable, norm)

    limit = min(max_steps, method.cycle or max_steps)
    check_every = check_every if method.watched else limit
    cycle = Cycle(method, system, b, x, r, norm, tolerance)
    result = part = cycle.run(limit, check_every)
    finite = whole.finite.squeeze(-1)
    live, strayed, settled = None, False, False
    # The operator of coupled rows does not commute with a scaling per row: then the true residual has to be taken in
    # the rows' own units.
    apart = operator.coupling is None or operator.coupling.promised
    while cycle.steps and method.watched:
        going = part.status != Status.NONFINITE
        if live is None and max(rtol, atol) > 0:  # after the first cycle every row is judged by a true residual
            doubt = going
        else:
            doubt = part.gap > _DOUBT * tolerance.maximum(part.norm)
            if not cycle.finished:
                doubt |= going & (part.steps < max_steps) & (part.status != Status.CONVERGED)
            if live is not None:
                doubt &= live
            chosen = doubt.nonzero().squeeze(1)
            if not len(chosen):
                break
            if system.operator.restrict is not None and len(chosen) <= CROWD * len(doubt):
                system = system.restrict(chosen)
                part, b, x, norm, tolerance, doubt = select((part, b, x, norm, tolerance, doubt), chosen)
        r = (
            system.residual(b, part.x)
            if apart
            else operator.project(b - system.product(part.x / whole.factor) * whole.factor)
        )
        size = torch.linalg.vector_norm(r, dim=-1)
        if live is None and cycle.finished:  # the common case: all are within their tolerance, and one read says so
            settled = bool(((size <= _MARGIN * tolerance) & finite).all())
            if settled:
                result = part._replace(norm=size)
                break
        # a recurrence drifts by rounding, not by a multiple of itself: being that far off means that rows are coupled
        strays = doubt & (size > _STRAYED * part.norm.maximum(tolerance))
        part, live = _settle(part, size, x, norm, tolerance, doubt, max_steps)
        left, far = torch.stack(((max_steps - part.steps).where(live, 0), strays)).amax(1).tolist()
        strayed = bool(far) and operator.coupling is not None
        left = 0 if strayed else left
        if left:
            limit = min(left, method.cycle or left)
            x, norm, r = part.x, part.norm.where(live, 0.0), r.where(live[:, None], 0.0)
            cycle = Cycle(method, system, b, x, r, norm, tolerance)
            part = part.followed_by(cycle.run(limit, check_every), live)
        result = part if system.rows is None else result.updated(part, system.rows)
        if not left:
            break

    unit = scale.where(scale > 0, 1.0)
    evaluations = system.cost.rows / max(1, operator.batch)
    curvature = None
    if method.curved:  # near the end of a cycle a small negative curvature may be rounding of larger ones before it
        least = -ROUNDING * torch.finfo(dtype).eps * result.size
        curvature = result.curvature.where(result.curvature < least, torch.nan).to(dtype)
    norms, status, x = result.norm / unit, result.status, operator.project(result.x)
    # a lower bound of the condition number: |A| |x| / |b| <= |A| |A^-1|
    condition = (result.size * torch.linalg.vector_norm(x, dim=-1) / unit).to(dtype)
    if settled:
        value = x / whole.factor
    else:
        norms, value = norms.where(finite, torch.nan), whole.restored(x)
        status = status.masked_fill(~finite, int(Status.NONFINITE))
    report = Report(status, result.steps, norms.to(dtype), evaluations, curvature=curvature, condition=condition)
    return LinearSolution(value.to(dtype), method.figures(report, result.tally), strayed)


def _settle(
    part: CycleResult,
    size: Tensor,
    start: Tensor,
    start_norm: Tensor,
    tolerance: Tensor,
    doubt: Tensor,
    max_steps: int,
) -> tuple[CycleResult, Tensor]:
    """Judge rows by their true residuals. A row that its cycle made worse goes back to where the cycle started.

    Args:
        part: the outcome of the cycle.
        size: the norms of the true residuals, ``[rows]``.
        start, start_norm: where the cycle started, and the norms of the residuals there.
        tolerance: the tolerance of each row's residual norm, ``[rows]``.
        doubt: bool ``[rows]``, the rows to judge.
        max_steps: the budget of a row.

    Returns:
        The corrected outcome; and bool ``[rows]``, the rows that go on with another cycle.
    """
    norm = size.where(doubt & (size < torch.inf), part.norm)
    # a restart that raises the residual has reached the level of rounding
    worse = doubt & (norm > start_norm)
    x, norm = start.where(worse[:, None], part.x), start_norm.where(worse, norm)
    converged = norm <= _MARGIN * tolerance
    finite = part.status != Status.NONFINITE
    spent = part.steps >= max_steps
    live = doubt & ~converged & finite & ~spent & (norm < _PROGRESS * start_norm)
    failure = torch.where(spent, int(Status.MAX_STEPS), int(Status.BREAKDOWN))
    verdict = torch.where(converged, int(Status.CONVERGED), failure).where(finite | converged, part.status)
    status = verdict.where(doubt, part.status)
    return part._replace(x=x, norm=norm, gap=part.gap.masked_fill(doubt, 0.0), status=status), live
