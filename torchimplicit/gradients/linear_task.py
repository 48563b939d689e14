"""The linear systems at a solution: where they are linearized, and how they are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchimplicit.captured import Capture
from torchimplicit.gradients.point import SharedPoint
from torchimplicit.gradients.smoothness import Smoothness
from torchimplicit.linear import LinearSolution, LinearSolver
from torchimplicit.precision import at_precision
from torchimplicit.problems import System
from torchimplicit.problems.linearization import Linearization, changed_since, check_unmoved
from torchimplicit.saved import past_hooks
from torchimplicit.solution import AdjointRecord
from torchimplicit.solvers import SolverResult


@dataclass(frozen=True, kw_only=True)
class LinearTask:
    """The linear systems with the Jacobian at one solution, as the estimators and the autograd nodes see them.

    Attributes:
        system: the system whose Jacobian it is.
        record: where a backward solve leaves its report.
        precision: the dtype in which autocast evaluates the system; ``None`` where it is off.
        results: the results of the solvers, the latest last. A list, since an autograd node cannot return them.
        shared: a point whose linear solves share their work; ``None``: each does its own.
        tape: that of the solution, if it was recorded in the forward pass; ``None``: the function is evaluated again.
        value: the value that was recorded there if the tape cannot be used, to check a second evaluation against.
        smoothness: warns where a second derivative is asked for that the function does not have.
        capture: the compiled form of the solve, where there is one.
    """

    system: System
    record: AdjointRecord
    precision: torch.dtype | None = None
    results: list[SolverResult] = field(default_factory=list)
    shared: SharedPoint | None = None
    tape: Linearization | None = None
    value: Tensor | None = None
    smoothness: Smoothness = field(default_factory=Smoothness)
    capture: Capture | None = None

    def adjoint_solver(self, chosen: LinearSolver | None, z: Tensor) -> LinearSolver:
        """``chosen``, or the system's default for the size of ``z``, at the precision of the evaluations."""
        return at_precision(chosen or self.system.default_linear_solver(z.shape[1], z.shape[0]), self.precision)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> LinearTask:
        """The linear systems of ``size`` copies, see :meth:`System.vmapped`."""
        value = None if self.tape is None else self.tape.out.detach().repeat(size, *(1,) * (self.tape.out.ndim - 1))
        system = self.system.vmapped(size, dims)
        return replace(self, system=system, shared=None, tape=None, value=value, capture=None)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        """The tape at the solution: that of the forward pass if there is one, else a new one."""
        if self.tape is not None:
            return self.tape
        self.system.check_representable(params)
        tape = self.system.linearize(z, params, needs_grad)
        # a function that has changed since the forward pass must not be differentiated in place of the old one
        if self.value is not None:
            check_unmoved(self.value, tape.out)
        elif self.capture is not None and self.results and z.shape[1]:
            self._check_residual(self.system.norms(self.system.on_tape(tape)))
        return tape

    def _check_residual(self, now: Tensor) -> None:
        """Raise where the residual at the solution is not that of the forward pass: for compiled solves, which record
        no value to compare with."""
        outcome = self.results[-1]
        norm, parts = outcome.norm, outcome.parts
        if norm is None or parts is None or norm.shape != now.shape:
            return
        terms = torch.where(parts > 0, norm / parts, torch.inf).nan_to_num(torch.inf)
        share = torch.finfo(now.dtype).eps ** 0.5 if now.dtype == torch.float64 else 0.02
        if bool(((now - norm).abs() > share * (norm + terms)).any()):
            changed_since()

    def solve(
        self,
        solver: LinearSolver,
        transposed: bool,
        b: Tensor,
        z: Tensor,
        params: Sequence[Tensor],
        needs_grad: Sequence[bool] | None = None,
    ) -> tuple[Linearization, LinearSolution]:
        """Solve :math:`A y = b` or :math:`A^T y = b` at ``z``, on plain tensors. Returns the tape, too, for the
        pullback."""
        tape = None if self.shared is None else self.shared.tape(z, params, needs_grad)
        with past_hooks():
            if self.shared is not None and tape is not None:
                self.smoothness.look(tape.out)
                return tape, self.shared.solve(tape, transposed, b)
            tape = self.linearize(z, params, needs_grad)
            self.smoothness.look(tape.out)
            return tape, self.system.solve_linear(tape, transposed, b, solver)
