"""The interface of a gradient estimator, and the task that it is given."""

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
from torchimplicit.records import changed
from torchimplicit.saved import past_hooks
from torchimplicit.solvers import Solver, SolverResult, iterate

Runner = Callable[[System, Start, Sequence[Tensor]], SolverResult]


def run_by(solver: Solver, recorded: int | None = None) -> Runner:
    """A runner that solves with ``solver``. Where its number of steps is prescribed, autograd records the last
    ``recorded`` of them (``None``: all)."""

    def run(system: System, start: Start, params: Sequence[Tensor]) -> SolverResult:
        if torch.is_grad_enabled():  # the evaluation at the start was not recorded: drop it
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
    """One solve as the estimators and the autograd nodes see it: how to solve, and where to linearize.

    Attributes:
        linear: the linear systems at the solution, with the system that is solved.
        start: where the solve begins.
        run: solves: ``run(system, start, params)``, on plain tensors.
        solver: the solver that ``run`` uses.
        records: whether the solution's tape is recorded in the forward pass, for the backward pass.
        randomness: checks that the function is deterministic; ``None``: it is not checked.
        agreement: checks the derivative of a function that detaches part of its graph; ``None`` where none does.
        function: the callable that the user gave for the problem.
        direct: whether plain autograd differentiates the evaluations that the estimator makes, including tensors that
            the function captures and ``params`` does not hold. Grad mode is on then, and no transform runs.
        aux: collects what the function returns beside the state; ``None`` if it returns nothing or nobody asks.
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
        """The system that is solved."""
        return self.linear.system

    @property
    def results(self) -> list[SolverResult]:
        """The results of ``run``, the latest last."""
        return self.linear.results

    def solve(self, params: Sequence[Tensor], *, given_away: bool = True) -> FlatSolution:
        """Solve without recording gradients.

        Args:
            params: the system's parameters.
            given_away: whether the returned tensor itself is handed to the user.
        """
        if self.randomness is not None:
            self.randomness.begin(self.start.z)
        with torch.no_grad(), past_hooks():
            outcome = self.run(self.system, self.start.fixed(), params)
            self.system.prepare(outcome.z, params)
            if self.randomness is not None:
                self.randomness.end(outcome.z, params)
        report = outcome.report
        # A function may return its argument, a buffer or a parameter, and an iterate may be that very tensor: the user
        # gets a copy, which may be written to. A shared point is the library's own.
        z = outcome.z.clone() if self.linear.shared is None and given_away else outcome.z
        # The result refers to the tensor that is given away, or to the last iterate where these are kept, so that no
        # further copy is held. It is detached, since a node gives z a history that leads back to this task: such a
        # cycle would keep everything that the solver has built in memory until Python's garbage collector runs.
        kept = bool(outcome.trajectory) and outcome.trajectory[-1] is outcome.z
        self.results.append(changed(outcome, z=(outcome.z if kept else z).detach()))
        return FlatSolution(z, report.status, report.steps, report.residual)

    def spent(self, evaluations: int) -> None:
        """Add evaluations of the whole batch that the estimator makes in the forward pass to the count of the solve."""
        self.results[-1] = self.results[-1].having_spent(evaluations)

    def vmapped(self, size: int, dims: Sequence[int | None]) -> SolveTask:
        """The task for ``size`` copies, see :meth:`System.vmapped`."""
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
    """Base class of the gradient estimators. A subclass is a final, frozen dataclass.

    Attributes:
        needs_solver_state: whether the estimator uses the solver's state, so that no sample may leave the batch before
            the end, not even with ``rowwise=True``.
        goes_on: whether the value is the end of recorded steps that the estimator itself takes from the solution.
    """

    needs_solver_state: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False

    def passes(self, solver: Solver) -> Passes:
        """The parts of a solve by ``solver`` that ``compile=True`` compiles."""
        if not self.needs_solver_state:
            return Passes(solver=solver)
        return Passes(solver=solver, refusal=f"{type(self).__name__} needs the steps that the eager loop takes")

    @abstractmethod
    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        """Solve, and give the solution this estimator's derivative with respect to ``params``."""

    def recorded(self, solver: Solver) -> int | None:
        """How many of the last steps autograd records, where ``solver`` takes a prescribed number of steps and the
        estimator leaves the differentiation to autograd. ``None`` in all other cases.

        Where this is a number, the function need not be called beforehand to find the tensors that it captures.
        """
        return None

    def supports(self, system: System, solver: Solver) -> None:
        """Raise where the estimator cannot differentiate this solve.

        Raises:
            ValueError: it cannot; the message says what to take instead.
        """


def refuse_detached(task: SolveTask, z: Tensor, params: Sequence[Tensor]) -> None:
    """Raise for a function that depends on its state in a way that is hidden from autograd: the derivative of its steps
    would lack that part. Tested once for each function, by an evaluation that is not counted.

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
"""Functions that have passed the test of :func:`refuse_detached`."""


def owned(task: SolveTask, z: Tensor) -> Tensor:
    """The last iterate as a tensor that the user may write to: a copy, since it may be an argument, a buffer or a
    parameter that the function returned; itself where its history shows that it was computed."""
    base = z._base if task.direct and z._is_view() else z
    return z if task.direct and base is not None and base.grad_fn is not None else z.clone()


def differentiable(params: Sequence[Tensor]) -> bool:
    """Return whether a derivative with respect to any of ``params`` may be asked for."""
    if torch.is_grad_enabled():
        return any(map(carries_derivative, params))
    return any(map(is_transformed, params))
