"""Several solvers in turn, each for the samples that the ones before it have not solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.problems import Point, System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solution import Status, Turn
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.descent import leave, lowest
from torchimplicit.solvers.result import SolverResult
from torchimplicit.solvers.review import after
from torchimplicit.state import row_norm

_FOR_ALL = ("rtol", "atol", "keep_trajectory", "keep_trace", "return_last", "check_every")

TRIALS = 20
"""How many distances from a saddle are tried in search of a lower energy, each a quarter of the one before."""
ROUNDS = 4
"""How many saddles a sample may leave, one after the other."""

Solve = Callable[..., SolverResult]
"""``(solver, system, z0, params, first, only=..., since=..., units=...)``, see
:func:`~torchimplicit.solvers.iterate.iterate`."""


@final
@dataclass(frozen=True, kw_only=True)
class Polyalgorithm(Solver):
    """Several solvers in turn, each for those samples that the ones before it have not solved (Rice 1968).

    A sample that ran out of steps goes on from its best iterate. One that broke down or went non-finite starts anew,
    since where one method cannot go on another seldom can; for a :class:`Minimum` it goes on, since every member lowers
    the energy. The best of the points that were reached is returned. ``solution.turns`` and ``solution.summary()`` say
    which member did what. Members that cannot solve the problem, and those that need products with a Jacobian which the
    function does not provide, are left out. Where autograd records the steps (:class:`~torchimplicit.Unrolled`), only
    the first member runs.

    Args:
        members: the solvers, at least one. Each has its own tolerances and steps, unless they are given here for all.
        max_steps: the most steps of a sample with all members together; each member's own ``max_steps`` holds too.
        steps: a prescribed number of steps of the first member, see :class:`Solver`.
        rtol, atol, keep_trajectory, keep_trace, return_last, check_every: see :class:`Solver`.

    Raises:
        ValueError: there are no members.
        TypeError: a member is not a solver, or is a ``Polyalgorithm`` itself.
    """

    members: tuple[Solver, ...] = ()
    max_steps: int = 10_000

    def check(self) -> None:
        if not isinstance(self.members, tuple) or not self.members:
            raise ValueError(
                f"Polyalgorithm.members is {self.members!r}, and must be a tuple of solvers, as (Anderson(), Broyden())"
            )
        for member in self.members:
            if not isinstance(member, Solver) or isinstance(member, Polyalgorithm):
                raise TypeError(
                    f"Polyalgorithm.members holds {member!r}, and must hold solvers that are no polyalgorithms"
                )

    @property
    def leading(self) -> Solver:
        return self.adapted(self.members[0], self.max_steps)

    def adapted(self, member: Solver, budget: int) -> Solver:
        """``member`` with the options that were given here for all, and ``budget`` steps at most."""
        fields = self.__dataclass_fields__
        changes = {name: getattr(self, name) for name in _FOR_ALL if getattr(self, name) != fields[name].default}
        if self.steps is not None:
            return replace(member.given(self.steps), **changes)
        if budget < member.max_steps:
            changes["max_steps"] = budget
        return replace(member, **changes) if changes else member

    def suited(self, system: System) -> tuple[Solver, ...]:
        """The members that can solve ``system``."""
        return tuple(member for member in self.members if member.suits(system))

    def supports(self, system: System) -> None:
        if not self.suited(system):
            self.members[0].supports(system)

    def fell_short(self, summary: str) -> str:
        names = ", ".join(dict.fromkeys(type(member).__name__ for member in self.members))
        return (
            f"{names} did not converge, tried in turn: {summary}. The best iterate is returned. Allow more max_steps, "
            "loosen rtol or atol, or give another solver"
        )

    def wants_product(self) -> bool:
        return self.leading.wants_product()

    def wants_relative(self) -> bool:
        return self.leading.wants_relative()

    def check_unrolled(self) -> None:
        self.leading.check_unrolled()

    def start(self, point: Point) -> Any:
        return self.leading.start(point)

    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        return self.leading.step(evaluate, point, state, progress)


def in_turn(
    solve: Solve,
    solver: Polyalgorithm,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
    first: Point | None = None,
    begun: SolverResult | None = None,
) -> SolverResult:
    """Solve ``system`` from ``z0`` with the members in turn.

    Args:
        solve: runs one of them, for the samples ``only``.
        solver: whose members take turns.
        system: the problem.
        z0: the start, ``[batch, dim]``.
        params: the system's parameters.
        first: the evaluation at ``z0``, where it has been made already.
        begun: the first member's result, where it has run already.
    """
    lead, *others = solver.members if solver.members[0].suits(system) else solver.suited(system)
    outcome = solve(solver.adapted(lead, solver.max_steps), system, z0, params, first) if begun is None else begun
    report = outcome.report
    # which samples are left depends on the data: not under a transform, nor in a graph that autograd unrolls
    if torch.is_grad_enabled() or any(is_transformed(t) for t in (outcome.z, report.status)):
        return outcome
    descends = isinstance(system, MinimumSystem)
    stood = _rests(outcome) if descends else torch.zeros_like(report.converged)
    # in the common case, everything solved, this is the only read from the device
    short, standing = torch.stack((report.status != Status.CONVERGED, stood)).any(dim=1).tolist()
    turns = [] if short else [Turn(type(lead).__name__, len(z0), len(z0))]
    turns = turns or [_turn(lead, outcome, torch.ones_like(report.status, dtype=torch.bool))]
    if standing:
        outcome, left = _off_saddles(solve, solver.adapted(lead, solver.max_steps), system, outcome, params, stood)
        if left is not None:
            turns.append(_turn(lead, outcome, left))
            short = True
    if not short:
        return replace(outcome, turns=tuple(turns))
    coupling, products = system.coupling, None
    for member in others:
        report = outcome.report
        hopeless = (report.status == Status.NONFINITE) & (report.steps == 0)  # the function is not finite at z0
        left = (report.status != Status.CONVERGED) & (report.status != Status.SADDLE) & ~hopeless
        budget = solver.max_steps - report.steps
        count, least = torch.stack((left.sum(), torch.where(left, budget, solver.max_steps).amin())).tolist()
        if not count or least < 1:
            break
        if not member.suits(system):
            continue
        if member.by_products and products is None:
            products = _gives_products(system, outcome.z, params)
        if member.by_products and not products:
            continue
        anew = left & ((report.status == Status.BREAKDOWN) | (report.status == Status.NONFINITE))
        start = outcome.z if descends else torch.where(anew[:, None], z0, outcome.z)
        # samples that depend on each other cannot be solved without the others
        only, since = None if coupling is not None and coupling.found else left, system.norms(z0)
        member = solver.adapted(member, least).going_on(outcome.trajectory)
        later = solve(member, system, start, params, only=only, since=since, units=outcome.units)
        if coupling is not None and coupling.found:  # known by now at the latest
            left = torch.ones_like(left)
        turns.append(_turn(member, later, left))
        outcome = _better(outcome, later, left, descends)
    return replace(outcome, turns=tuple(turns), state=None)


def _off_saddles(
    solve: Solve, lead: Solver, system: System, outcome: SolverResult, params: Sequence[Tensor], stood: Tensor
) -> tuple[SolverResult, Tensor | None]:
    """Move samples off stationary points that are not minima.

    A sample that ``stood`` (bool ``[batch]``) at a stationary point where it began, or where the gradient is exactly
    zero, need not be at a minimum: no descent led there. Where the Hessian has a negative eigenvalue, the sample moves
    along its eigenvector and is solved on from there; where that fails, its status is ``Status.SADDLE``.

    Returns:
        The outcome; and bool ``[batch]``, which samples were at a saddle, ``None`` for none.
    """
    if system.coupling is not None and system.coupling.found:
        return outcome, None
    moved, named = None, torch.zeros_like(stood)
    for _ in range(ROUNDS):  # the next stationary point may be a saddle again
        try:
            least, downward = lowest(system.operator(system.linearize(outcome.z, params), False))
        except (RuntimeError, ValueError, NotImplementedError):  # no second derivative
            break
        chosen = stood & ~named & (least < 0)
        if not bool(chosen.any()):
            break
        evaluate = Evaluator(system, params)
        point = evaluate(outcome.z)
        beside, stays = leave(evaluate, point, point, downward, chosen, TRIALS)
        going, solver = chosen & ~stays, lead.going_on(outcome.trajectory)
        lower = solve(solver, system, beside.z, params, only=going, units=outcome.units)
        outcome = _better(outcome, lower.having_spent(evaluate.rows_evaluated / len(stood)), going, True)
        named = named | stays | (chosen & (lower.report.status == Status.NONFINITE))
        moved = chosen if moved is None else moved | chosen
        stood = chosen & _rests(outcome)
    else:
        named = named | stood
    status = outcome.report.status.masked_fill(named, int(Status.SADDLE))
    return replace(outcome, report=replace(outcome.report, status=status)), moved


def _rests(outcome: SolverResult) -> Tensor:
    """bool ``[batch]``: the samples that count as solved without having moved, or whose gradient is exactly zero."""
    norm = outcome.norm
    assert norm is not None
    nothing = norm == 0 if norm.ndim == 1 else (norm == 0).all(dim=1)
    return outcome.report.converged & ((outcome.report.steps == 0) | nothing)


def _turn(member: Solver, outcome: SolverResult, samples: Tensor) -> Turn:
    tried, solved = torch.stack((samples, samples & outcome.report.converged)).sum(dim=1).tolist()
    return Turn(type(member).__name__, tried, solved)


def _better(before: SolverResult, later: SolverResult, samples: Tensor, descends: bool) -> SolverResult:
    """The better of two results for each of ``samples`` (bool ``[batch]``); the others keep ``before``.

    A sample's figures belong to the state that is returned; its steps are those of both results.

    Args:
        descends: whether ``later`` went on from ``before`` and lowered the energy: then it is better as long as it is
            finite. Elsewhere the smaller residual is better.
    """

    def size(outcome: SolverResult) -> Tensor:
        assert outcome.norm is not None
        return outcome.norm if outcome.norm.ndim == 1 else row_norm(outcome.norm)

    two = later.report
    nearer = two.converged | (torch.full_like(samples, descends) | (size(later) < size(before)))
    nearer = samples & nearer & (two.status != Status.NONFINITE)
    joined = after(before, later, nearer)
    steps = before.report.steps + torch.where(samples, two.steps, 0)
    # not finite where it was finite before: the function itself has changed, and the sample is not to be trusted
    gone = samples & (two.status == Status.NONFINITE) & (two.steps == 0)
    status = joined.report.status.masked_fill(gone, int(Status.NONFINITE))
    return replace(joined, report=replace(joined.report, steps=steps, status=status))


def _gives_products(system: System, z: Tensor, params: Sequence[Tensor]) -> bool:
    """Return whether the problem's function has the derivatives that products with the Jacobian are made of."""
    try:
        operator = system.operator(system.linearize(z, params), False)
        operator.product(torch.zeros_like(z))
        if operator.transposed_product is not None:
            operator.transposed_product(torch.zeros_like(z))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True
