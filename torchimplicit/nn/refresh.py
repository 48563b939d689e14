"""An equilibrium carried along by a few evaluations of the cell, in place of a solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.closure import is_transformed, transforms_running
from torchimplicit.errors import SolveError, UnsupportedDerivativeError
from torchimplicit.gradients import Gradient, Implicit, NeumannPhantom
from torchimplicit.gradients.base import Task
from torchimplicit.gradients.figures import report, truncated
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.precision import without_autocast
from torchimplicit.problems import FixedPoint
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import AdjointRecord, Solution, Status
from torchimplicit.solvers import Anderson, Solver
from torchimplicit.state import Layout, row_norm


def refreshes(gradient: Gradient | None) -> bool:
    """Whether the estimator can differentiate a refreshed state: it asks for products with the Jacobian only."""
    return isinstance(gradient or Implicit(), Implicit | LinearEstimate) and not getattr(
        gradient, "needs_solver_state", False
    )


def refreshable(tensors: Sequence[Any]) -> bool:
    """Whether no ``torch.func`` transform runs."""
    return not transforms_running() and not any(is_transformed(t) for t in tensors if isinstance(t, Tensor))


def refreshed(
    problem: FixedPoint,
    z: Any,
    args: tuple[Any, ...],
    *,
    steps: int,
    solver: Solver | None,
    gradient: Gradient | None,
    throw: bool,
) -> Solution:
    """``steps`` applications of the map to ``z``, the last of them recorded for the backward pass too.

    The value is :math:`f^k(z)`; its derivative is the estimator's with the Jacobian at the state before the last
    application, so that nothing is evaluated twice: with a truncated series of T products, a training step costs one
    evaluation, T products with the Jacobian, and the pass to the parameters (Huang et al. 2021). First
    derivatives only, in reverse mode; others raise.

    The residual that the solution reports is that of the state before the last application.
    """
    layout = Layout.of(z, problem.batched)
    start = layout.flatten(z, "z0").detach()
    rows = start.shape[0]

    def fn(flat: Tensor) -> Tensor:
        output = problem.function(layout.unflatten(flat), *args)
        return problem.flat_output(layout, output, rows, torch.is_autocast_enabled(flat.device.type))

    with torch.no_grad():
        for _ in range(steps - 1):
            start = fn(start)
    record = AdjointRecord()
    if torch.is_grad_enabled():
        system = FixedPointSystem(fn=fn)
        tape = system.linearize(start, ())
        image = tape.out
        if image.requires_grad:
            task = Task(system=system, run=_never, solver=solver or Anderson(), record=record)
            image = cast(Tensor, _Adjoint.apply(image, task, gradient or Implicit(), tape))
    else:
        image = fn(start)
    with torch.no_grad():
        scale = row_norm(image).clamp_min(torch.finfo(layout.dtype).tiny)
        norm = row_norm(image.detach() - start)
        residual = norm / scale
        tolerance = (solver or Anderson()).relative_tolerance(layout.dtype)
        status = torch.where(residual <= tolerance, int(Status.CONVERGED), int(Status.STEPS_TAKEN))
        status = status.masked_fill(~residual.isfinite(), int(Status.NONFINITE))
    count = torch.full_like(status, steps)
    figures = (status, count, residual) if problem.batched else (status[0], count[0], residual[0])
    solution = Solution(
        layout.unflatten(image),
        *figures,
        float(steps),
        problem=problem,
        args=args,
        _norms=(norm, ()),
        _record=record,
    )
    if throw and bool((status == Status.NONFINITE).any()):
        raise SolveError(
            "the refreshed state met NaN or infinity: the map has stopped being a contraction, or the input is bad. "
            "error.solution holds every sample's result; throw=False returns it",
            solution,
        )
    return solution


def _never(*_: Any) -> Any:
    raise AssertionError("a refreshed state is not solved for")


class _Adjoint(Function):
    """Identity whose cotangent is replaced by the adjoint's estimate."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, task: Task, gradient: Any, tape: Linearization) -> Tensor:
        ctx.task, ctx.gradient, ctx.tape = task, gradient, tape
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                "a state that WarmStart(refresh=...) has carried along has first derivatives only, and create_graph or "
                "a second derivative was asked for: take WarmStart(), which solves, with gradient=Implicit()"
            )
        with without_autocast(u.device):
            return _estimated(ctx.task, ctx.gradient, ctx.tape, u), None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedDerivativeError(
            "a refreshed state has no forward derivative: take WarmStart() without refresh"
        )


def _estimated(task: Task, gradient: Implicit | LinearEstimate, tape: Linearization, u: Tensor) -> Tensor:
    """:math:`g\\approx(I-J^T)^{-1}u`."""
    if isinstance(gradient, Implicit):
        solver = task.adjoint_solver(gradient.linear_solver, tape.z)
        found = task.system.solve_linear(tape, True, u, solver)
        report(task, found.report)
        return found.value
    if isinstance(
        gradient, NeumannPhantom
    ):  # without the figures of a linear solve, which take as long on small states
        return _series(task, tape, u, gradient.steps, gradient.damping)
    found = gradient.apply(task, tape, True, u)
    task.record.report = found.report
    return found.value


def _series(task: Task, tape: Linearization, u: Tensor, terms: int, damping: float) -> Tensor:
    """:math:`\\lambda\\sum_{i<k}(\\lambda J^T+(1-\\lambda)I)^iu`, in k - 1 products."""
    scaled = u if damping == 1.0 else damping * u
    g = scaled
    for _ in range(terms - 1):
        moved = tape.vjp(g)
        g = scaled + moved if damping == 1.0 else torch.add(scaled, torch.lerp(g, moved, damping))
    task.record.report = truncated(u, terms, float(terms - 1))
    return g
