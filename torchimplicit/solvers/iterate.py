"""The loop that every solver runs in.

It owns the residual, the tolerance test, the masks, the best iterate, the trajectory, and which samples still take
part; a solver owns only its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.coupling import Coupling, broken_promise
from torchimplicit.linear import PreparedPreconditioner
from torchimplicit.problems import Point, System
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.solution import GROWTH_LIMIT, Report, Status
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.given_steps import take_steps
from torchimplicit.solvers.joint_units import in_part_units
from torchimplicit.solvers.magnitude import (
    beside_others,
    examined,
    extreme,
    extreme_at_first,
    first_units,
    in_range,
    lowest_first,
    solved_in,
)
from torchimplicit.solvers.polyalgorithm import Polyalgorithm, in_turn
from torchimplicit.solvers.result import SolverResult, Units, relative_to, traced, worst
from torchimplicit.solvers.review import after, as_one_system, given_up, review, tried_as_one
from torchimplicit.solvers.tolerance import Judge, Measure
from torchimplicit.state import row_norm

APPEARS = 3
"""A leaf whose residual was zero at first is given this many steps to show one, which then is its unit."""

SHRINK_AT = 0.75
"""Finished samples leave the batch once at most this share of it is active: leaving copies all that remains, which pays
only if enough rows are saved."""

ROUNDS = 4
"""How often samples that the review found unsolved are sent on before they count as broken down."""

_RUNNING = -1


def iterate(
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
    first: Point | None = None,
    recorded: int | None = None,
    only: Tensor | None = None,
    since: Tensor | None = None,
    units: Units | None = None,
) -> SolverResult:
    """Solve ``system`` from ``z0`` (``[batch, dim]``). Differentiable by autograd where grad mode is on.

    Args:
        solver: whose steps are taken.
        system: the problem in flat coordinates.
        z0: the start.
        params: the system's parameters.
        first: the evaluation at ``z0``, where it has been made already.
        recorded: how many of the last steps autograd records, where the number of steps is prescribed; ``None``: all.
        only: bool ``[batch]``, the samples to solve; ``None``: all. The figures of the others mean nothing.
        since: where another solver has led to ``z0``, the sizes of the state at which that one began, ``[batch]`` or
            ``[batch, leaves]``; the stopping rule takes the larger of these and those of ``z0``.
        units: the units in which that other solver worked.
    """
    if units is not None:
        outcome = solved_in(units, iterate, solver, system, z0, params, only, since)
        return beside_others(outcome, solver, system, params)
    if solver.steps is not None:
        return take_steps(solver.leading, system, z0, params, first, recorded)
    if isinstance(solver, Polyalgorithm):
        return in_turn(iterate, solver, system, z0, params, first)
    if as_one(solver, system.coupling):
        together = as_one_system(iterate, solver, system, z0, params)
        if together is not None:
            return together
    evaluate = Evaluator(system, params, rows_evaluated=0 if first is None else z0.shape[0])
    loop = _Loop(solver, evaluate, evaluate(evaluate.project(z0)) if first is None else first, only, since=since)
    del first, z0  # free the start's memory once the loop has left it
    if isinstance(system, JointSystem) and not system.restated and solver.mixes_parts:
        restated = in_part_units(iterate, solver, system, loop.point, params, only)
        if restated is not None:
            return restated.having_spent(evaluate.rows_evaluated / len(restated.z))
    units = first_units(system, loop.point, params) if loop.suspect and since is None else None
    if units is not None:
        outcome = solved_in(units, iterate, solver, system, loop.point.z, params, only)
        outcome = beside_others(outcome, solver, system, params)
        return outcome.having_spent(evaluate.rows_evaluated / len(outcome.z))
    outcome = loop.run()
    if loop.stepped:  # a start that is a solution was judged by an evaluation of the whole batch already
        outcome = reviewed(solver, evaluate, outcome, loop.first_judge, loop.mixed, loop.active > 0)
        measured = system.remeasured(outcome.z, params)
        if measured is not None:
            claimed, measure = outcome.report.converged, loop.first_judge.measure
            since, left = None if measure is None else measure.since, solver.going_on(outcome.trajectory)
            outcome = after(outcome, iterate(left, system, outcome.z, measured, only=claimed, since=since), claimed)
    return examined(iterate, outcome, loop.first_judge, solver, system, params) if loop.extreme else outcome


def as_one(solver: Solver, coupling: Coupling | None) -> bool:
    """Return whether samples are known to depend on each other, so that this solver has to solve them as one."""
    if coupling is None or not coupling.found:
        return False
    return solver.searches or (solver.remembers and coupling.memory.together)


def reviewed(
    solver: Solver, evaluate: Evaluator, outcome: SolverResult, judge: Judge, mixed: bool, unsolved: bool
) -> SolverResult:
    """Review the outcome by the whole problem; samples that are not confirmed go on, ``ROUNDS`` times at most.

    Args:
        judge: the stopping rule of the loop that led there, for its first batch.
        mixed: whether the returned states may differ from those that were evaluated last.
        unsolved: whether samples have run out of steps.
    """
    system, params = evaluate.system, evaluate.params
    since = None if judge.measure is None else judge.measure.since
    for tried in range(ROUNDS + 1):
        verdict = review(solver, evaluate, outcome, judge, mixed or solver.searches)
        outcome = verdict.outcome
        if verdict.coupled:
            together = as_one_system(iterate, solver.going_on(outcome.trajectory), system, outcome.z, params)
            if together is not None:
                return after(outcome, together, None)
        if verdict.again is None:
            if unsolved and solver.remembers and not torch.is_grad_enabled():
                return tried_as_one(iterate, solver.going_on(outcome.trajectory), evaluate, outcome)
            return outcome
        if tried == ROUNDS:
            break
        steps = solver.max_steps - int(outcome.report.steps[verdict.again].amin())
        left = replace(solver.going_on(outcome.trajectory), max_steps=steps)
        evaluate.rows_evaluated = 0
        # the last step overestimated the size of the terms: a stricter tolerance makes up for it
        loop = _Loop(left, evaluate, evaluate(outcome.z), only=verdict.again, strict=0.1 ** (tried + 1), since=since)
        outcome = after(outcome, loop.run(), verdict.again)
        mixed, unsolved = loop.mixed, loop.active > 0
    assert verdict.again is not None
    return given_up(outcome, verdict.again)


class _Tests(NamedTuple):
    """The verdict on each sample at a point, ``[batch]``.

    Attributes:
        norm: the residual norms, ``[batch]`` or ``[batch, leaves]``.
        tolerance: what they are compared with, of the same shape.
        rank: the number by which iterates are compared; the best has the smallest.
        good: bool, finite and within the limit of growth.
        done: bool, within the tolerance, or found solved by the step; ``None`` until :meth:`arrived` is asked.
        going: bool, good and not done, and the method can go on.
    """

    norm: Tensor
    tolerance: Tensor
    rank: Tensor
    good: Tensor
    done: Tensor | None
    going: Tensor

    def arrived(self) -> Tensor:
        """``done``, computed where it was put off."""
        return self.norm <= self.tolerance if self.done is None else self.done


class _Loop:
    """The loop's variables, for the samples that the current batch holds.

    The cost of a step is what the loop adds to the user's function, so it reads from the device once a step at most and
    copies nothing while all samples improve (``smooth``, ``improving``).

    Attributes:
        point: where the samples are. One that is done stays at its best iterate.
        best: the best iterate, whose residual (or merit, where the point has one) is ``best_rank``. It *is* ``point``
            while all active samples improve; afterwards it is a point whose residual vector is not kept.
        active: how many samples were active when the host last asked.
        improved: how many of them had improved then.
        certain: whether ``active`` counts the samples of this very step.
        improving: whether every active sample is known to have improved with the last step.
        smooth: whether all samples have been active so far and have improved in every step.
        tries: how often the fast test of a smooth step may still fail before it is no longer tried.
        plain: whether iterates are compared by a single norm, so that a smooth step can be recognized by it.
        judge: the stopping rule for the current batch.
        first_judge: that for the first batch.
        unit: ``[batch, leaves]``, the first residual of each leaf, in units of which iterates are compared; ``None``
            where the state is a single leaf.
        limit: ``[batch]``, the residual beyond which a sample counts as diverged.
        running: bool ``[batch]``, the active samples; ``None`` for all.
        alive: bool ``[batch]``, the samples that may still resume; ``None`` for all.
        rejudges: whether a stopped sample resumes when the motion of others has raised its residual.
        confirmed: whether the solver confirms solved samples; ``within`` are then those that meet the stopping rule.
        rows: the current batch's places in the first batch; ``None`` while all samples are in it.
        full: the results of the first batch, once samples have left it.
        stepped: whether any step was taken.
        mixed: whether the returned states may differ from those that were evaluated last.
        suspect: whether the first numbers are so small or so large that their squares may underflow or overflow.
        extreme: whether the norms by which samples were judged were so; known at the end.
    """

    def __init__(
        self,
        solver: Solver,
        evaluate: Evaluator,
        point: Point,
        only: Tensor | None = None,
        strict: float = 1.0,
        since: Tensor | None = None,
    ):
        self.solver = solver
        self.evaluate = evaluate
        self.batch = point.z.shape[0]
        self.active = self.batch if only is None else int(only.sum())
        self.certain = self.improving = True
        self.improved = 0
        self.mixed = self.stepped = self.extreme = False
        self.suspect = True
        # a trajectory needs all samples in every entry, and an unrolled graph a fixed batch
        self.may_shrink = (
            evaluate.system.row_params is not None
            and not (solver.keep_trajectory or solver.keep_trace)
            and not torch.is_grad_enabled()
        )
        self.judge = Judge(evaluate.system, point, solver.rtol, solver.atol, strict, since)
        self.first_judge = self.judge
        self.point = self.best = point = self.judge.start(point)
        growth, size = point.growth_norm(), point.size()
        self.limit = self._growth_limit(point, growth)
        self.unit: Tensor | None = None
        if size.ndim == 2:  # leaves, each in its own unit
            self.unit = torch.where((size > 0) & (size < torch.inf), size, torch.finfo(size.dtype).tiny)
        self.confirmed = solver.confirms(evaluate.system, point.z)
        self.plain = self.judge.first is not None and size.ndim == 1 and point.judgement is None and not self.confirmed
        self.smooth, self.tries = self.plain and only is None, 2
        self.within: Tensor | None = None
        self.lowest, highest = lowest_first(self.judge.rtol, growth.dtype), in_range(growth.dtype)[1]
        self.best_rank = torch.full_like(growth, highest if self.smooth else torch.inf)
        self.status = torch.full((self.batch,), _RUNNING, dtype=torch.int64, device=growth.device)
        self.steps = torch.zeros_like(self.status)
        self.running: Tensor | None = only
        coupling = evaluate.system.coupling
        self.rejudges = coupling is not None and not coupling.promised and not solver.searches
        self.alive: Tensor | None = only
        self.rows: Tensor | None = None
        self.full: dict[str, Tensor] = {}
        self._judge(0, None)

    def _growth_limit(self, point: Point, growth: Tensor) -> Tensor:
        """``[batch]``, the residual beyond which a sample counts as diverged, from the first ``point``."""
        first = self.judge.first
        if self.solver.bounded:
            return torch.full_like(growth, torch.inf)
        if point.judgement is not None:
            first = growth + row_norm(point.z)
        elif self.judge.measure is not None:
            first = 2 * growth
        elif first is None or first.ndim == 2:
            assert point.scale is not None
            first = growth + row_norm(point.scale)
        if self.solver.searches and point.energy is not None:
            # a line search makes the energy fall in every step, so a large gradient is no divergence: the way down from
            # beside a saddle, where the gradient is next to zero, leads through steep places
            first = first * GROWTH_LIMIT**2
        # A start at a solution (``first == 0``) gets no limit, since coupled samples may move it off. A start that is
        # not finite fails the comparison with any limit, and stops at once.
        return (GROWTH_LIMIT * first).masked_fill_(first == 0, torch.finfo(growth.dtype).max)

    def run(self) -> SolverResult:
        solver = self.solver
        solver.check_unrolled()
        trajectory = [self.point.z if solver.keeps(0) else None]
        self._check_features()
        if self.judge.measure is not None and self.active and solver.wants_product():
            self._look_ahead(self.judge.measure)
        trace = [traced(self.point)] if solver.keep_trace else []
        state = solver.start(self.point)
        # Plain iteration needs nothing of a point but its image, which becomes the next state: the residual's memory is
        # freed before the next evaluation. A point that carries its error still knows the residual's norm.
        judged = self.point.error is not None and self.point.judgement is None
        lean, nothing = solver.straight and self.judge.measure is None and judged, None
        for step in range(1, solver.max_steps + 1):
            if self.active == 0:
                break
            if self.may_shrink and self.certain and self.active <= SHRINK_AT * self.point.z.shape[0]:
                state = self._shrink(state)
            self.stepped = True
            self.evaluate.begin(step)
            progress = Progress(self.running, self.improving, self.judge, self.within)
            move = solver.step(self.evaluate, self.point, state, progress)
            state = move.state
            if lean and self.best is self.point:
                # no local name for the state: it would stay alive during the next evaluation
                if nothing is None or nothing.shape != self.point.z.shape:  # at first, or where samples have left
                    nothing = self.point.z.new_zeros(1, 1).expand_as(self.point.z)
                self.best = self.point = self.point.changed(residual=nothing, image=self.point.z)
            self._advance(move.to)
            if solver.keep_trace:
                trace.append(traced(self.point))
            if solver.keep_trajectory:
                trajectory.append(self.point.z if solver.keeps(step) else None)
            self._judge(step, move, ask=step % solver.check_every == 0)
        if self.confirmed and self.steps.numel():
            # the last step only confirmed samples where they were, so the entry that it added repeats the one before
            taken = int(torch.where(self.status == _RUNNING, solver.max_steps, self.steps).amax()) + 1
            trajectory, trace, self.stepped = trajectory[:taken], trace[:taken], taken > 1
        outcome = self._finish(tuple(trajectory) if solver.keep_trajectory else (), state)
        return replace(outcome, trace=tuple(trace)) if trace else outcome

    def _look_ahead(self, measure: Measure) -> None:
        """Take one product of the Jacobian with the first residual. It tells the scale of the residual, so that a start
        that is a solution already is recognized, and it gives a first step its length."""
        image = self.evaluate.product(self.point.z, self.point.residual)
        if image is not None:
            self.best = self.point = measure.product(self.point, image)
            self._judge(0, None)

    def _advance(self, to: Tensor | Point) -> None:
        """Take the step; samples that are done stay where they are."""
        before = self.point
        if isinstance(to, Point):
            point = to if self.running is None else to.select(self.running, before)
        else:
            z = to if self.running is None else torch.where(self.running[:, None], to, before.z)
            if to is not before.image:  # the image of a state lies in the constraint's set, as the state does
                z = self.evaluate.project(z)
            point = self.evaluate.system.refined(self.evaluate(z), before)
        self.point = point if self.judge.measure is None else self.judge.measure.step(point, before)

    def _judge(self, step: int, move: Move | None, ask: bool = True) -> None:
        """Test every active sample and record those that stop here. Reads from the device once, if ``ask``.

        The states of a sample::

            start ──► running ──┬── within the tolerance, or the step says so ──► CONVERGED ──┐
                      ▲   ▲  │  ├── the step cannot go on ──► BREAKDOWN, or SADDLE            │
                      │   │  │  ├── not finite, or grown beyond the limit ──► NONFINITE       │
                      │   └──┘  └── no steps are left ──► MAX_STEPS (in ``_finish``)          │
                      └── resumed: the others moved on, and the map couples it to them ───────┘

        A sample that stops is frozen at its best iterate, which for most is the last one. Three paths, cheapest first:

        1. all samples improve and none stops (``_all_improve``): one predicate is read, nothing is copied;
        2. all active samples improve (``improving``): ``best`` is ``point`` itself, and nothing is copied;
        3. otherwise ``best`` is merged sample by sample.
        """
        point = self.point
        norm, tolerance = point.size(), self.judge.tolerance(point)
        if self.smooth and self._all_improve(norm, tolerance, step, move, ask):
            return
        if move is not None and move.left is not None:  # any later iterate is better than a saddle
            self.best_rank = self.best_rank.masked_fill(move.left, torch.inf)
        tests = self._tested(norm, tolerance, step, move)
        going, rank, improved = tests.going, tests.rank, tests.rank < self.best_rank
        before, was_running, was_certain = self.active, self.running, self.certain
        resumed, counted = None, [going, improved]
        if was_running is not None:
            improved = improved & was_running
            if self.rejudges:  # every evaluation is of the whole batch, so it judges those that had stopped as well
                going = going if self.alive is None else going & self.alive
                resumed = going & ~was_running
                counted = [going, improved, resumed]
            else:
                going = going & was_running
                counted = [going, improved]
        if step == 0:
            counted.append(extreme_at_first(self.judge, norm, self.lowest))
        more = self._count(counted, step, before, ask)
        # None stands for "all": the masked selects of the next step are then left out
        self.running = None if ask and self.active == going.shape[0] else going
        if resumed is not None and (more or not ask):
            self._resume(resumed, rank)
        before += more
        if self.improving and not more:
            # A sample that stops here stops at its best iterate, and one that stopped before has not moved, so the
            # whole point is the best. A solver that searches returns points of its own, though, in which the rows of
            # stopped samples are not evaluated anew.
            stale = was_running if self.solver.searches else None
            self.best = point if stale is None else point.stopped(stale, self.best)
            self.best_rank = rank if was_running is None else torch.where(was_running, rank, self.best_rank)
            self.smooth = self.plain and self.running is None and self.tries > 0
            if self.active == before:
                return
        if step and ask and was_certain and self.active == before:  # nobody stopped
            if self.improved:
                self.best = point.stopped(improved, self.best)
                self.best_rank = torch.where(improved, rank, self.best_rank)
            return
        stopped = ~going if was_running is None else was_running & ~going
        self._stop(stopped, tests, step, move)
        if self.improving:
            return
        if step == 0:
            self.best_rank = rank
            return
        self.mixed = True
        better = improved | (stopped & tests.arrived())
        self.best = point.stopped(better, self.best)
        self.best_rank = torch.where(better, rank, self.best_rank)
        # a sample that stops goes back to its best iterate: the map, which may couple samples, sees no bad state again
        self.point = point.changed(z=torch.where(stopped[:, None], self.best.z, point.z))

    def _all_improve(self, norm: Tensor, tolerance: Tensor, step: int, move: Move | None, ask: bool) -> bool:
        """The fast path: whether all samples go on and have improved, as in every step so far; then ``point`` is the
        best iterate of all."""
        unsolved = norm > (tolerance if step else tolerance.clamp_min(self.lowest))
        self.smooth = ask and (move is None or (move.breakdown is None and move.solved is None))
        # no test against the growth limit: what is smaller than a residual within the limit is within it, and NaN fails
        self.smooth = self.smooth and bool((unsolved & (norm < self.best_rank)).all())
        if self.smooth:
            self.best, self.best_rank = self.point, norm
            self.suspect = self.suspect and step > 0  # the first norms are larger than the lowest that is sure
        else:
            self.tries -= 1  # a failed test costs a read from the device on top of that of the full one
        return self.smooth

    def _tested(self, norm: Tensor, tolerance: Tensor, step: int, move: Move | None) -> _Tests:
        """Test each sample at the current point, with what the step that led there says of it."""
        point, judgement = self.point, self.point.judgement
        solved = None if move is None else move.solved
        rank = norm if judgement is None else judgement.merit
        single = norm.ndim == 1
        good = (norm if single and judgement is None else point.growth_norm()) <= self.limit
        if not single:
            assert self.unit is not None
            if 0 < step <= APPEARS:
                # a leaf whose residual is zero at the start (as for a state of zeros) has no unit yet
                tiny = torch.finfo(norm.dtype).tiny
                fresh = norm.clamp_min(tiny) if step < APPEARS else torch.where(norm > 0, norm, 1)
                self.unit = torch.where(self.unit > tiny, self.unit, fresh)
            # a leaf that had no residual at first may dwarf the others, whose sum set the limit, without diverging
            bounded = (norm <= GROWTH_LIMIT * self.unit).all(dim=1)
            good = good | (bounded if judgement is None else bounded & judgement.growth.isfinite())
            rank = (norm / self.unit).amax(dim=1) if judgement is None else rank
        done: Tensor | None = None
        if single and solved is None and not self.confirmed:
            going = (norm > tolerance) & good  # saves computing ``done``, which is seldom needed
        else:
            done = norm <= tolerance if single else (norm <= tolerance).all(dim=1)
            if self.confirmed and step < self.solver.max_steps:
                # the rule is met; the next step, which knows more than the residual, says whether they are solved
                self.within, done = done, torch.zeros_like(done)
            done = done if solved is None else done | solved
            going = good & ~done
        if move is not None and move.breakdown is not None:
            going = going & ~move.breakdown
        return _Tests(norm, tolerance, rank, good, done, going)

    def _count(self, counted: list[Tensor], step: int, before: int, ask: bool) -> int:
        """Read how many samples go on, have improved, and have resumed, in one transfer; returns the last.

        Where the host does not ask, ``active`` keeps its old value, and ``improving`` is not known.
        """
        was_certain, self.certain = self.certain, ask
        if not ask:
            self.improving = False
            return 0
        self.active, self.improved, *rest = torch.stack(counted).sum(dim=1).tolist()
        if step == 0:
            self.suspect = rest.pop() > 0
        self.improving = was_certain and self.improved == before
        return sum(rest)

    def _stop(self, stopped: Tensor, tests: _Tests, step: int, move: Move | None) -> None:
        """Record why the samples ``stopped`` do so. Where several reasons hold, the one written last wins."""
        self.steps = self.steps.masked_fill(stopped, step)
        self.status = self.status.masked_fill(stopped, int(Status.CONVERGED))
        if self.improving and (move is None or move.breakdown is None):
            return  # a sample that improved has not diverged, and nothing broke down: it stops because it has converged
        done = tests.arrived()
        self.status = self.status.masked_fill(stopped & ~done, int(Status.BREAKDOWN))
        if move is not None and move.saddle is not None:
            self.status = self.status.masked_fill(stopped & move.saddle, int(Status.SADDLE))
        self.status = self.status.masked_fill(stopped & ~tests.good, int(Status.NONFINITE))
        if self.rejudges:
            dead = stopped & ~done
            self.alive = ~dead if self.alive is None else self.alive & ~dead
        if move is not None and move.solved is not None:  # the step confirmed them without moving them: not a step
            self.steps = self.steps - (stopped & move.solved).to(self.steps.dtype)

    def _resume(self, rows: Tensor, rank: Tensor) -> None:
        """Let samples go on that had stopped: others have moved, and through the map they change these residuals."""
        self.status = self.status.masked_fill(rows, _RUNNING)
        # the old best iterate was judged beside other neighbours: its rank compares with nothing of now
        self.best = self.point.stopped(rows, self.best)
        self.best_rank = torch.where(rows, rank, self.best_rank)
        self.mixed = True

    def _shrink(self, state: Any) -> Any:
        """Remove the finished samples from the batch."""
        self._store()
        assert self.running is not None
        keep = self.running.nonzero().squeeze(1)
        if self.rows is None:  # the first time: rowwise=True is tested before it is relied on
            self._check_promise(keep[:1])
        self.rows = keep if self.rows is None else self.rows[keep]
        self.evaluate = self.evaluate.take(keep)
        self.point, self.best = self.point.take(keep), self.best.take(keep)
        self.judge = self.judge.take(keep)
        for name in ("limit", "unit", "within", "best_rank", "status", "steps"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[keep])
        self.running = None
        return take_rows(state, keep)

    def _check_features(self) -> None:
        """Test ``rowwise=True`` at the start where an argument whose dim 0 has the batch's size may be one of features.

        With as many features as samples, a vector ``[features]`` would be indexed like a batch, and its one number left
        would broadcast over all features without an error. One sample is evaluated alone and compared.
        """
        system, point = self.evaluate.system, self.point
        if system.row_params is None or system.leaves is None or not self.active:
            return
        carrying = [
            p
            for p, carries in zip(self.evaluate.params, system.row_params, strict=True)
            if carries and p.numel() and any(size % p.numel() == 0 for size in system.leaves.sizes)
        ]
        if not carrying:
            return
        row = point.growth_norm().nan_to_num(-1.0, -1.0).argmax()[None]  # the sample with the most to show
        there = point.z.index_add(0, row, point.residual[row])  # off the start, whose zeros would hide a factor
        evaluate_one = self.evaluate.take(row)
        together, alone = self.evaluate(there).take(row), evaluate_one(there[row])
        self.evaluate.rows_evaluated += 1
        shapes = ", ".join(str(tuple(p.shape)) for p in carrying)
        self._compare(together, alone, f", with the arguments of shapes {shapes} taken to carry the batch")

    def _check_promise(self, row: Tensor) -> None:
        """Evaluate one sample alone, once a solve: it must give what it gave in the whole batch."""
        evaluate_one = self.evaluate.take(row)
        together, alone = self.point.take(row), evaluate_one(self.point.z[row])
        self.evaluate.rows_evaluated = evaluate_one.rows_evaluated
        self._compare(together, alone)

    @staticmethod
    def _compare(together: Point, alone: Point, how: str = "") -> None:
        size = row_norm(together.residual)
        if together.scale is not None:
            size = size + (together.scale if together.scale.ndim == 1 else row_norm(together.scale))
        gap = row_norm(alone.residual - together.residual)
        # eps ** 0.4 (1.7e-3 in float32): other batch sizes take other kernels, whose rounding a deep network amplifies
        if bool(gap > torch.finfo(together.z.dtype).eps ** 0.4 * size):
            broken_promise(f"a sample's residual changed by {float(gap / size):.1g} (relative) when it was alone{how}")

    def _go_to_last(self, samples: Tensor) -> None:
        """Return ``samples`` at their last iterates in place of their best ones."""
        if self.point.error is None:  # the norm is not on the point: ``_results`` takes it from the rank
            self.best_rank = torch.where(samples, self.point.size(), self.best_rank)
        self.best = self.point.stopped(samples, self.best)

    def _results(self) -> dict[str, Tensor]:
        best = self.best
        size = best.size() if best.error is not None else self.best_rank
        assert best.scale is not None
        parts = relative_to(size, best.scale)
        results = {"z": best.z, "residual": worst(parts), "status": self.status, "steps": self.steps}
        results |= {"norm": size, "parts": parts, "terms": best.scale}
        measure = self.judge.measure
        if measure is not None:
            results |= {"recent": measure.recent, "most": measure.most}
        return results

    def _store(self) -> None:
        """Write the current batch's results to their places in the first batch."""
        for name, value in self._results().items():
            if self.rows is None:
                self.full[name] = value.clone()
            else:
                self.full[name].index_copy_(0, self.rows, value)

    def _finish(self, trajectory: tuple[Tensor | None, ...], state: Any) -> SolverResult:
        if self.active or not self.certain:
            running = self.status == _RUNNING
            if self.solver.return_last:
                self._go_to_last(running)
            self.status = torch.where(running, int(Status.MAX_STEPS), self.status)
            self.steps = torch.where(running, self.solver.max_steps, self.steps)
        if self.rows is None:
            results = self._results()
        else:
            self._store()
            results, state = self.full, None
            measure = self.first_judge.measure
            if measure is not None:  # the review judges the first batch, and needs every sample's sizes of late
                measure.recent, measure.most = results["recent"], results["most"]
        if self.suspect or not self.plain:
            sizes = [results[name] for name in ("terms", "recent") if name in results]
            self.extreme = bool(extreme(sizes[0] if len(sizes) == 1 else torch.stack(sizes)).any())
        evaluations = self.evaluate.rows_evaluated / max(self.batch, 1)
        report = Report(results["status"], results["steps"], results["residual"], evaluations)
        return SolverResult(results["z"], report, trajectory, state, results["norm"], results["parts"])


def take_rows(state: Any, rows: Tensor) -> Any:
    """The part of a solver's state that belongs to the samples ``rows`` (int64 ``[k]``): of a ``NamedTuple`` of
    tensors, numbers, preconditioners and nested tuples of these."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, PreparedPreconditioner):
        return state.restrict(rows)
    if isinstance(state, tuple):
        parts = [take_rows(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
