"""The loop for a prescribed number of steps, which tests nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from torchimplicit.problems import Point, System
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.solution import Report, Status
from torchimplicit.solvers.base import Evaluator, Progress, Solver
from torchimplicit.solvers.result import SolverResult, traced, worst
from torchimplicit.solvers.tolerance import Measure

_UNKNOWN = Progress(active=None, improving=False)


def take_steps(
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
    first: Point | None = None,
    recorded: int | None = None,
) -> SolverResult:
    """Take ``solver.steps`` steps from ``z0`` with all samples at once, as in a loop written by hand.

    The last iterate is not evaluated, and the host reads nothing from the device. A sample that goes non-finite stays
    so, and its status says it.

    Args:
        solver: the solver whose steps are taken.
        system: the problem in flat coordinates.
        z0: the start, ``[batch, dim]``.
        params: the system's parameters.
        first: the evaluation at ``z0``, where it has been made already.
        recorded: number of last steps that autograd records, where grad mode is on; ``None``: all.
    """
    count = solver.steps
    assert count is not None
    evaluate = Evaluator(system, params, rows_evaluated=0 if first is None or not count else len(z0))
    hidden = 0 if recorded is None else count - recorded
    # a kept iterate that shall be differentiable is recomputed from the one ``recorded`` steps before: keep that, too
    led = recorded if hidden and recorded else 0
    if hidden < count:
        solver.check_unrolled()
    straight = solver.straight and isinstance(system, ImageSystem) and not solver.keep_trace

    def kept(step: int, z: Tensor) -> Tensor | None:
        return z if solver.keeps(step) or (led and solver.keeps(step + led)) else None

    z = evaluate.project(z0 if not hidden else z0.detach())
    trajectory, trace = [kept(0, z)], []
    known, before, point, state = first, None, None, None
    for step in range(count):
        with torch.no_grad() if step < hidden else nullcontext():
            evaluate.begin(step + 1)
            if straight and known is None and step + 1 < count:  # only the last residual is reported
                z = evaluate.image(z)
                trajectory.append(kept(step + 1, z))
                continue
            before, point = point, evaluate(z) if known is None else known
            if before is None:
                if point.scale is None and solver.wants_product():  # the first step is in the problem's own units
                    point = point.changed(product=evaluate.product(point.z, point.residual))
                state = solver.start(point)
            elif known is None:
                point = system.refined(point, before)
            if solver.keep_trace:
                trace.append(traced(point))
            move = solver.step(evaluate, point, state, _UNKNOWN)
            state = move.state
            known = move.to if isinstance(move.to, Point) else None
            if isinstance(move.to, Point):
                z = move.to.z
            else:  # the image of a state lies in the constraint's set, as the state does
                z = move.to if move.to is point.image else evaluate.project(move.to)
            if point.scale is not None and point.judgement is None:
                point = point.sizes()  # free its vectors before the next evaluation
        trajectory.append(kept(step + 1, z))
    # a step that evaluates where it goes (a line search) has told the residual of the last iterate
    before, point = (before, point) if known is None or not count else (point, known)
    if solver.keep_trace and known is not None and count:
        trace.append(traced(known))
    with torch.no_grad():
        parts = relative(system, point, before, z)
        finite = z.isfinite().all(dim=1)
        status = torch.where(finite, int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        residual = worst(parts)
    report = Report(status, torch.full_like(status, count), residual, evaluate.rows_evaluated / max(len(z0), 1))
    norm = None if point is None else point.size().detach()
    kept_iterates = tuple(trajectory) if solver.keep_trajectory else ()
    return SolverResult(z, report, kept_iterates, state, norm, parts, tuple(trace))


def relative(system: System, point: Point | None, before: Point | None, z: Tensor) -> Tensor:
    """The relative residuals of the state that was evaluated last, ``[batch]`` or ``[batch, leaves]``; NaN where the
    size of its terms is unknown.

    Args:
        system: the problem.
        point: the last evaluation; ``None`` for none.
        before: the one before it, from which the terms of a root or a minimum are measured.
        z: the states, for the shape.
    """
    if point is None:
        return torch.full_like(z[:, 0], torch.nan) if z.shape[1] else z.new_zeros(len(z))
    if point.scale is None and before is not None:
        measure = Measure(system, before, 0.0)
        point = measure.step(point, measure.start(before))
    return traced(point)[1]
