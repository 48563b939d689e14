"""What every gradient estimator is, and what it is given."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchimplicit.auxiliary import Auxiliary
from torchimplicit.captured import Passes
from torchimplicit.closure import carries_derivative, is_transformed
from torchimplicit.gradients.agreement import Agreement
from torchimplicit.gradients.linear_task import LinearTask
from torchimplicit.gradients.randomness import Randomness
from torchimplicit.gradients.start import Start
from torchimplicit.members import known_by
from torchimplicit.problems import System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.linearization import Linearization
from torchimplicit.saved import past_hooks
from torchimplicit.solvers import Solver, SolverResult, iterate

Runner = Callable[[System, Start, Sequence[Tensor]], SolverResult]


def run_by(solver: Solver, recorded: int | None = None) -> Runner:
    """By ``solver``; of a given number of steps, autograd sees so many of the last ones, ``None`` for all."""

    def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
        if torch.is_grad_enabled():  # what is known of the start has no history
            start.take_point()
        return iterate(solver, system, start.take(), params, start.take_point(), recorded)

    return run


class FlatSolution(NamedTuple):
    """A solution as autograd sees it, flat ``[batch, dim]``, with its figures ``[batch]``."""

    z: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class SolveTask:
    """One solve, as the estimators and the autograd nodes see it: how to solve, and where to linearize.

    Attributes:
        linear: the linear systems at the solution, with the system that is solved.
        start: where the solve begins.
        run: how: ``run(system, start, params)``, on plain tensors.
        solver: what ``run`` uses.
        records: whether the solution's tape is recorded in the forward pass, for the backward pass.
        randomness: told of the solve; ``None``: nobody looks.
        agreement: told of the solution's tape; ``None``: the function cuts nothing off.
        function: what the user gave for the problem.
        direct: whether autograd differentiates what the estimator evaluates, what the function captures among it,
            which ``params`` do not hold: grad mode is on then, and no transform runs.
        aux: what the function returns beside the state; ``None``: it does not, or nobody asks.
    """

    linear: LinearTask
    start: Start
    run: Runner
    solver: Solver
    records: bool = True
    randomness: Randomness | None = None
    agreement: Agreement | None = None
    function: Any = None
    direct: bool = False
    aux: Auxiliary | None = None

    @property
    def system(self) -> System:
        """What is solved."""
        return self.linear.system

    @property
    def results(self) -> list[SolverResult]:
        """What ``run`` gave, the latest last."""
        return self.linear.results

    def solve(self, params: Sequence[Tensor], *, given_away: bool = True) -> FlatSolution:
        """Runner without recording gradients.

        Args:
            given_away: whether the solution itself is what the user gets.
        """
        if self.randomness is not None:
            self.randomness.begin(self.start.z)
        with torch.no_grad(), past_hooks():
            outcome = self.run(self.system, self.start.fixed(), params)
            self.system.prepare(outcome.z, params)
            if self.randomness is not None:
                self.randomness.end(outcome.z, params)
        report = outcome.report
        # what a function returns may be its argument, a buffer or a parameter, and a solver's iterate what it returned;
        # a point that is shared is the library's own
        z = outcome.z.clone() if self.linear.shared is None and given_away else outcome.z
        # the note is of what is given away, or of the last iterate where those are kept: no copy is held for it alone.
        # But a node gives z itself a history that leads back to this task: the note must not close that cycle, or else
        # what the solver has built would stay in memory until Python looks for cycles
        kept = bool(outcome.trajectory) and outcome.trajectory[-1] is outcome.z
        self.results.append(replace(outcome, z=(outcome.z if kept else z).detach()))
        return FlatSolution(z, report.status, report.steps, report.residual)

    def spent(self, evaluations: int) -> None:
        """Count evaluations of the whole batch that the estimator makes in the forward pass, after the solve."""
        self.results[-1] = self.results[-1].having_spent(evaluations)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> SolveTask:
        """The task of ``size`` copies, see :meth:`System.vmapped`."""
        return replace(self, linear=self.linear.vmapped(size, dims), randomness=None, aux=None)

    def recorded(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Linearization:
        """The tape at the solution, for the backward pass."""
        opening = self.start.take_recorded()
        if opening is not None:
            out, (start, *params) = opening
            assert isinstance(self.system, FixedPointSystem)
            return Linearization.recorded(self.system.image, start, params, needs_grad, self.system.leaves, out)
        tape = None if self.linear.shared is None else self.linear.shared.tape(z, params, needs_grad)
        return self.system.linearize(z, params, needs_grad) if tape is None else tape


class Gradient(ABC):
    """How the solution is differentiated. A subclass is a final, frozen dataclass.

    Attributes:
        needs_solver_state: whether the estimator uses what the solver has built, so that no sample may leave the batch
            before the end, ``rowwise=True`` or not.
    """

    needs_solver_state: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False
    """Whether the value is what steps of the estimator's own lead to, which autograd sees."""

    def passes(self, solver: Solver) -> Passes:
        """What ``compile=True`` compiles of a solve by ``solver``."""
        if not self.needs_solver_state:
            return Passes(solver=solver)
        return Passes(solver=solver, refusal=f"{type(self).__name__} needs the steps that the eager loop takes")

    @abstractmethod
    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        """Solve, and give the solution this estimator's derivative in ``params``."""

    def recorded(self, solver: Solver) -> int | None:
        """Where ``solver`` takes a given number of steps, and autograd differentiates all that the estimator makes of
        them: how many of the last of them it is to see. The function need not be called to find what it captures then.
        ``None`` elsewhere."""
        return None

    def supports(self, system: System, solver: Solver) -> None:
        """Check that the estimator can differentiate this solve.

        Raises:
            ValueError: it cannot; the message says what to take instead.
        """


def refuse_detached(task: SolveTask, z: Tensor, params: Sequence[Tensor]) -> None:
    """Raise where autograd does not see how the problem's function depends on its state, though it does: what steps of
    it are differentiated to would be a part of their derivative. Looked at once for each function, by an evaluation
    that is not counted.

    Raises:
        ValueError: it is such a function.
    """
    known = known_by(task.function)
    if known in _seen or any(map(is_transformed, (z, *params))):
        return
    quiet = nullcontext() if task.aux is None else task.aux.unheard()
    with torch.enable_grad(), past_hooks(), torch.random.fork_rng([z.device] if z.device.type == "cuda" else []), quiet:
        tape = task.system.linearize(z.detach(), params)
        tape.look()
        if task.agreement is not None:
            task.agreement.check(tape)
    _seen.add(known)


_seen: weakref.WeakSet[Any] = weakref.WeakSet()
"""Functions that autograd sees through."""


def owned(task: SolveTask, z: Tensor) -> Tensor:
    """The last iterate, as something to give away: a copy, for it may be an argument, a buffer or a parameter that the
    function returned, unless its history tells that it is none."""
    base = z._base if task.direct and z._is_view() else z
    return z if task.direct and base is not None and base.grad_fn is not None else z.clone()


def differentiable(params: Sequence[Tensor]) -> bool:
    """Whether any derivative can be asked with respect to ``params``."""
    if torch.is_grad_enabled():
        return any(carries_derivative(p) for p in params)
    return any(is_transformed(p) for p in params)
