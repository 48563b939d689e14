"""Exact derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.captured import Passes
from torchimplicit.closure import is_transformed
from torchimplicit.gradients.base import Task
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.nodes import DerivativeRule, LinearSolve, pulled
from torchimplicit.gradients.transforms import Grads, push
from torchimplicit.linear import LinearSolver
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solvers import Solver
from torchimplicit.validation import check_type


@final
@dataclass(frozen=True, kw_only=True)
class Implicit(DerivativeRule):
    """The exact derivative at the solution, to any order and in every mode (reverse, forward, ``torch.func``).

    Backward solves :math:`A^T g = u` and returns :math:`-R_\\theta^T g`; for a fixed point that is
    :math:`g = (I - J^T)^{-1} u`, :math:`\\bar\\theta = f_\\theta^T g`. The error of the derivative is that of the two
    solves: of the solution itself, and of the adjoint, whose figures are in ``solution.adjoint``.

    Args:
        linear_solver: for the adjoint system; ``None``: the dense system where it is small, else
            :class:`~torchimplicit.linear.KrylovOrDense`, with GMRES, or MINRES for a minimum.
    """

    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)

    def passes(self, solver: Solver) -> Passes:
        return Passes(solver=solver, solved=True, linear_solver=self.linear_solver)

    def tape(self, task: Task, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]) -> Linearization | None:
        """Of the residual; none where the backward pass is compiled."""
        if task.capture is not None and task.capture.pulls:
            return None
        tape = task.recorded(z, params, wanted)
        tape.look()
        return tape

    def adjoint(self, task: Task, u: Tensor, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]) -> Grads:
        """The cotangents of the wanted parameters; differentiable."""
        solver = task.adjoint_solver(self.linear_solver, z)
        if not torch.is_grad_enabled() and not any(is_transformed(t) for t in (u, z, *params)):
            coupling = task.system.coupling
            if task.capture is not None and not (coupling is not None and coupling.found):
                compiled = task.capture.pull(u, z, params, wanted)
                if compiled is not None:
                    report(task, compiled.report)
                    return compiled.grads
            tape, found = task.solve_linear(solver, True, u, z, params, wanted)  # one tape serves the pullback as well
            report(task, found.report)
            grads = task.system.pull(tape, found.value)
            return tuple(grad if w else None for grad, w in zip(grads, wanted, strict=True))
        g = LinearSolve.apply(task, solver, True, u, z, *params)
        return pulled(task, -g, z, params, wanted)

    def tangent(self, task: Task, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        """The tangent of the solution; differentiable."""
        moved = push(lambda *params: task.system.residual(z, *params), params, dparams)
        if moved is None:
            return torch.zeros_like(z)
        return LinearSolve.apply(task, task.adjoint_solver(self.linear_solver, z), False, -moved, z, *params)
