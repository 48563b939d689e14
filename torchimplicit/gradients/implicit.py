"""Exact derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.captured import Passes
from torchimplicit.closure import is_transformed
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.figures import report
from torchimplicit.gradients.nodes import DerivativeRule, LinearSolve, vjp_params
from torchimplicit.gradients.transforms import Grads, jvp
from torchimplicit.linear import LinearSolution, LinearSolver
from torchimplicit.problems.linearization import Linearization
from torchimplicit.saved import past_hooks
from torchimplicit.solvers import Solver
from torchimplicit.solvers.result import Units
from torchimplicit.validation import check_type


@final
@dataclass(frozen=True, kw_only=True)
class Implicit(DerivativeRule):
    """The exact derivative at the solution, to any order and in every mode (reverse, forward, ``torch.func``).

    The backward pass solves :math:`A^T g = u` and returns :math:`-R_\\theta^T g`; for a fixed point that is
    :math:`g = (I - J^T)^{-1} u`, :math:`\\bar\\theta = f_\\theta^T g`. The error of the derivative comes from two
    solves: that of the solution, and that of the adjoint, whose figures are in ``solution.adjoint``.

    Args:
        linear_solver: for the adjoint system; ``None``: :class:`~torchimplicit.linear.Dense` where it is small, else
            :class:`~torchimplicit.linear.KrylovOrDense`, with GMRES, or with MINRES for a minimum.

    Raises:
        TypeError: ``linear_solver`` is not a linear solver.
    """

    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)

    def passes(self, solver: Solver) -> Passes:
        return Passes(solver=solver, solved=True, linear_solver=self.linear_solver)

    def tape(
        self, task: SolveTask, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Linearization | None:
        """The tape of the residual; none where the backward pass is compiled."""
        if task.linear.capture is not None and task.linear.capture.pulls:
            return None
        tape = task.recorded(z, params, needs_grad)
        tape.look()
        return tape

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        """:math:`A^{-1}b`, or :math:`A^{-T}b` if ``transposed``, at the tape's point; on plain tensors."""
        solver = task.linear.adjoint_solver(self.linear_solver, tape.z)
        solution = task.system.solve_linear(tape, transposed, b, solver)
        report(task.linear.record, solution.report)
        return solution

    def adjoint(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        """See :meth:`DerivativeRule.adjoint`; differentiable."""
        solver = task.linear.adjoint_solver(self.linear_solver, z)
        if not torch.is_grad_enabled() and not any(map(is_transformed, (u, z, *params))):
            coupling = task.system.coupling
            if task.linear.capture is not None and not (coupling is not None and coupling.found):
                compiled = task.linear.capture.pull(u, z, params, needs_grad)
                if compiled is not None:
                    report(task.linear.record, compiled.report)
                    return compiled.grads
            if task.linear.results and (units := task.linear.results[-1].units) is not None:
                return self._in_units(task, units, u, z, params, needs_grad)
            # nobody differentiates the result: solve and pull back over one tape, without further nodes
            tape, solution = task.linear.solve(solver, True, u, z, params, needs_grad)
            report(task.linear.record, solution.report)
            grads = task.system.vjp_params(tape, solution.value)
            return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))
        g = LinearSolve.apply(task.linear, solver, True, u, z, *params)
        return vjp_params(task.linear, -g, z, params, needs_grad)

    def _in_units(
        self,
        task: SolveTask,
        units: Units,
        u: Tensor,
        z: Tensor,
        params: Sequence[Tensor],
        needs_grad: Sequence[bool],
    ) -> Grads:
        """The adjoint in the units that the problem was solved in: in its own, products may overflow."""
        if task.linear.tape is not None:
            task.linear.tape.check()
        system = task.system.in_units(*units)
        assert system is not None
        with past_hooks():
            system.anew(params)
            tape = system.linearize(z / units.state, params, needs_grad)
            solution = system.solve_linear(
                tape, True, u * units.state, task.linear.adjoint_solver(self.linear_solver, z)
            )
            grads = system.vjp_params(tape, solution.value)
            task.system.anew(params)
        report(task.linear.record, solution.report)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))

    def tangent(self, task: SolveTask, z: Tensor, params: Sequence[Tensor], dparams: Sequence[Tensor | None]) -> Tensor:
        """See :meth:`DerivativeRule.tangent`; differentiable."""
        moved = jvp(lambda *params: task.system.residual(z, *params), params, dparams)
        if moved is None:
            return torch.zeros_like(z)
        return LinearSolve.apply(
            task.linear, task.linear.adjoint_solver(self.linear_solver, z), False, -moved, z, *params
        )
