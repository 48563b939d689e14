"""Solves whose numbers are so small, or so large, that their squares underflow or overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.precision import safe_norm, widened, working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.system import largest
from torchimplicit.solution import Status
from torchimplicit.solvers.base import Evaluator, Solver
from torchimplicit.solvers.result import SolverResult, Units, relative_to, worst
from torchimplicit.solvers.review import after, seen_at
from torchimplicit.solvers.tolerance import Judge

MARGIN = 1e3
"""How far from where squares underflow or overflow norms are taken as they are."""

Solve = Callable[..., SolverResult]


@cache
def in_range(dtype: torch.dtype) -> tuple[float, float]:
    """Sizes between which squares neither underflow nor overflow, of them and of what the rule compares with them."""
    number = torch.finfo(dtype)
    return MARGIN * number.tiny**0.5 / number.eps, number.max**0.5 / MARGIN


def lowest_first(rtol: float | Tensor, dtype: torch.dtype) -> float:
    """The first terms from which on a residual that underflows is within the tolerance anyway: its floor is ``eps *
    rtol`` of them."""
    number = torch.finfo(dtype)
    least = number.eps * rtol if isinstance(rtol, float) else 0.0
    return 10 * number.tiny**0.5 / least if least else math.inf


def extreme(size: Tensor) -> Tensor:
    """bool, number by number, whether sizes that solutions are judged by are so small or so large that the squares of
    what is compared with them may underflow or overflow."""
    lowest, highest = in_range(size.dtype)
    return (size <= lowest) | (size >= highest)


def extreme_at_first(judge: Judge, size: Tensor, lowest: float) -> Tensor:
    """bool ``[batch]``, whether the first terms are beyond ``lowest`` or the upper end of the range; or where they are
    not known, the first residual of this ``size`` (``[batch]`` or ``[batch, leaves]``), or the first state, of which
    zero is a start like any other."""
    first, measure = judge.first, judge.measure
    if first is not None:
        first = first if first.ndim == 1 else first.amax(dim=1)
        return (first <= lowest) | (first >= in_range(first.dtype)[1])
    odd = extreme(size if size.ndim == 1 else size.amax(dim=1))
    if measure is None:
        return odd
    state = measure.since if measure.since.ndim == 1 else measure.since.amax(dim=1)
    return odd | (extreme(state) & (state > 0))


def first_units(system: System, point: Point, params: Sequence[Tensor], first: Tensor | None = None) -> Units | None:
    """The units of a problem that is small or large as a whole at the first ``point``, as one in SI units of atoms is
    in single precision; ``None`` where it is not, or cannot be stated in others.

    Args:
        first: the sizes of the first residual, of a point that is not the first.
    """
    if system.in_units(1.0, 1.0) is None or any(map(is_transformed, (point.z, *params))):
        return None
    with torch.no_grad():
        state, size = system.sizes(point, params, first)
        if state == 0 and size > 0:
            guess = system.in_units(size, size)
            assert guess is not None
            state = _step_length(system, point.z, params) or size * _step_length(guess, point.z, params)
    lowest, highest = in_range(working_dtype(point.z.dtype))
    if not (state > 0 and size > 0):
        return None
    sizes = state, size, system.residual_unit(state, size)
    return None if lowest < min(sizes) and max(sizes) < highest else Units(_power(state), _power(size))


def _step_length(system: System, z: Tensor, params: Sequence[Tensor]) -> float:
    """How far a step goes from ``z``, by a product of the Jacobian with the residual; zero where that is not known."""
    evaluate = Evaluator(system, params)
    residual = widened(evaluate(z).residual)
    size = largest(residual)
    image = evaluate.product(z, (residual / size).to(z.dtype)) if size > 0 else None
    moved = 0.0 if image is None else largest(safe_norm(widened(image)))
    return size / moved if 0 < moved < math.inf else 0.0


def examined(
    solve: Solve, outcome: SolverResult, judge: Judge, solver: Solver, system: System, params: Sequence[Tensor]
) -> SolverResult:
    """Judge again an outcome whose sizes are :func:`extreme`, without counting these evaluations.

    Where the state began at zero, and turns out to be small as a whole, it goes on in units of what it has become.
    Elsewhere a sample that is only said to be solved since the square of its residual underflows, as on the way down
    :math:`e^{-z}`, is not.

    Args:
        solve: runs a solver, see :func:`~torchimplicit.solvers.iterate.iterate`.
        judge: the rule of the loop that led here, for its first batch.
    """
    if any(map(is_transformed, (outcome.z, *params))):
        return outcome
    if not bool((outcome.report.status != Status.NONFINITE).any()):
        return outcome
    assert outcome.norm is not None
    with torch.no_grad():
        point = system.at(outcome.z, params)
        moves = (point.residual != 0).any(dim=1)
        least = outcome.norm
        if judge.measure is not None:  # beside a state whose norm underflows, every step is short
            least = torch.minimum(least, judge.measure.recent)
        least = least if least.ndim == 1 else least.amin(dim=1)
        hidden = outcome.report.converged & (least <= MARGIN * torch.finfo(least.dtype).tiny ** 0.5) & moves
        units = None
        if judge.measure is not None and bool(moves.any()) and not bool(judge.measure.since.any()):
            units = first_units(system, point, params, judge.measure.first)
        report = outcome.report
        blind = report.converged & (report.steps == 0) & _vanished(system, outcome.z, params)
        status = report.status.masked_fill(blind, int(Status.BREAKDOWN))
        outcome = replace(outcome, report=replace(report, status=status))
    if units is not None and units.state < 1:
        return after(outcome, solved_in(units, solve, solver, system, outcome.z, params, only=moves), moves)
    return _confirmed(outcome, hidden, point, judge, system, params) if bool(hidden.any()) else outcome


def _power(size: float) -> float:
    return 2.0 ** (math.frexp(size)[1] - 1)


def solved_in(
    units: Units,
    solve: Solve,
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
    only: Tensor | None = None,
    since: Tensor | None = None,
) -> SolverResult:
    """The outcome of the problem in other units, in its own; see :func:`~torchimplicit.solvers.iterate.iterate`."""
    restated = system.in_units(*units)
    assert restated is not None
    restated.anew(params)
    residual = system.residual_unit(*units)
    changes: dict[str, Any] = {}
    if solver.atol is not None:
        changes["atol"] = pytree.tree_map(lambda a: a / residual, solver.atol)
    since = None if since is None else since / units.state
    outcome = solve(replace(solver, **changes), restated, z0 / units.state, params, only=only, since=since)
    system.anew(params)
    return replace(
        outcome.multiplied(units.state, residual),
        # an inverse of a fixed point's Jacobian has no unit
        state=outcome.state if isinstance(system, FixedPointSystem) else None,
        units=units,
    )


@torch.no_grad()
def beside_others(outcome: SolverResult, solver: Solver, system: System, params: Sequence[Tensor]) -> SolverResult:
    """An outcome that was found in other units, without the samples that are so much smaller than the largest of the
    batch that their residuals vanish in these units: claimed to be solved, they have to be so in the problem's own."""
    norm = outcome.norm
    if norm is None or not bool((outcome.report.converged & ~_seen(norm)).any()):
        return outcome
    seen = seen_at(Evaluator(system, params), outcome.z)
    if seen is None or seen[0].scale is not None:
        return outcome
    judge = Judge(system, seen[0], solver.rtol, solver.atol)
    assert judge.measure is not None
    judge.measure.recent = system.safe_norms(outcome.z)
    solved, _, parts = judge.look(*seen, closely=False, norms_of=system.safe_norms)
    system.anew(params)
    restated = None if outcome.units is None else system.in_units(*outcome.units)
    if restated is not None and outcome.units is not None:
        solved = solved & ~_vanished(restated, outcome.z / outcome.units.state, params)
    denied = outcome.report.converged & ~_seen(norm) & ~solved
    status = outcome.report.status.masked_fill(denied, int(Status.BREAKDOWN))
    residual = torch.where(denied, worst(parts).to(outcome.report.residual.dtype), outcome.report.residual)
    return replace(outcome, report=replace(outcome.report, status=status, residual=residual))


