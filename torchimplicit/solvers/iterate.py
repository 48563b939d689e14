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

from torchimplicit.coupling import broken_promise
from torchimplicit.linear import PreparedPreconditioner
from torchimplicit.problems import Point, System
from torchimplicit.solution import GROWTH_LIMIT, Report, Status
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.given_steps import take_steps
from torchimplicit.solvers.magnitude import (
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
"""After so many steps a leaf that had no residual at first has one, if it is to have any."""

SHRINK_AT = 0.75
"""Finished samples leave the batch once at most this share of it is still active."""

ROUNDS = 4
"""How often samples may be sent on that a look at the whole has found unsolved."""

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
        first: the evaluation at ``z0``, where it has been made already.
        recorded: how many of the last of a given number of steps autograd sees; ``None``: all.
        only: bool ``[batch]``, the samples to solve for; ``None``: all. The figures of the others say nothing.
        since: the sizes of the state where another solver began that has led to ``z0``, ``[batch]`` or ``[batch,
            leaves]``: first sizes, besides those of ``z0``.
        units: in which that one has solved it.
    """
    if units is not None:
        return solved_in(units, iterate, solver, system, z0, params, only, since)
    if solver.steps is not None:
        return take_steps(solver.leading, system, z0, params, first, recorded)
    if isinstance(solver, Polyalgorithm):
        return in_turn(iterate, solver, system, z0, params, first)
    if as_one(solver, system):
        together = as_one_system(iterate, solver, system, z0, params)
        if together is not None:
            return together
    evaluate = Evaluator(system, params, rows_evaluated=0 if first is None else z0.shape[0])
    loop = _Loop(solver, evaluate, evaluate(evaluate.project(z0)) if first is None else first, only, since=since)
    del first, z0  # a start that is left behind is let go
    units = first_units(system, loop.point, params) if loop.suspect and since is None else None
    if units is not None:
        outcome = solved_in(units, iterate, solver, system, loop.point.z, params, only)
        return outcome.having_spent(evaluate.rows_evaluated / len(outcome.z))
    outcome = loop.run()
    if loop.stepped:  # or what was found was found by the whole
        outcome = reviewed(solver, evaluate, outcome, loop.first_judge, loop.mixed, loop.active > 0)
    return examined(iterate, outcome, loop.first_judge, solver, system, params) if loop.extreme else outcome


def as_one(solver: Solver, system: System) -> bool:
    """Whether samples are known to depend on each other in a way that the solver has to solve them as one system."""
    coupling = system.coupling
    if coupling is None or not coupling.found:
        return False
    return solver.searches or (solver.remembers and coupling.memory.together)


def reviewed(
    solver: Solver, evaluate: Evaluator, outcome: SolverResult, judge: Judge, mixed: bool, unsolved: bool
) -> SolverResult:
    """The outcome once the whole problem has confirmed what it claims; samples that it does not confirm go on.

    Args:
        judge: the rule of the loop that led there, for its first batch.
        mixed: whether what is returned may not be what was evaluated last.
        unsolved: whether steps have run out.
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
        # what its last step told a sample of its terms was too much
        loop = _Loop(left, evaluate, evaluate(outcome.z), only=verdict.again, strict=0.1 ** (tried + 1), since=since)
        outcome = after(outcome, loop.run(), verdict.again)
        mixed, unsolved = loop.mixed, loop.active > 0
    assert verdict.again is not None
    return given_up(outcome, verdict.again)


class _Tests(NamedTuple):
    """What is known of each sample at a point, ``[batch]``.

    Attributes:
        norm, tolerance: what is compared, ``[batch]`` or ``[batch, leaves]``.
        rank: by which iterates are compared.
        good: bool, finite and within the limit of growth.
        done: bool, within the tolerance, or found solved by the step; ``None``: not asked yet.
        going: bool, good and not done, and the step can go on.
    """

    norm: Tensor
    tolerance: Tensor
    rank: Tensor
    good: Tensor
    done: Tensor | None
    going: Tensor

    def arrived(self) -> Tensor:
        """``done``."""
        return self.norm <= self.tolerance if self.done is None else self.done


class _Loop:
    """The loop's variables, for the samples that the current batch holds.

    Attributes:
        point: where the samples are. One that is done stays at its best iterate.
        best: the iterate of least residual (or merit, where the point has one), which is ``best_rank``. It *is*
            ``point`` while all that are active improve; then it is a point at rest, whose residual is not kept.
        active: how many samples were active when the host last asked.
        improved: how many had improved then.
        certain: whether ``active`` is the count of this very moment.
        first_judge: of the first batch.
        stepped: whether there was any step.
        mixed: whether what is returned may not be what was evaluated last.
        suspect: whether the first numbers are so small, or so large, that squares may underflow or overflow.
        extreme: whether those of the norms did by which samples were judged; known at the end.
        confirmed: whether the solver says which samples are solved; ``within`` are then those that the rule has found.
        smooth: whether all samples have been active so far, and have improved in every step.
        unit: ``[batch, leaves]``, the first residual of each leaf, by which iterates are compared; ``None`` for one
        leaf. running: bool ``[batch]``, the active samples; ``None`` for all. improving: whether every active sample is
        known to have improved with the last step. rows: the current batch's places in the first batch; ``None`` while
        all samples are in it. full: the results of the first batch, once samples have left it.
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
        """``[batch]``, what a sample's residual may become from the first ``point``."""
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
            # the energy falls in every step, and from beside a saddle that leads to where gradients are steep
            first = first * GROWTH_LIMIT**2
        # a start at a solution has no limit, from which others may move it; a first evaluation that is not finite is
        # beyond any, and such a sample stops at once
        return torch.where(first > 0, GROWTH_LIMIT * first, torch.finfo(growth.dtype).max)

    def run(self) -> SolverResult:
        solver = self.solver
        trajectory = [self.point.z if solver.keeps(0) else None]
        self._check_features()
        if self.judge.measure is not None and self.active and solver.wants_product():
            self._look_ahead(self.judge.measure)
        trace = [traced(self.point)] if solver.keep_trace else []
        state = solver.start(self.point)
        # a step that has nothing of its point but the image leaves no residual behind
        told = self.point.error is not None and self.point.judgement is None  # its size, without the residual
        lean, nothing = solver.straight and self.judge.measure is None and told, self.point.z.new_zeros(1, 1)
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
                if nothing.shape != self.point.z.shape:
                    nothing = nothing[:1, :1].expand_as(self.point.z)
                self.best = self.point = self.point.changed(residual=nothing, image=self.point.z)
            self._advance(move.to)
            if solver.keep_trace:
                trace.append(traced(self.point))
            if solver.keep_trajectory:
                trajectory.append(self.point.z if solver.keeps(step) else None)
            self._judge(step, move, ask=step % solver.check_every == 0)
        if self.confirmed and self.steps.numel():  # the step that found them solved has moved nobody
            taken = int(torch.where(self.status == _RUNNING, solver.max_steps, self.steps).amax()) + 1
            trajectory, trace, self.stepped = trajectory[:taken], trace[:taken], taken > 1
        found = self._finish(tuple(trajectory) if solver.keep_trajectory else (), state)
        return replace(found, trace=tuple(trace)) if trace else found

    def _look_ahead(self, measure: Measure) -> None:
        """Take one product of the Jacobian with the first residual: it gives a first step its length, and finds a start
        that is a solution already."""
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
            point = self.evaluate.system.refined(self.evaluate(self.evaluate.project(z)), before)
        self.point = point if self.judge.measure is None else self.judge.measure.step(point, before)

    def _judge(self, step: int, move: Move | None, ask: bool = True) -> None:
        """Test every active sample, and note those that stop here. Reads from the device once, if ``ask``.

        The states of a sample::

            start ──► running ──┬── within the tolerance, or the step says so ──► CONVERGED ──┐
                      ▲   ▲  │  ├── the step cannot go on ──► BREAKDOWN, or SADDLE            │
                      │   │  │  ├── not finite, or grown beyond the limit ──► NONFINITE       │
                      │   └──┘  └── no steps are left ──► MAX_STEPS (in ``_finish``)          │
                      └── resumed: the others moved on, and the map couples it to them ───────┘

        A sample that stops is frozen at its best iterate, which for most is the last one. While all improve, ``best``
        is ``point`` itself and nothing is copied; in the common case, where all go on as well, the host asks for one
        predicate and is done.
        """
        point = self.point
        norm, tolerance = point.size(), self.judge.tolerance(point)
        if self.smooth and self._all_improve(norm, tolerance, step, move, ask):
            return
        if move is not None and move.left is not None:
            self.best_rank = self.best_rank.masked_fill(move.left, torch.inf)
        tests = self._tested(norm, tolerance, step, move)
        going, rank, improved = tests.going, tests.rank, tests.rank < self.best_rank
        before, was_running, was_certain = self.active, self.running, self.certain
        resumed, counted = None, [going, improved]
        if was_running is not None:
            improved = improved & was_running
            if self.rejudges:  # every evaluation is of the whole batch, and judges those that had stopped as well
                going = going if self.alive is None else going & self.alive
                resumed = going & ~was_running
                counted = [going, improved, resumed]
            else:
                going = going & was_running
                counted = [going, improved]
        if step == 0:
            counted.append(extreme_at_first(self.judge, norm, self.lowest))
        more = self._count(counted, step, before, ask)
        self.running = None if ask and self.active == len(going) else going
        if resumed is not None and (more or not ask):
            self._resume(resumed, rank)
        before += more
        if self.improving and not more:
            # whoever stops here stops at its best iterate, and whoever stopped before has not moved
            # (where a step gives points, it knows nothing more of those)
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
        # a sample that stops for good goes to its best iterate: the map never sees a bad state again
        self.point = point.changed(z=torch.where(stopped[:, None], self.best.z, point.z))

    def _all_improve(self, norm: Tensor, tolerance: Tensor, step: int, move: Move | None, ask: bool) -> bool:
        """Whether all samples go on and have improved, as they have so far: then they are where they were best."""
        unsolved = norm > (tolerance if step else tolerance.clamp_min(self.lowest))
        self.smooth = ask and (move is None or (move.breakdown is None and move.solved is None))
        # what improves on what was within the limit is so, too
        self.smooth = self.smooth and bool((unsolved & (norm < self.best_rank)).all())
        if self.smooth:
            self.best, self.best_rank, self.suspect = self.point, norm, False
        else:
            self.tries -= 1  # to have asked for nothing costs a read from the device
        return self.smooth

    def _tested(self, norm: Tensor, tolerance: Tensor, step: int, move: Move | None) -> _Tests:
        """What the point, and the step that led to it, say of each sample."""
        point, judgement = self.point, self.point.judgement
        solved = None if move is None else move.solved
        rank = norm if judgement is None else judgement.merit
        single = norm.ndim == 1
        good = (norm if single and judgement is None else point.growth_norm()) <= self.limit
        if not single and judgement is None:
            assert self.unit is not None
            if 0 < step <= APPEARS:
                # a leaf that has no residual at the start (that of a state of zeros, say) has no unit yet
                tiny = torch.finfo(norm.dtype).tiny
                fresh = norm.clamp_min(tiny) if step < APPEARS else torch.where(norm > 0, norm, 1)
                self.unit = torch.where(self.unit > tiny, self.unit, fresh)
            # beside leaves in another unit, one that had no residual at first may seem to grow
            good = good | (norm <= GROWTH_LIMIT * self.unit).all(dim=1)
            rank = (norm / self.unit).amax(dim=1)
        done: Tensor | None = None
        if single and solved is None and not self.confirmed:
            going = (norm > tolerance) & good  # one operation less than by way of ``done``
        else:
            done = norm <= tolerance if single else (norm <= tolerance).all(dim=1)
            if self.confirmed and step < self.solver.max_steps:
                # the rule has found them; the next step knows more than a residual, and says whether they are solved
                self.within, done = done, torch.zeros_like(done)
            done = done if solved is None else done | solved
            going = good & ~done
        if move is not None and move.breakdown is not None:
            going = going & ~move.breakdown
        return _Tests(norm, tolerance, rank, good, done, going)

    def _count(self, counted: list[Tensor], step: int, before: int, ask: bool) -> int:
        """Read how many samples go on, have improved, and have resumed, all in one; returns the last.

        Where the host does not ask, ``active`` is that of before, and nothing is known of who improves.
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
        """Note why the samples ``stopped`` do so; what outweighs another reason comes after it."""
        self.steps = self.steps.masked_fill(stopped, step)
        self.status = self.status.masked_fill(stopped, int(Status.CONVERGED))
        if self.improving and (move is None or move.breakdown is None):
            return  # what has improved is good: it stops since it is there
        done = tests.arrived()
        self.status = self.status.masked_fill(stopped & ~done, int(Status.BREAKDOWN))
        if move is not None and move.saddle is not None:
            self.status = self.status.masked_fill(stopped & move.saddle, int(Status.SADDLE))
        self.status = self.status.masked_fill(stopped & ~tests.good, int(Status.NONFINITE))
        if self.rejudges:
            dead = stopped & ~done
            self.alive = ~dead if self.alive is None else self.alive & ~dead
        if move is not None and move.solved is not None:  # it has found them where they were
            self.steps = self.steps - (stopped & move.solved).to(self.steps.dtype)

    def _resume(self, rows: Tensor, rank: Tensor) -> None:
        """Let samples go on that had stopped, since the others have moved on and the map depends on them."""
        self.status = self.status.masked_fill(rows, _RUNNING)
        self.best = self.point.stopped(rows, self.best)
        self.best_rank = torch.where(rows, rank, self.best_rank)
        self.mixed = True

    def _shrink(self, state: Any) -> Any:
        """Let the finished samples leave the batch."""
        self._store()
        assert self.running is not None
        keep = self.running.nonzero().squeeze(1)
        if self.rows is None:
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
        """Evaluate one sample alone where an argument with the batch's size in dim 0 may have that of the features in
        it: a vector of them would be indexed like a batch, and one number of it fit every feature."""
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
        row = point.growth_norm().nan_to_num(-1.0, -1.0).argmax()[None]
        there = point.z.index_add(0, row, point.residual[row])
        alone = self.evaluate.take(row)
        known, found = self.evaluate(there).take(row), alone(there[row])
        self.evaluate.rows_evaluated += 1
        shapes = ", ".join(str(tuple(p.shape)) for p in carrying)
        self._compare(known, found, f", with the arguments of shapes {shapes} taken to carry the batch")

    def _check_promise(self, row: Tensor) -> None:
        """Evaluate one sample alone, once a solve: it must give what it gave in the whole batch."""
        alone = self.evaluate.take(row)
        known, found = self.point.take(row), alone(self.point.z[row])
        self.evaluate.rows_evaluated = alone.rows_evaluated
        self._compare(known, found)

    @staticmethod
    def _compare(known: Point, found: Point, how: str = "") -> None:
        size = row_norm(known.residual)
        if known.scale is not None:
            size = size + (known.scale if known.scale.ndim == 1 else row_norm(known.scale))
        gap = row_norm(found.residual - known.residual)
        if bool(gap > torch.finfo(known.z.dtype).eps ** 0.4 * size):
            broken_promise(f"a sample's residual changed by {float(gap / size):.1g} (relative) when it was alone{how}")

    def _go_to_last(self, samples: Tensor) -> None:
        """Return ``samples`` where they are, in place of their best iterates."""
        if self.point.error is None:  # then the residual is what iterates are ranked by
            self.best_rank = torch.where(samples, self.point.size(), self.best_rank)
        self.best = self.point.stopped(samples, self.best)

    def _results(self) -> dict[str, Tensor]:
        best = self.best
        size = best.size() if best.error is not None else self.best_rank
        assert best.scale is not None
        parts = relative_to(size, best.scale)
        found = {"z": best.z, "residual": worst(parts), "status": self.status, "steps": self.steps}
        found |= {"norm": size, "parts": parts, "terms": best.scale}
        measure = self.judge.measure
        if measure is not None:
            found |= {"recent": measure.recent, "most": measure.most}
        return found

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
            found = self._results()
        else:
            self._store()
            found, state = self.full, None
            measure = self.first_judge.measure
            if measure is not None:
                measure.recent, measure.most = found["recent"], found["most"]
        if self.suspect or not self.plain:
            sizes = [found[name] for name in ("terms", "recent") if name in found]
            self.extreme = bool(extreme(sizes[0] if len(sizes) == 1 else torch.stack(sizes)).any())
        evaluations = self.evaluate.rows_evaluated / max(self.batch, 1)
        report = Report(found["status"], found["steps"], found["residual"], evaluations)
        return SolverResult(found["z"], report, trajectory, state, found["norm"], found["parts"])


def take_rows(state: Any, rows: Tensor) -> Any:
    """A solver's state (a ``NamedTuple`` of tensors, numbers, preconditioners and such tuples) for the samples
    ``rows``."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, PreparedPreconditioner):
        return state.restrict(rows)
    if isinstance(state, tuple):
        parts = [take_rows(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
