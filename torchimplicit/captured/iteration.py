"""The loop of the solvers as one function of tensors: what :mod:`torchimplicit.solvers.iterate` does, by masks alone.

Whatever the host decides there by looking is decided here for each sample; none leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.search import Ground, Moved, Searching, fields
from torchimplicit.captured.steps import Stage, Step, Stepping, place_of
from torchimplicit.problems import Point
from torchimplicit.solution import GROWTH_LIMIT, Status
from torchimplicit.solvers.iterate import APPEARS
from torchimplicit.solvers.result import relative_to
from torchimplicit.solvers.tolerance import RUN_OFF, Judge

_RUNNING = -1

Evaluate = Callable[[Tensor, Any], Point]
"""``(z, constants) -> Point``: one evaluation, by the constants of the loop alone."""


class Terms(NamedTuple):
    """What is known of the terms of residuals that hide them: see
    :class:`~torchimplicit.solvers.tolerance.Measure`. ``scale`` is that of the present point."""

    recent: Tensor
    most: Tensor
    local: Tensor
    scale: Tensor


class Rule(NamedTuple):
    """When a sample is solved, and when it is lost.

    Attributes:
        judge: the rule of the solvers' loop, at the first point.
        limit: ``[batch]``, beyond which the residual has grown without bound.
        unit: of the residuals of leaves, ``[batch, leaves]``, by which iterates are compared; tiny for a leaf that has
            shown none yet. An empty tree where the state is a single leaf.
        rejudges: whether samples that had stopped are judged by every later evaluation, since they may depend on
            others.
    """

    judge: Judge
    limit: Tensor
    unit: Any
    rejudges: bool

    def constants(self) -> Any:
        """The tensors that do not change, a tree."""
        return self.limit, _tensors(self.judge), _tensors(self.judge.measure)

    def at(self, constants: Any, unit: Any, terms: Any = ()) -> Rule:
        """The rule with those tensors, in the loop's body, and with what is known of units and terms by now."""
        limit, of_judge, measured = constants
        judge = copy(self.judge)
        vars(judge).update(of_judge)
        if judge.measure is not None:
            judge.measure = copy(judge.measure)
            vars(judge.measure).update(measured)
            if terms:
                judge.measure.recent, judge.measure.most, judge.measure.local, _ = terms
        return self._replace(judge=judge, limit=limit, unit=unit)

    def terms(self, point: Point) -> Any:
        """What is known of terms; nothing where points tell them."""
        measure = self.judge.measure
        assert point.scale is not None
        return () if measure is None else Terms(measure.recent, measure.most, measure.local, point.scale)

    def measured(self, point: Point, place: Any, terms: Any, taken: Tensor) -> Point:
        """The point that a step from ``place`` has led to, with its terms."""
        measure = self.judge.measure
        if measure is None:
            return point
        first = RUN_OFF * (measure.recent + measure.system.norms(point.z - place.z))
        measure.most, measure.begun = torch.where(taken == 0, first, measure.most), True
        return measure.step(point, Point(place.z, place.residual, scale=terms.scale))

    def met(self, point: Point, taken: Tensor) -> Rule:
        """The rule once ``point`` has been reached by ``taken`` steps: a leaf whose residual was zero at first, as for
        a state of zeros, has one now."""
        if not isinstance(self.unit, Tensor):
            return self
        size = point.size()
        tiny = torch.finfo(size.dtype).tiny
        fresh = torch.where(taken < APPEARS, size.clamp_min(tiny), torch.where(size > 0, size, 1))
        return self._replace(unit=torch.where((self.unit <= tiny) & (taken <= APPEARS), fresh, self.unit))

    def rank(self, size: Tensor) -> Tensor:
        """What the best iterate has least of, ``[batch]``."""
        return size if size.ndim == 1 else (size / self.unit).amax(dim=1)

    def bounded(self, point: Point) -> Tensor:
        """bool ``[batch]``, whether the residual has not grown without bound. A leaf that had none at first may dwarf
        the others, whose sum set the limit."""
        good = point.growth_norm() <= self.limit
        if not isinstance(self.unit, Tensor):
            return good
        each = (point.size() <= GROWTH_LIMIT * self.unit).all(dim=1)
        return good | (each if point.judgement is None else each & point.judgement.growth.isfinite())


