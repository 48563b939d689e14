"""Steps that evaluate several points, and the line search that they make, as functions of tensors alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.rings import Rings
from torchimplicit.captured.steps import Stepping
from torchimplicit.problems import Point
from torchimplicit.solvers.line_search import EXPANSIONS, Bracket, level_of, weighed
from torchimplicit.solvers.tolerance import Judge

Fields = dict[str, Any]
"""What an evaluation tells of a point, by the names of :class:`~torchimplicit.problems.Point`."""


def fields(point: Point) -> Fields:
    """Those of ``point``."""
    return {name: t for name, t in vars(point).items() if t is not None}


class Ground(NamedTuple):
    """What a searching step stands on.

    Attributes:
        evaluate: ``(z, constants) -> Point``, on the constraint where there is one.
        constants: what evaluations need.
        running: bool ``[batch]``, the samples that take part.
        judge: the rule by which samples are judged.
    """

    evaluate: Callable[[Tensor, Any], Point]
    constants: Any
    running: Tensor
    judge: Judge


class Moved(NamedTuple):
    """Where a step has led, and its state.

    Attributes:
        breakdown: bool ``[batch]``, samples for which the method cannot go on.
        spent: int64, how many evaluations it took.
        solved: bool ``[batch]``, samples that the step has found to be solved where they are; ``None`` for none.
        refused: bool ``[batch]``, samples whose step tells nothing of the terms of their residuals.
    """

    point: Point
    state: Any
    breakdown: Tensor
    spent: Tensor
    solved: Tensor | None = None
    refused: Tensor | None = None


class Searching(Stepping):
    """A step that says itself where it leads."""

    confirms: bool = False
    """Whether a sample counts as solved only once a step has said so."""

    @abstractmethod
    def move(self, ground: Ground, at: Point, state: Any, rings: Rings) -> Moved:
        """One step from ``at``."""


class Search(NamedTuple):
    """Where a line search ended, the samples that found no decrease, the points that were tried last, how many each
    sample tried, int64 ``[batch]``, and how many evaluations there were."""

    point: Point
    failed: Tensor
    last: Point
    trials: Tensor
    spent: Tensor


class _Trying(NamedTuple):
    trial: Tensor
    searching: Tensor
    moved: Tensor
    size: Tensor
    bracket: Bracket
    best: Fields
    reached: Fields
    last: Fields
    trials: Tensor


def search(ground: Ground, point: Point, direction: Tensor, active: Tensor, trials: int) -> Search:
    """What :func:`torchimplicit.solvers.line_search.search` does, by masks."""
    assert point.energy is not None
    evaluate = ground.evaluate
    slope = -(point.residual * direction).sum(dim=1)
    searching = (slope < 0) & active
    failed = active & ~searching
    size, unbounded = torch.ones_like(slope), torch.full_like(slope, torch.inf)
    bracket = Bracket(torch.zeros_like(slope), point.energy, slope, unbounded, unbounded, unbounded)
    here = fields(point)
    none = torch.zeros((), dtype=torch.int64, device=slope.device)
    spent = torch.zeros_like(slope, dtype=torch.int64)
    now = _Trying(none, searching, torch.zeros_like(searching), size, bracket, here, here, here, spent)

    def body(now: _Trying, outer: Any, rings: Any) -> _Trying:
        constants, z, direction, start, slope = outer
        level, reached = level_of(start), Point(**now.reached)
        chosen = now.searching
        there = torch.where(chosen[:, None], z + now.size[:, None].to(z.dtype) * direction, reached.z)
        tried = evaluate(there, constants).select(chosen, reached)
        assert tried.energy is not None
        bent = -(tried.residual * direction).sum(dim=1)
        enough, short = weighed(tried.energy, bent, now.size, start, slope, level, chosen)
        trial = now.trial + 1
        # an energy that falls without end must not use up the trials of every step
        short = short & ((trial < EXPANSIONS) | torch.isfinite(now.bracket.high))
        accepted = enough & ~short
        bracket = now.bracket.narrowed(now.size, tried.energy, bent, short, chosen & ~enough)
        halved, other = (bracket.next_size(slope, level, halve=halve) for halve in (True, False))
        return _Trying(
            trial,
            chosen & ~accepted,
            now.moved | enough,
            torch.where(trial % 3 == 0, halved, other),
            bracket,
            fields(tried.select(enough, Point(**now.best))),
            fields(tried.select(accepted, reached)),
            fields(tried),
            now.trials + chosen,
        )

    def on(now: _Trying) -> Tensor:
        return (now.trial < trials) & (now.searching.sum() > 0)

    end = while_loop(on, body, now, (ground.constants, point.z, direction, point.energy, slope))
    failed = failed | (end.searching & ~end.moved)
    return Search(Point(**end.best), failed, Point(**end.last), end.trials, end.trial)
