"""The review after the loop: whether what it claims holds for the whole batch at the point that is returned.

The loop judges each sample when that sample stops, and by estimates. Two things can make its claim wrong: the scale of
a root's residual was measured from a step and not from the Jacobian, or other samples moved on afterwards and the
user's function couples them. The review evaluates the whole once more; samples that it denies go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.linear import LinearOperator
from torchimplicit.linear.confirmed import rows_depend
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solution import Report, Status
from torchimplicit.solvers.base import Evaluator, Solver
from torchimplicit.solvers.result import SolverResult, relative_to, worst
from torchimplicit.solvers.tolerance import Judge

LOOKS = 4
"""How often solving a function's samples as one system is tried in vain before it is given up for good."""


class Verdict(NamedTuple):
    """The result of a review.

    Attributes:
        outcome: with the figures of the whole problem.
        again: bool ``[batch]``, the samples that have to go on; ``None`` for none.
        coupled: whether samples were found to depend on each other although the solver treats them separately.
    """

    outcome: SolverResult
    again: Tensor | None = None
    coupled: bool = False


def review(solver: Solver, evaluate: Evaluator, outcome: SolverResult, judge: Judge, mixed: bool) -> Verdict:
    """Judge the outcome by the whole problem at the point that is returned.

    A root or a minimum is judged by one product with the Jacobian there. Newton's methods take such products in every
    step, so of theirs only the samples that they gave up are reviewed. Where samples may depend on each other and
    stopped at different steps, one evaluation of the whole batch shows their residuals beside each other.

    Args:
        judge: the loop's stopping rule for its first batch.
        mixed: whether the returned states may differ from those that were evaluated last.
    """
    z, coupling = outcome.z, evaluate.system.coupling
    apart = coupling is None or coupling.promised
    if judge.measure is None and (apart or not mixed):
        # the last evaluation was of exactly these states, or no sample can see the others: nothing new to learn
        return Verdict(outcome)
    # under a torch.func transform the numbers cannot be read, so nothing could be decided
    if not z.shape[0] or any(is_transformed(t) for t in (z, *evaluate.params)):
        return Verdict(outcome)
    if solver.searches and not apart and coupling is not None and coupling.found:
        return Verdict(outcome, coupled=True)
    with torch.no_grad():
        return _reviewed(solver, evaluate, outcome, judge, mixed and not apart)


def _reviewed(solver: Solver, evaluate: Evaluator, outcome: SolverResult, judge: Judge, mixed: bool) -> Verdict:
    z, report = outcome.z, outcome.report
    failed = report.status == Status.BREAKDOWN
    if solver.by_products:
        failed = failed | (report.status == Status.MAX_STEPS)
    if judge.measure is not None:
        claimed = report.converged if solver.wants_relative() and not solver.by_products else torch.zeros_like(failed)
        claims, failures = torch.stack((claimed, failed)).any(dim=1).tolist()
        seen = seen_at(evaluate, z) if claims or failures else None
        if seen is not None:
            return _by_product(solver, evaluate, outcome, judge, failed if failures else None, *seen)
    return _by_evaluation(solver, evaluate, outcome, judge) if mixed else Verdict(outcome)


def seen_at(evaluate: Evaluator, z: Tensor) -> tuple[Point, LinearOperator] | None:
    """The point at ``z`` and the Jacobian there; ``None`` where the function lacks the derivative."""
    try:
        tape = evaluate.system.linearize(z, evaluate.params)
        operator = evaluate.system.operator(tape, False)
        operator.product(torch.zeros_like(z))  # fails at the first product, not before
    except RuntimeError:
        return None
    return evaluate.system.seen(tape), operator


