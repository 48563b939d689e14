"""The derivative of the steps that were taken, whose iterates are recomputed by inverse steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.closure import is_vmapped
from torchimplicit.errors import ConvergenceWarning, UnsupportedDerivativeError
from torchimplicit.gradients.base import FlatSolution, SolveTask, refuse_detached
from torchimplicit.gradients.nodes import FirstOrderRule, estimate
from torchimplicit.gradients.transforms import Grads
from torchimplicit.notices import count_adjoint, notice
from torchimplicit.precision import widened
from torchimplicit.problems import System
from torchimplicit.problems.linearization import check_unmoved, recorded_gradients
from torchimplicit.saved import past_hooks
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import ReversibleIteration, Solver, SolverResult
from torchimplicit.solvers.reversible import ReversibleState
from torchimplicit.state import row_norm


@final
@dataclass(frozen=True, kw_only=True)
class Reversible(FirstOrderRule):
    """Backpropagation through every step of :class:`ReversibleIteration`, whose iterates are recomputed by inverse
    steps (McCallum, Arora and Foster 2025).

    Exact for the iterate that was reached, as :class:`~torchimplicit.Unrolled` is, in memory that does not grow with
    the steps, except for the pairs that the solver stores every :attr:`~ReversibleIteration.keep_every` steps.

    Reverse mode, first order; also with respect to ``z0``. With ``rowwise=True`` no sample leaves the batch. The
    backward pass evaluates the map as often as the forward pass did, and takes as many products.

    At each stored pair, the start included, the recomputed pair is compared with the stored one.
    ``solution.adjoint.residual`` is the largest distance, relative to the size of the state. Beyond the square root of
    the dtype's rounding (3e-4 in float32) there is a warning, and the status is :attr:`Status.BREAKDOWN`: there were
    too many steps between two stored pairs. A map that is not the one of the forward pass is an error.
    """

    needs_solver_state: ClassVar[bool] = True
    of_start: ClassVar[bool] = True

    def supports(self, system: System, solver: Solver) -> None:
        if not isinstance(solver, ReversibleIteration):
            raise ValueError(
                f"Reversible inverts the steps of ReversibleIteration, and the solver is {type(solver).__name__}: "
                "solve with solver=ReversibleIteration(), or take another gradient (Unrolled() stores the steps)"
            )
        if solver.steps is None and not solver.return_last:
            raise ValueError(
                "Reversible inverts steps from the last iterate, and return_last=False may return an earlier one: "
                "leave it out of ReversibleIteration"
            )

    def attach(self, task: SolveTask, params: Sequence[Tensor]) -> FlatSolution:
        solution = super().attach(task, params)
        if solution.z.requires_grad and task.solver.steps is None:
            refuse_detached(task, solution.z, params)
        return solution

    def cotangents(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        return self._walk_back(task, u, params, (False, *needs_grad))[1:]

    def adjoint_with_start(
        self, task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> Grads:
        if any(map(is_vmapped, (u, z, *params))):
            raise UnsupportedDerivativeError(
                "Reversible has no derivative in z0 under torch.func.vmap: give the copies as a batch, or detach z0"
            )
        wanted = (True, *needs_grad)

        def compute(task: SolveTask, u: Tensor, z: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
            return [grad for grad in self._walk_back(task, u, params, wanted) if grad is not None]

        grads = iter(estimate(task, compute, type(self).__name__, u, z, params))
        return tuple(next(grads) if w else None for w in wanted)

    def _walk_back(self, task: SolveTask, u: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]) -> Grads:
        """The cotangents of the start and of the parameters, where ``wanted``."""
        outcome, solver = task.results[-1], task.solver
        assert isinstance(solver, ReversibleIteration)
        state = _whole(outcome, len(u))
        unit = 1.0 if outcome.units is None else outcome.units.state
        dead = _repeated(outcome.report.status == Status.NONFINITE, len(u))
        # a non-finite sample was put back to its last good iterate, from which its steps cannot be inverted
        dtype, u = u.dtype, widened(torch.where(dead[:, None] & (u != 0), torch.nan, u))
        walk = _Walk(task.system, params, tuple(wanted[1:]), solver.damping, dtype, unit, state.told)
        size = row_norm(state.z)
        drift = torch.zeros_like(size)
        y, z = _Half(state.y, torch.zeros_like(u)), _Half(state.z, u)
        span, count = solver.span(state.z.dtype, dtype), len(state.moved)
        for i in reversed(range(count)):
            moved = state.moved[i]
            z, y = walk.back(z, y, moved, dead)
            y, z = walk.back(y, z, moved, dead)
            if i % span == 0:
                pair = state.kept[i // span]
                size = torch.maximum(size, row_norm(pair[1]))
                for half, there in zip((y, z), pair, strict=True):
                    drift = torch.maximum(drift, row_norm(half.value - there))
                y, z = y._replace(value=pair[0]), z._replace(value=pair[1])
        relative = torch.where(dead | (drift == 0), 0, drift / size).to(dtype)
        _tell(task, relative, _repeated(outcome.report.steps, len(u)), 2 * count, solver)
        return ((y.cotangent + z.cotangent).to(dtype) if wanted[0] else None, *walk.grads)


class _Half(NamedTuple):
    """One of the pair, ``[batch, dim]``, and its cotangent."""

    value: Tensor
    cotangent: Tensor


class _Walk:
    """Inverse half steps with their products; ``grads`` accumulate the parameters' cotangents."""

    def __init__(
        self,
        system: System,
        params: Sequence[Tensor],
        needs_grad: tuple[bool, ...],
        damping: float,
        dtype: torch.dtype,
        unit: float,
        told: Tensor,
    ):
        self.system, self.params, self.needs_grad = system, params, needs_grad
        self.damping, self.dtype, self.unit = damping, dtype, unit
        self.told: Tensor | None = told
        self.grads = [torch.zeros_like(p) if w else None for p, w in zip(params, needs_grad, strict=True)]

    def back(self, a: _Half, other: _Half, moved: Tensor | None, dead: Tensor) -> tuple[_Half, _Half]:
        """Invert the half step :math:`a\\leftarrow(1-\\beta)a+\\beta f(other)`: ``a`` before it, and ``other`` with the
        map's contribution to its cotangent."""
        share = self.damping
        along, left = share * a.cotangent, (1 - share) * a.cotangent
        if moved is not None:
            along = torch.where(moved[:, None], along, 0)
            left = torch.where(moved[:, None], left, a.cotangent)
        with past_hooks():
            tape = self.system.linearize((self.unit * other.value).to(self.dtype), self.params, self.needs_grad)
            if self.told is not None:  # the last evaluation of the forward pass is the first one here
                tape.check()
                check_unmoved(self.told * self.unit, row_norm(tape.out))
                self.told = None
            leaves, wanted = (tape.z, *tape.params), (True, *self.needs_grad)
            of_other, *grads = recorded_gradients(
                (tape.out,), leaves, (along.to(self.dtype),), wanted, create_graph=False
            )
        for total, grad in zip(self.grads, grads, strict=True):
            if total is not None and grad is not None:
                total.add_(grad)
        value = torch.sub(a.value, tape.out.detach(), alpha=share / self.unit).div_(1 - share)
        stays = dead if moved is None else dead | ~moved
        value = torch.where(stays[:, None], a.value, value)
        added = other.cotangent if of_other is None else other.cotangent + of_other
        return _Half(value, left), other._replace(cotangent=added)


