"""Refreshed equilibria: a few evaluations of the cell from a remembered state, in place of a solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.closure import is_transformed, transforms_running
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.gradients import Gradient, Implicit, LinearEstimate, NeumannPhantom
from torchimplicit.gradients.base import FlatSolution, SolveTask, run_by
from torchimplicit.gradients.figures import truncated
from torchimplicit.precision import without_autocast
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Status
from torchimplicit.solvers import FixedPointIteration, Solver
from torchimplicit.state import row_norm


def refreshes(gradient: Gradient | None) -> bool:
    """Return whether the estimator can differentiate a refreshed state: it needs only products with the Jacobian."""
    gradient = gradient or Implicit()
    return isinstance(gradient, Implicit | LinearEstimate) and not gradient.needs_solver_state


def refreshable(tensors: Sequence[Any]) -> bool:
    """Return whether no ``torch.func`` transform runs."""
    return not transforms_running() and not any(is_transformed(t) for t in tensors if isinstance(t, Tensor))


def refreshing(steps: int, gradient: Gradient | None) -> dict[str, Any]:
    """The strategies of a solve that takes ``steps`` steps from a remembered state."""
    gradient = gradient or Implicit()
    assert isinstance(gradient, Implicit | LinearEstimate)
    return {"solver": FixedPointIteration(steps=steps), "gradient": AtLastStep(inverse=gradient)}


@final
@dataclass(frozen=True, kw_only=True)
class AtLastStep(Gradient):
    """Derivatives with the Jacobian before the last step of a solve with a fixed number of steps, for fixed points.

    The last step is recorded for the backward pass, so that nothing is evaluated twice: with a truncated series of T
    products, a training step costs one evaluation, T products with the Jacobian, and the pass to the parameters (Huang
    et al. 2021). Only first derivatives in reverse mode are supported; others raise.

    Args:
        inverse: the estimator whose adjoint vector is pulled back through the step.
    """

    inverse: Implicit | LinearEstimate = field(default_factory=Implicit)

    def recorded(self, solver: Solver) -> int | None:
        return 1

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        assert task.solver.steps
        before = task.solver.given(task.solver.steps - 1)
        start = replace(task, run=run_by(before)).solve(params, given_away=False).z
        # autograd follows the parameters into the function by itself; only the state is a leaf of the tape, whose
        # products with the Jacobian the adjoint needs
        system = FixedPointSystem(fn=lambda z: task.system.fn(z, *params))
        if torch.is_grad_enabled():
            tape = system.linearize(start, ())
            image = tape.out
            if image.requires_grad:
                image = _Adjoint.apply(
                    image, replace(task, linear=replace(task.linear, system=system)), self.inverse, tape
                )
        else:
            image = system.fn(start)
        task.spent(1)
        outcome = task.results[-1]
        value = image.detach()
        norm, scale = row_norm(value - start), row_norm(value)
        residual = norm / scale.clamp_min(torch.finfo(norm.dtype).tiny)
        status = torch.where(residual.isfinite(), int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        report = replace(outcome.report, status=status, steps=outcome.report.steps + 1, residual=residual)
        task.results[-1] = replace(outcome, z=value, report=report, norm=norm, parts=residual)
        return FlatSolution(image, status, report.steps, residual)


class _Adjoint(Function):
    """The identity, whose backward pass replaces the cotangent u by an estimate of :math:`(I-J^T)^{-1}u`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, task: SolveTask, inverse: Any, tape: Linearization) -> Tensor:
        ctx.task, ctx.inverse, ctx.tape = task, inverse, tape
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                "WarmStart(refresh=...) supports first derivatives only, without create_graph: use WarmStart(), which "
                "solves, with gradient=Implicit()"
            )
        with without_autocast(u.device):
            return _adjoint_vector(ctx.task, ctx.inverse, ctx.tape, u), None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise UnsupportedDerivativeError(
            "WarmStart(refresh=...) does not support forward-mode derivatives: use WarmStart() without refresh"
        )


def _adjoint_vector(task: SolveTask, inverse: Implicit | LinearEstimate, tape: Linearization, u: Tensor) -> Tensor:
    """:math:`g\\approx(I-J^T)^{-1}u`."""
    if isinstance(inverse, NeumannPhantom):
        # apply would also compute the figures of a linear solve, which takes as long as the series on small states
        return _series(task, tape, u, inverse.steps, inverse.damping)
    solution = inverse.apply(task, tape, True, u)
    task.linear.record.report = solution.report
    return solution.value


def _series(task: SolveTask, tape: Linearization, u: Tensor, terms: int, damping: float) -> Tensor:
    """:math:`\\lambda\\sum_{i<k}(\\lambda J^T+(1-\\lambda)I)^iu`, in k - 1 products."""
    scaled = u if damping == 1.0 else damping * u
    g = scaled
    for _ in range(terms - 1):
        moved = tape.vjp(g)
        g = scaled + moved if damping == 1.0 else torch.add(scaled, torch.lerp(g, moved, damping))
    task.linear.record.report = truncated(u, terms, float(terms - 1))
    return g