_VARYING = ("recent", "most", "local", "known", "refused")


def _tensors(owner: object) -> dict[str, Any]:
    values = {} if owner is None else vars(owner)
    return {name: t for name, t in values.items() if isinstance(t, Tensor) and name not in _VARYING}


class LoopResult(NamedTuple):
    """What the loop knows of each sample.

    Attributes:
        z: the best iterate, ``[batch, dim]``.
        size, scale: what its relative residual is made of.
        status, steps: int64 ``[batch]``, as the loop of the solvers has them.
        merit: ``[batch]``, what the best iterate has least of where points have a merit; else an empty tree.
    """

    z: Tensor
    size: Tensor
    scale: Tensor
    status: Tensor
    steps: Tensor
    merit: Any = ()

    @property
    def running(self) -> Tensor:
        """bool ``[batch]``: those that still take part."""
        return self.status == _RUNNING

    @property
    def parts(self) -> Tensor:
        """The relative residuals, ``[batch]`` or ``[batch, leaves]``."""
        return relative_to(self.size, self.scale)


class _Latest(NamedTuple):
    """The last point that was evaluated, and what its relative residual is made of."""

    z: Tensor
    residual: Tensor
    size: Tensor
    scale: Tensor


class _Carried(NamedTuple):
    step: Tensor
    place: Any
    found: LoopResult
    state: Any
    unit: Any
    terms: Any
    latest: Any
    spent: Any


class _Told(NamedTuple):
    """What a step says of samples, bool ``[batch]``: those that it has found solved where they are, those that it
    cannot take on, and those of which it leaves the word to the rule."""

    solved: Tensor
    broken: Tensor
    judged: Tensor


class Way(NamedTuple):
    """How the loop goes on from point to point.

    Attributes:
        evaluate: an evaluation.
        place: ``(z, constants) -> z``, back onto the constraint; ``None`` where there is none.
        refined: what a point tells more beside the one before; ``None`` for nothing.
    """

    evaluate: Evaluate
    place: Callable[[Tensor, Any], Tensor] | None = None
    refined: Callable[[Point, Point], Point] | None = None

    def at(self, z: Tensor, constants: Any) -> Point:
        """The point at ``z``, or where that is on the constraint."""
        return self.evaluate(z if self.place is None else self.place(z, constants), constants)

    def reached(self, z: Tensor, constants: Any, latest: Any) -> Point:
        """Likewise, with what is told by comparison with the ``latest`` one."""
        point = self.at(z, constants)
        return point if self.refined is None else self.refined(point, Point(latest.z, latest.residual))


def run(
    step: Stepping, way: Way, first: Point, rule: Rule, constants: Any, max_steps: int, return_last: bool = False
) -> tuple[LoopResult, Tensor, Any]:
    """Iterate from ``first`` until every sample has stopped; returns what was found, the number of evaluations but
    for the first, and what is known of terms.

    Args:
        first: the evaluation at the start.
        constants: what evaluations need.
        return_last: whether those whose steps run out end where they are, not at their best iterates.
    """
    step_count = torch.zeros((), dtype=torch.int64, device=first.z.device)
    status = torch.full_like(rule.limit, _RUNNING, dtype=torch.int64)
    merit = () if first.judgement is None else first.judgement.merit
    start = LoopResult(first.z, first.size(), _of(first.scale), status, torch.zeros_like(status), merit)
    none = torch.zeros_like(rule.limit, dtype=torch.bool)
    searches, confirms = isinstance(step, Searching), isinstance(step, Searching) and step.confirms
    result = _judged(first, rule, start, step_count, _Told(none, none, none if confirms else ~none))
    latest = _latest(first) if return_last or way.refined is not None else ()
    place = place_of(first)
    if searches:  # what an evaluation tells, and not what was learned of it
        later = ("product",) if rule.judge.measure is None else ("product", "scale", "error")
        place = fields(first.changed(**dict.fromkeys(later)))
    spent = torch.zeros_like(step_count) if searches else ()
    now = _Carried(step_count, place, result, step.start(first), rule.unit, rule.terms(first), latest, spent)
    rings = step.rings(first)
    fixed = rule.constants(), constants
    for stage in step.stages():
        limit = max_steps if stage.upto is None else min(stage.upto, max_steps)
        body = _searching(stage.step, way, rule, max_steps) if searches else _body(stage.step, way, rule)
        now = while_loop(_going(limit, stage), body, now, fixed, rings)
        if limit == max_steps and stage.behind is None:
            break
    result = now.found
    left = result.status == _RUNNING
    if return_last:
        wide = left if result.size.ndim == 1 else left[:, None]
        result = result._replace(
            z=torch.where(left[:, None], now.latest.z, result.z),
            size=torch.where(wide, now.latest.size, result.size),
            scale=torch.where(wide, now.latest.scale, result.scale),
        )
    return (
        result._replace(
            status=torch.where(left, int(Status.MAX_STEPS), result.status),
            steps=torch.where(left, max_steps, result.steps),
        ),
        now.spent if searches else now.step,
        now.terms,
    )


