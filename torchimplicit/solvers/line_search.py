"""A line search for a batch of samples, each with its own step size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator

SUFFICIENT = 1e-4
"""Armijo's constant: the share of the predicted decrease that a step must bring."""

CURVATURE = 0.9
"""Wolfe's constant: the share of the initial slope that may remain."""

EXPANSIONS = 8
"""After so many trials, a step that still falls steeply and has met nothing too long is accepted."""

CROWD = 0.75
"""Where rows can be evaluated apart, a trial leaves out those samples whose search is over, once at most this share
of the batch still searches."""


class Search(NamedTuple):
    """Where the search ended; the samples that found no decrease, and did not move; whether there are any; the points
    that were tried last; and how many each sample tried, int64 ``[batch]``."""

    point: Point
    failed: Tensor
    any_failed: bool
    last: Point
    trials: Tensor


class Bracket(NamedTuple):
    """The interval in which an acceptable step lies, ``[batch]``, with the energies and slopes at its ends.

    ``low`` decreases the energy enough, but the slope there is still steep; ``high`` is too long, or infinite.
    """

    low: Tensor
    low_energy: Tensor
    low_slope: Tensor
    high: Tensor
    high_energy: Tensor
    high_slope: Tensor

    def narrowed(self, size: Tensor, energy: Tensor, slope: Tensor, short: Tensor, long: Tensor) -> Bracket:
        """The bracket once ``size`` has been tried, and found too ``short`` or too ``long``."""
        tried = (size, energy, slope)
        lows = [torch.where(short, new, old) for new, old in zip(tried, self[:3], strict=True)]
        highs = [torch.where(long, new, old) for new, old in zip(tried, self[3:], strict=True)]
        return Bracket(*lows, *highs)

    def next_size(self, slope: Tensor, level: Tensor, halve: bool) -> Tensor:
        """By interpolation of slopes, or of energies where that is shorter or both ends descend; never too near to an
        end.

        Args:
            slope: at zero.
            level: energies above this one differ from the first by more than rounding.
            halve: bisect instead, as it is done now and then lest the interpolation crawl.
        """
        width = self.high - self.low
        fall = self.low_slope * width
        by_slopes = self.low_slope / (self.low_slope - self.high_slope)
        by_energies = 0.5 * fall / (fall - (self.high_energy - self.low_energy))
        higher = self.high_energy > level
        by_slopes = torch.where(higher, torch.minimum(by_slopes, by_energies), by_slopes)
        share = torch.where(self.high_slope > 0, by_slopes, by_energies)
        share = torch.full_like(share, 0.5) if halve else share.nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.9)
        bent = self.low_slope - slope
        further = torch.where(bent > 0, -slope / bent, torch.inf).clamp(2, 10)
        return torch.where(torch.isinf(self.high), further * self.low, self.low + share * width)


def level_of(energy: Tensor) -> Tensor:
    """What energies must exceed to differ from ``energy`` by more than rounding."""
    return energy + torch.finfo(energy.dtype).eps ** (2 / 3) * energy.abs()


def weighed(
    energy: Tensor, there: Tensor, size: Tensor, start: Tensor, slope: Tensor, level: Tensor, searching: Tensor
) -> tuple[Tensor, Tensor]:
    """bool ``[batch]``: which trials of ``size`` lower the energy enough (Armijo's condition, or the approximate one
    where energies are not above the ``level`` of rounding), and which of those are too short, since the slope
    ``there`` is still steep."""
    enough = energy <= start + SUFFICIENT * size * slope
    enough = enough | ((energy <= level) & (there <= (2 * SUFFICIENT - 1) * slope))
    enough = enough & torch.isfinite(there) & searching
    return enough, enough & (there < CURVATURE * slope)


def search(evaluate: Evaluator, point: Point, direction: Tensor, active: Tensor | None, trials: int) -> Search:
    """The weak Wolfe conditions by bracketing (Lewis and Overton 2013, algorithm 4.6, with interpolation in place of
    bisection), in at most ``trials`` evaluations. The device is read once per evaluation.

    Where energies differ by less than rounding, the slope decides (the approximate Wolfe conditions of Hager and Zhang
    2005). A sample whose trials run out keeps the last step that satisfied Armijo's condition, if any.

    Args:
        point: with its energy; ``point.residual`` is minus the gradient.
        direction: ``[batch, dim]``; a sample whose direction does not descend fails at once.
        active: the samples to search for; ``None`` for all.
    """
    assert point.energy is not None
    start, slope = point.energy, -(point.residual * direction).sum(dim=1)
    level = level_of(start)
    searching = slope < 0 if active is None else (slope < 0) & active
    failed = ~searching if active is None else ~searching & active
    size, unbounded = torch.ones_like(start), torch.full_like(start, torch.inf)
    bracket = Bracket(torch.zeros_like(start), start, slope, unbounded, unbounded, unbounded)
    best = reached = point
    moved = torch.zeros_like(searching)
    spent = torch.zeros_like(start, dtype=torch.int64)
    rows = None
    for trial in range(1, trials + 1):
        tried = evaluate_some(evaluate, point.z + size[:, None] * direction, searching, rows, reached)
        assert tried.energy is not None
        spent = spent + searching
        there = -(tried.residual * direction).sum(dim=1)
        enough, short = weighed(tried.energy, there, size, start, slope, level, searching)
        if trial >= EXPANSIONS:  # an energy that falls without end must not use up the trials of every step
            short = short & torch.isfinite(bracket.high)
        found = enough & ~short
        best, reached = tried.select(enough, best), tried.select(found, reached)
        moved = moved | enough
        bracket = bracket.narrowed(size, tried.energy, there, short, searching & ~enough)
        searching = searching & ~found
        left, lost = torch.stack((searching, failed | (searching & ~moved))).sum(dim=1).tolist()
        if not left:
            break
        size = bracket.next_size(slope, level, halve=trial % 3 == 0)
        rows = rows_apart(evaluate, searching, left)
    return Search(best, failed | (searching & ~moved), lost > 0, tried, spent)


def rows_apart(evaluate: Evaluator, chosen: Tensor, count: int) -> Tensor | None:
    """The ``count`` samples that are ``chosen``, int64, where it is allowed and pays to evaluate them alone."""
    if evaluate.system.row_params is None or count > CROWD * chosen.shape[0]:
        return None
    return chosen.nonzero().squeeze(1)


def evaluate_some(evaluate: Evaluator, z: Tensor, chosen: Tensor, rows: Tensor | None, rest: Point) -> Point:
    """The points at ``z`` of the ``chosen`` samples, those of ``rest`` for the others.

    Args:
        chosen: bool ``[batch]``.
        rows: the same from :func:`rows_apart`, ``None`` where the whole batch has to be evaluated.
    """
    if rows is None:
        there = torch.where(chosen[:, None], z, rest.z)
        return evaluate(evaluate.project(there)).select(chosen, rest)
    part = evaluate.take(rows)
    found = part(part.project(z[rows]))
    evaluate.rows_evaluated = part.rows_evaluated
    return rest.put(rows, found)