def _vanished(system: System, z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """bool ``[batch]``, the samples whose least squares are zero though they are squares of something."""
    residuals = getattr(system, "residuals", None)
    if residuals is None:
        return torch.zeros_like(z[:, 0], dtype=torch.bool)
    energy = system.at(z, params).energy
    assert energy is not None
    return (energy == 0) & (residuals(z, *params) != 0).any(dim=1)


def _seen(norm: Tensor) -> Tensor:
    """bool ``[batch]``, the samples none of whose residuals has vanished."""
    return norm > 0 if norm.ndim == 1 else (norm > 0).all(dim=1)


@torch.no_grad()
def _confirmed(
    outcome: SolverResult, hidden: Tensor, point: Point, judge: Judge, system: System, params: Sequence[Tensor]
) -> SolverResult:
    """The outcome without the samples among ``hidden`` (bool ``[batch]``) that the rule does not find solved by norms
    which underflow nowhere."""
    report, norms_of = outcome.report, system.safe_norms
    assert outcome.norm is not None
    size, measure = norms_of(point.residual), judge.measure
    if measure is not None:
        seen = seen_at(Evaluator(system, params), outcome.z)
        if seen is None:
            return outcome
        measure.recent = torch.maximum(norms_of(outcome.z), measure.recent)
        solved, _, parts = judge.look(*seen, closely=False, norms_of=norms_of)
    elif point.image is not None and judge.floor is not None:
        terms = norms_of(point.image)
        solved = size <= judge.rtol * terms + judge.floor
        solved, parts = solved if solved.ndim == 1 else solved.all(dim=1), relative_to(size, terms)
    else:
        return outcome
    denied = hidden & ~solved
    figures = replace(
        report,
        status=report.status.masked_fill(denied, int(Status.BREAKDOWN)),
        residual=torch.where(hidden, worst(parts).to(report.residual.dtype), report.residual),
    )
    column = hidden if size.ndim == 1 else hidden[:, None]
    known = outcome.parts
    return replace(
        outcome,
        report=figures,
        norm=torch.where(column, size, outcome.norm),
        parts=None if known is None else torch.where(column, parts, known),
    )