def _going(limit: int, stage: Stage) -> Callable[[_Carried], Tensor]:
    def going(now: _Carried) -> Tensor:
        on = (now.step < limit) & (now.found.running.sum() > 0)
        if stage.behind is None:
            return on
        behind = stage.behind(now.found.size, now.found.scale, now.step) & now.found.running
        return on & (behind.sum() == 0)

    return going


def _body(step: Any, way: Way, rule: Rule) -> Callable[[_Carried, Any, Any], _Carried]:
    def body(now: _Carried, outer: Any, rings: Any) -> _Carried:
        fixed, constants = outer
        here, count = rule.at(fixed, now.unit, now.terms), now.step + 1
        to, state = step.propose(now.place, now.state, rings, now.step)
        z = torch.where(now.found.running[:, None], to, now.place.z)
        point = here.measured(way.reached(z, constants, now.latest), now.place, now.terms, now.step)
        here = here.met(point, count)
        result = _judged(point, here, now.found, count)
        place, state = step.learn(now.place, point, state, rings, now.step)
        stopped = now.found.running & ~result.running
        # a sample that stops for good goes to its best iterate: the map never sees a bad state again
        place = place._replace(z=torch.where(stopped[:, None], result.z, place.z))
        latest = _latest(point) if isinstance(now.latest, _Latest) else ()
        return _Carried(count, place, result, state, here.unit, here.terms(point), latest, ())

    return body


def _searching(step: Any, way: Way, rule: Rule, max_steps: int) -> Callable[[_Carried, Any, Any], _Carried]:
    def body(now: _Carried, outer: Any, rings: Any) -> _Carried:
        fixed, constants = outer
        here = rule.at(fixed, now.unit, now.terms)
        running, at, count = now.found.running, Point(**now.place), now.step + 1
        moved: Moved = step.move(Ground(way.at, constants, running, here.judge), at, now.state, rings)
        to = moved.point.select(running, at)
        if here.judge.measure is not None and moved.refused is not None:
            here.judge.measure.refuse(moved.refused)
        point = here.measured(to, at, now.terms, now.step)
        here = here.met(point, count)
        solved = torch.zeros_like(running) if moved.solved is None else moved.solved
        last = torch.full_like(running, not step.confirms) | (count == max_steps)
        result = _judged(point, here, now.found, count, _Told(solved, moved.breakdown, last))
        stopped = running & ~result.running
        place = fields(to.changed(z=torch.where(stopped[:, None], result.z, to.z)))
        latest = _latest(point) if isinstance(now.latest, _Latest) else ()
        spent = now.spent + moved.spent
        return _Carried(count, place, result, moved.state, here.unit, here.terms(point), latest, spent)

    return body