def _whole(outcome: SolverResult, rows: int) -> ReversibleState:
    """The state for so many rows: those of the forward pass, or copies of them.

    Raises:
        UnsupportedDerivativeError: the state does not record all the steps.
    """
    state, report = outcome.state, outcome.report
    if state is None:  # no step was taken
        state = ReversibleState(outcome.z, outcome.z, outcome.z[:, :0], (), ())
    taken = torch.zeros_like(report.steps)
    for moved in state.moved:
        taken = taken + (1 if moved is None else moved)
    if not torch.equal(taken, report.steps):
        raise UnsupportedDerivativeError(
            "Reversible cannot invert the steps of this solve: samples that had stopped were resumed, since they "
            "depend on each other or their numbers are too small or too large for squares. Take a given number of "
            "steps, ReversibleIteration(steps=...), or Implicit()"
        )
    unit = 1.0 if outcome.units is None else outcome.units.state
    returned = (outcome.z == (unit * state.z).to(outcome.z.dtype)).all(dim=1) | (report.status == Status.NONFINITE)
    if not bool(returned.all()):
        raise UnsupportedDerivativeError(
            "Reversible differentiates the solution, and an earlier iterate was asked for (solution.states, "
            "fixed_point_correction): take Unrolled(), which differentiates every iterate, or Implicit()"
        )
    last = int(report.steps.max()) if len(taken) else 0
    kept = tuple((_repeated(y, rows), _repeated(z, rows)) for y, z in state.kept)
    moved = tuple(None if t is None else _repeated(t, rows) for t in state.moved[:last])
    y, z, norm = (_repeated(t, rows) for t in (state.y, state.z, state.told))
    return ReversibleState(y, z, norm, moved, kept)


def _repeated(t: Tensor, rows: int) -> Tensor:
    """``t`` repeated for the copies that vmap concatenates along the batch in a backward pass."""
    copies = rows // max(1, len(t))
    return t if copies <= 1 else t.repeat(copies, *(1,) * (t.ndim - 1))


def _tell(task: SolveTask, drift: Tensor, steps: Tensor, products: int, solver: ReversibleIteration) -> None:
    lost = ~(drift <= torch.finfo(drift.dtype).eps ** 0.5)
    status = torch.where(lost, int(Status.BREAKDOWN), int(Status.STEPS_TAKEN))
    task.linear.record.report = Report(status, steps, drift, float(products))
    count = int(lost.sum())
    count_adjoint(lost.numel(), count)
    if count:
        notice(
            "the inverse steps did not lead back to the start",
            f"Reversible: the inverse steps of {count} of {lost.numel()} samples end "
            f"{float(drift.nan_to_num(torch.inf).max()):.2g} from a stored pair (relative to the state), and the "
            f"gradient is as inexact. Rounding grows by up to {(1 - solver.damping) ** -2:.3g} per step between stored "
            "pairs: take a smaller ReversibleIteration.keep_every, or leave it out; a damping further from 1 helps as "
            "well. If that does not help, the map is random",
            ConvergenceWarning,
        )
