"""The loop of the solvers as one function of tensors: what :mod:`torchimplicit.solvers.iterate` does, by masks alone.

Whatever the host decides there by looking is decided here for each sample; none leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.steps import Place, Step
from torchimplicit.problems import Point
from torchimplicit.solution import Status

_RUNNING = -1

Evaluate = Callable[[Tensor, Any], Point]
"""``(z, constants) -> Point``: one evaluation, by the constants of the loop alone."""


class Rule(NamedTuple):
    """When a sample is solved, and when it is lost.

    Attributes:
        floor: what the residual may be whatever its scale, ``[batch]`` or ``[batch, leaves]``.
        rtol: what it may be of its scale.
        limit: ``[batch]``, beyond which the residual has grown without bound.
        unit: of the residuals of leaves, ``[batch, leaves]``, when it comes to which iterate is the best one.
        rejudges: whether samples that had stopped are judged by every later evaluation, since they may depend on
            others.
    """

    floor: Tensor
    rtol: Any
    limit: Tensor
    unit: Tensor
    rejudges: bool

    def tolerance(self, point: Point) -> Tensor:
        """What the residual of ``point`` may be."""
        assert point.scale is not None
        return self.floor + self.rtol * point.scale

    def rank(self, size: Tensor) -> Tensor:
        """What the best iterate has least of, ``[batch]``."""
        return size if size.ndim == 1 else (size / self.unit).amax(dim=1)


class Found(NamedTuple):
    """What the loop knows of each sample.

    Attributes:
        z: the best iterate, ``[batch, dim]``.
        size, scale: what its relative residual is made of.
        status, steps: int64 ``[batch]``, as the loop of the solvers has them.
    """

    z: Tensor
    size: Tensor
    scale: Tensor
    status: Tensor
    steps: Tensor

    @property
    def running(self) -> Tensor:
        """bool ``[batch]``: those that still take part."""
        return self.status == _RUNNING

    @property
    def residual(self) -> Tensor:
        """The relative residual, ``[batch]``."""
        relative = self.size / self.scale.clamp_min(torch.finfo(self.scale.dtype).tiny)
        return relative if relative.ndim == 1 else relative.amax(dim=1)


class _Carried(NamedTuple):
    step: Tensor
    place: Place
    found: Found
    state: Any


def run(
    step: Step, evaluate: Evaluate, first: Point, rule: Rule, constants: Any, max_steps: int
) -> tuple[Found, Tensor]:
    """Iterate from ``first`` until every sample has stopped; returns what was found, and the number of steps.

    Args:
        first: the evaluation at the start.
        constants: what ``evaluate`` needs.
    """
    step_count = torch.zeros((), dtype=torch.int64, device=first.z.device)
    size = first.size()
    status = torch.full_like(rule.limit, _RUNNING, dtype=torch.int64)
    start = Found(first.z, size, _of(first.scale), status, torch.zeros_like(status))
    found = _judged(first, rule, start, step_count)
    carried = _Carried(step_count, Place.of(first), found, step.start(first))

    def going(now: _Carried) -> Tensor:
        return (now.step < max_steps) & (now.found.running.sum() > 0)

    def body(now: _Carried, given: Any) -> _Carried:
        floor, limit, unit, constants = given
        here = rule._replace(floor=floor, limit=limit, unit=unit)
        count = now.step + 1
        to, state = step.propose(now.place, now.state, now.step)
        z = torch.where(now.found.running[:, None], to, now.place.z)
        point = evaluate(z, constants)
        found = _judged(point, here, now.found, count)
        place, state = step.learn(now.place, point, state, now.step)
        stopped = now.found.running & ~found.running
        # a sample that stops for good goes to its best iterate: the map never sees a bad state again
        place = place._replace(z=torch.where(stopped[:, None], found.z, place.z))
        return _Carried(count, place, found, state)

    end = while_loop(going, body, carried, (rule.floor, rule.limit, rule.unit, constants))
    found = end.found
    left = found.status == _RUNNING
    return found._replace(
        status=torch.where(left, int(Status.MAX_STEPS), found.status), steps=torch.where(left, max_steps, found.steps)
    ), end.step


def _judged(point: Point, rule: Rule, found: Found, count: Tensor) -> Found:
    """Test every sample that runs, and note those that stop here; ``count`` is zero for the start."""
    size, running = point.size(), found.running
    within = size <= rule.tolerance(point)
    done = within if within.ndim == 1 else within.all(dim=1)
    status, known = found.status, found.size
    if rule.rejudges:
        resumed = (status == Status.CONVERGED) & ~done
        status, running = torch.where(resumed, _RUNNING, status), running | resumed
        known = torch.where(resumed if known.ndim == 1 else resumed[:, None], torch.inf, known)
    good = point.reach() <= rule.limit
    stopped = running & (done | ~good)
    better = running & (rule.rank(size) < rule.rank(known)) | stopped & done
    reason = torch.where(done, int(Status.CONVERGED), int(Status.NONFINITE))
    wide = better if size.ndim == 1 else better[:, None]
    return Found(
        z=torch.where(better[:, None], point.z, found.z),
        size=torch.where(wide, size, found.size),
        scale=torch.where(wide, _of(point.scale), found.scale),
        status=torch.where(stopped, reason, status),
        steps=torch.where(stopped, count, found.steps),
    )


def _of(scale: Tensor | None) -> Tensor:
    assert scale is not None
    return scale