def _judged(point: Point, rule: Rule, result: LoopResult, count: Tensor, verdict: _Told | None = None) -> LoopResult:
    """Test every sample that runs, and note those that stop here; ``count`` is zero for the start."""
    size, running = point.size(), result.running
    within = size <= rule.judge.tolerance(point)
    done = within if within.ndim == 1 else within.all(dim=1)
    if verdict is not None:
        done = verdict.solved | (done & verdict.judged)
    status, known, best = result.status, result.size, result.merit
    if rule.rejudges:
        resumed = (status == Status.CONVERGED) & ~done
        status, running = torch.where(resumed, _RUNNING, status), running | resumed
        known = torch.where(resumed if known.ndim == 1 else resumed[:, None], torch.inf, known)
        best = torch.where(resumed, torch.inf, best) if isinstance(best, Tensor) else best
    good = rule.bounded(point)
    stopped = running & (done | ~good if verdict is None else done | verdict.broken | ~good)
    if point.judgement is None:
        better = running & (rule.rank(size) < rule.rank(known)) | stopped & done
    else:
        better = running & (point.judgement.merit < best) | stopped & done
    if rule.rejudges:  # those that rest were evaluated again, where they are returned
        better = better | (status == Status.CONVERGED)
    lost: Any = int(Status.NONFINITE)
    if verdict is not None:
        lost, count = torch.where(good, int(Status.BREAKDOWN), lost), count - verdict.solved.long()
    reason = torch.where(done, int(Status.CONVERGED), lost)
    wide = better if size.ndim == 1 else better[:, None]
    return LoopResult(
        z=torch.where(better[:, None], point.z, result.z),
        size=torch.where(wide, size, result.size),
        scale=torch.where(wide, _of(point.scale), result.scale),
        status=torch.where(stopped, reason, status),
        steps=torch.where(stopped, count, result.steps),
        merit=() if point.judgement is None else torch.where(better, point.judgement.merit, best),
    )


def _latest(point: Point) -> _Latest:
    return _Latest(point.z, point.residual, point.size(), _of(point.scale))


def _before(limit: int) -> Callable[[_Stepping], Tensor]:
    return lambda now: now.step < limit


class _Seen(NamedTuple):
    """An evaluated point: its state, its residual, and what its size is judged by, where it tells that."""

    z: Tensor
    residual: Tensor
    figures: dict[str, Any]

    @staticmethod
    def of(point: Point) -> _Seen:
        """What is carried of ``point``."""
        names = ("scale", "error")
        return _Seen(point.z, point.residual, {n: t for n in names if (t := getattr(point, n)) is not None})

    def point(self) -> Point:
        """The point again."""
        return Point(self.z, self.residual, **self.figures)


class _Stepping(NamedTuple):
    step: Tensor
    place: Any
    state: Any
    before: Any
    seen: _Seen


def steps(
    step: Step, evaluate: Evaluate, first: Point, constants: Any, count: int
) -> tuple[Point | None, Point, Tensor]:
    """So many steps, at least one, from ``first``, which nothing tests: the last two points that were evaluated,
    ``None`` where there is but one, and where the last step leads."""
    seen, rings = _Seen.of(first), step.rings(first)
    none = torch.zeros((), dtype=torch.int64, device=first.z.device)
    before = seen if first.scale is None else ()  # it tells the terms of the last one that do not tell them
    now = _Stepping(none, place_of(first), step.start(first), before, seen)
    last: Any = step
    for stage in step.stages():
        limit = count - 1 if stage.upto is None else min(stage.upto, count - 1)

        def body(now: _Stepping, constants: Any, rings: Any, step: Any = stage.step) -> _Stepping:
            z, state = step.propose(now.place, now.state, rings, now.step)
            point = evaluate(z, constants)
            place, state = step.learn(now.place, point, state, rings, now.step)
            before = now.seen if isinstance(now.before, _Seen) else ()
            return _Stepping(now.step + 1, place, state, before, _Seen.of(point))

        last = stage.step
        if limit:
            now = while_loop(_before(limit), body, now, constants, rings)
        if limit == count - 1:
            break

    def leave(now: tuple[Tensor, Tensor], outer: Any, rings: Any) -> tuple[Tensor, Tensor]:
        place, state = outer
        return now[0] + 1, last.propose(place, state, rings, now[0])[0]

    # outside of a loop, rings are not what loops have written to them
    going = now.step, torch.zeros_like(first.z)
    _, z = while_loop(lambda now: now[0] < count, leave, going, (now.place, now.state), rings)
    return (now.before.point() if count > 1 and isinstance(now.before, _Seen) else None), now.seen.point(), z


def _of(scale: Tensor | None) -> Tensor:
    assert scale is not None
    return scale