def _by_product(
    solver: Solver,
    evaluate: Evaluator,
    outcome: SolverResult,
    judge: Judge,
    failed: Tensor | None,
    point: Point,
    operator: LinearOperator,
) -> Verdict:
    report = outcome.report
    solved, drowned, parts = judge.look(point, operator, closely=failed is not None)
    if failed is not None and operator.symmetric and solver.confirms(evaluate.system, point.z):
        # a gradient of nothing but rounding is a minimum only where no eigenvalue of the Hessian is negative
        values = torch.linalg.eigvalsh(operator.spectrum_matrix(working_dtype(point.z.dtype)).nan_to_num(0.0, 0.0, 0.0))
        rounding = point.z.shape[1] * judge.eps * values.abs().amax(dim=1)
        drowned = drowned & (values[:, 0] >= -rounding)
    status, none = report.status, torch.zeros_like(solved)
    # ``looked``: whose figures are replaced. Newton's methods know their residual's scale from the same Jacobian.
    looked = failed if solver.by_products and failed is not None else ~none
    if solver.wants_relative():
        denied = none if solver.by_products else report.converged & ~solved
    else:
        denied, looked = none, none if failed is None else failed
    if failed is not None:
        status = status.masked_fill(failed & drowned, int(Status.CONVERGED))
    figures = torch.where(looked, worst(parts).to(report.residual.dtype), report.residual)
    if outcome.parts is not None:
        parts = torch.where(looked if parts.ndim == 1 else looked[:, None], parts, outcome.parts)
    outcome = replace(outcome, report=replace(report, status=status, residual=figures), parts=parts)
    coupling = evaluate.system.coupling
    suspect = denied
    if solver.searches and coupling is not None:
        # a search that got stuck may have fought a coupling it knows nothing of
        suspect = suspect | _stuck(status) | _changed(outcome, point, evaluate.system, judge.eps)
    again, odd = torch.stack((denied, suspect)).any(dim=1).tolist()  # one read from the device for both
    if odd and solver.searches and coupling is not None and not coupling.promised and rows_depend(operator):
        coupling.memory.found = True
        return Verdict(outcome, coupled=True)
    return _sent_on(solver, outcome, denied) if again else Verdict(outcome)


def _by_evaluation(solver: Solver, evaluate: Evaluator, outcome: SolverResult, judge: Judge) -> Verdict:
    report, system = outcome.report, evaluate.system
    point = evaluate(outcome.z)
    if judge.measure is not None:
        point = judge.measure.start(point)
    assert point.scale is not None
    norm = point.size()
    within = norm <= judge.tolerance(point)
    within = within if within.ndim == 1 else within.all(dim=1)
    parts = relative_to(norm, point.scale)
    changed = _changed(outcome, point, system, judge.eps)
    denied = report.converged & ~within
    if judge.measure is not None:
        # a point from ``start`` has no scale yet, so that every sample would be denied: deny those that have changed
        denied = denied & changed
    known = changed if judge.measure is None else torch.zeros_like(changed)
    figures = torch.where(known, worst(parts).to(report.residual.dtype), report.residual)
    evaluations = report.evaluations + 1
    outcome = replace(outcome, report=replace(report, residual=figures, evaluations=evaluations))
    if judge.measure is None:
        outcome = replace(outcome, norm=norm, parts=parts)
    suspect = changed | _stuck(report.status) if solver.searches else changed
    again, odd = torch.stack((denied, suspect)).any(dim=1).tolist()
    coupling = system.coupling
    if odd and solver.searches and coupling is not None:
        seen = seen_at(evaluate, outcome.z)
        if seen is None or rows_depend(seen[1]):
            coupling.memory.found = True
            return Verdict(outcome, coupled=True)
    return _sent_on(solver, outcome, denied) if again else Verdict(outcome)


def _changed(outcome: SolverResult, point: Point, system: System, eps: float) -> Tensor:
    """bool ``[batch]``: whether a sample's residual differs from the one at which it stopped, because others moved."""
    now = system.norms(point.residual)
    before = outcome.norm
    if before is None or before.shape != now.shape:
        return torch.zeros(len(now), dtype=torch.bool, device=now.device)
    # batched kernels sum in another order for another batch: neither a thousandth nor a few roundings are a coupling
    changed = (now - before).abs() > 1e-3 * before
    if point.scale is not None:
        changed = changed & ((now - before).abs() > 16 * eps * point.scale)
    changed = changed if changed.ndim == 1 else changed.any(dim=1)
    return changed & (outcome.report.status != Status.NONFINITE)


def _stuck(status: Tensor) -> Tensor:
    """bool ``[batch]``: the samples that got no further, as happens where a method ignores that samples are coupled."""
    return (status == Status.BREAKDOWN) | (status == Status.MAX_STEPS)


def _sent_on(solver: Solver, outcome: SolverResult, denied: Tensor) -> Verdict:
    """Send the ``denied`` samples on, as far as their budget of steps reaches."""
    report = outcome.report
    spent = denied & (report.steps >= solver.max_steps)
    status = report.status.masked_fill(spent, int(Status.MAX_STEPS))
    again = denied & ~spent
    outcome = replace(outcome, report=replace(report, status=status))
    return Verdict(outcome, again if bool(again.any()) else None)


def after(before: SolverResult, later: SolverResult, samples: Tensor | None) -> SolverResult:
    """Merge two results: ``later`` for ``samples`` (bool ``[batch]``; ``None``: all), ``before`` for the others.

    Steps and evaluations of ``samples`` add up; trajectories are joined end to end.
    """
    one, two = before.report, later.report
    if samples is None:
        samples = torch.ones_like(one.status, dtype=torch.bool)
    report = Report(
        torch.where(samples, two.status, one.status),
        one.steps + torch.where(samples, two.steps, 0),
        torch.where(samples, two.residual, one.residual),
        one.evaluations + two.evaluations,
    )

    def joined(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None or new.shape != old.shape:
            return new
        return torch.where(samples if old.ndim == 1 else samples[:, None], new, old)

    z = torch.where(samples[:, None], later.z, before.z)
    trajectory = before.trajectory + later.trajectory[1:]
    norm, parts = joined(later.norm, before.norm), joined(later.parts, before.parts)
    trace, units = before.trace + later.trace[1:], later.units or before.units
    return SolverResult(z, report, trajectory, later.state, norm, parts, trace, units=units)


def given_up(outcome: SolverResult, samples: Tensor) -> SolverResult:
    """Mark ``samples`` as broken down: the method takes them for solved again and again, and the Jacobian disagrees."""
    status = outcome.report.status.masked_fill(samples, int(Status.BREAKDOWN))
    return replace(outcome, report=replace(outcome.report, status=status))


Solve = Callable[[Solver, System, Tensor, Sequence[Tensor]], SolverResult]


def tried_as_one(solve: Solve, solver: Solver, evaluate: Evaluator, outcome: SolverResult) -> SolverResult:
    """Where a method with memory gave up and samples depend on each other, solve on with all samples as one system.

    If that converges, it is remembered for the function, and the next solve starts so; if it fails ``LOOKS`` times, it
    is not tried again.
    """
    system, coupling = evaluate.system, evaluate.system.coupling
    if coupling is None or coupling.promised or coupling.memory.looks >= LOOKS:
        return outcome
    memory = coupling.memory
    memory.looks += 1
    if not memory.found:
        seen = seen_at(evaluate, outcome.z)
        if seen is None or not rows_depend(seen[1]):
            return outcome
        memory.found = True
    together = as_one_system(solve, solver, system, outcome.z, evaluate.params)
    if together is None:
        return outcome
    if bool(together.report.converged.all()):
        memory.looks, memory.together = 0, True
    return after(outcome, together, together.report.converged)


def as_one_system(
    solve: Solve,
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
) -> SolverResult | None:
    """Solve samples that depend on each other as one system, each of them judged by its own residual; ``None`` where
    the problem cannot be joined."""
    assert system.coupling is not None
    rows = system.coupling.rows
    joined = system.joined(rows, z0, params)
    if joined is None:
        return None
    changes: dict[str, Any] = {}
    for name in ("rtol", "atol"):
        value = getattr(solver, name)
        if value is not None and not isinstance(value, (int, float)):
            changes[name] = tuple(pytree.tree_leaves(value)) * rows  # every sample's leaves are leaves of the joined
    # a preconditioner is made for one sample's matrix, and has the wrong size for the joined one
    if getattr(solver, "preconditioner", None) is not None:
        changes["preconditioner"] = None
    linear_solver = getattr(solver, "linear_solver", None)
    if linear_solver is not None and linear_solver.preconditioned:
        changes["linear_solver"] = None
    whole = solve(replace(solver, **changes), joined, z0.reshape(-1, rows * z0.shape[1]), params)

    def each(t: Tensor) -> Tensor:
        return t.repeat_interleave(rows, dim=0)

    report = whole.report
    assert whole.parts is not None
    assert whole.norm is not None
    norm, parts = whole.norm.reshape(len(z0), -1), whole.parts.reshape(len(z0), -1)
    residual = worst(parts)
    if parts.shape[1] == 1:
        norm, parts = norm[:, 0], parts[:, 0]
    figures = Report(each(report.status), each(report.steps), residual, report.evaluations)
    trajectory = tuple(None if z is None else z.reshape(z0.shape) for z in whole.trajectory)
    trace = tuple((n.reshape(z0.shape[0], -1), p.reshape(z0.shape[0], -1)) for n, p in whole.trace)
    z = system.project(whole.z.reshape(z0.shape), params)
    return SolverResult(z, figures, trajectory, whole.state, norm, parts, trace)
