"""A line search for a batch of samples, each with its own step size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.problems import Point
from torchimplicit.solvers.base import Evaluator
from torchimplicit.state import row_norm

SUFFICIENT = 1e-4
"""Armijo's constant: the share of the predicted decrease that a step must bring."""

CURVATURE = 0.9
"""Wolfe's constant: the share of the initial slope that may remain. The usual values for quasi-Newton methods (Nocedal
and Wright 2006, section 3.1)."""

EXPANSIONS = 8
"""After this many trials, a step along which the energy still falls steeply is accepted if none was too long so far."""

CROWD = 0.75
"""Where rows can be evaluated apart, a trial leaves out the samples whose search is over, once at most this share of
the batch still searches."""


class Search(NamedTuple):
    """The result of a line search.

    Attributes:
        point: where it ended.
        failed: bool ``[batch]``, the samples that found no decrease and did not move.
        any_failed: whether there are any.
        last: the points that were tried last.
        trials: int64 ``[batch]``, how many points each sample tried.
    """

    point: Point
    failed: Tensor
    any_failed: bool
    last: Point
    trials: Tensor


class Bracket(NamedTuple):
    """The interval that holds an acceptable step size, with the energies and slopes at its ends; all ``[batch]``.

    At ``low`` the energy has decreased enough, but the slope is still steep; ``high`` is too long, or infinite.
    """

    low: Tensor
    low_energy: Tensor
    low_slope: Tensor
    high: Tensor
    high_energy: Tensor
    high_slope: Tensor

    def narrowed(self, size: Tensor, energy: Tensor, slope: Tensor, short: Tensor, long: Tensor) -> Bracket:
        """The bracket after ``size`` was tried and found too ``short`` or too ``long`` (bool ``[batch]``)."""
        tried = (size, energy, slope)
        lows = [torch.where(short, new, old) for new, old in zip(tried, self[:3], strict=True)]
        highs = [torch.where(long, new, old) for new, old in zip(tried, self[3:], strict=True)]
        return Bracket(*lows, *highs)

    def next_size(self, slope: Tensor, level: Tensor, halve: bool) -> Tensor:
        """The next step size to try, ``[batch]``.

        It interpolates the slopes at the ends; or the energies, where that gives a shorter step or both ends descend.
        It keeps a tenth of the interval away from the ends.

        Args:
            slope: at zero.
            level: energies above this one differ from the first by more than rounding.
            halve: bisect instead. Done every third trial, since interpolation may converge to one end only.
        """
        width = self.high - self.low
        fall = self.low_slope * width
        by_slopes = self.low_slope / (self.low_slope - self.high_slope)  # the secant's zero
        by_energies = 0.5 * fall / (fall - (self.high_energy - self.low_energy))  # the parabola's minimum
        # an energy that differs by rounding alone says nothing: the slopes are accurate much longer
        higher = self.high_energy > level
        by_slopes = torch.where(higher, torch.minimum(by_slopes, by_energies), by_slopes)
        share = torch.where(self.high_slope > 0, by_slopes, by_energies)
        share = torch.full_like(share, 0.5) if halve else share.nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.9)
        # no upper end yet: extrapolate the slopes from zero through ``low``, by at least 2 and at most 10
        bent = self.low_slope - slope
        further = torch.where(bent > 0, -slope / bent, torch.inf).clamp(2, 10)
        return torch.where(torch.isinf(self.high), further * self.low, self.low + share * width)


def level_of(energy: Tensor) -> Tensor:
    """The level that an energy must exceed to differ from ``energy`` by more than rounding."""
    return energy + torch.finfo(energy.dtype).eps ** (2 / 3) * energy.abs()


def weighed(
    energy: Tensor, there: Tensor, size: Tensor, start: Tensor, slope: Tensor, level: Tensor, searching: Tensor
) -> tuple[Tensor, Tensor]:
    """Test the weak Wolfe conditions of a trial; all tensors ``[batch]``.

    Args:
        energy, there: the energy and the slope at the trial.
        size: its step size.
        start, slope: the energy and the slope at zero.
        level: see :func:`level_of`.
        searching: the samples that still search.

    Returns:
        Which trials lower the energy enough (Armijo's condition, or the approximate one of Hager and Zhang (2005), eq.
        4.1, below the ``level`` of rounding), and which of those are too short because the slope is still steep.
    """
    enough = energy <= start + SUFFICIENT * size * slope
    enough = enough | ((energy <= level) & (there <= (2 * SUFFICIENT - 1) * slope))
    enough = enough & torch.isfinite(there) & searching
    return enough, enough & (there < CURVATURE * slope)


def search(evaluate: Evaluator, point: Point, direction: Tensor, active: Tensor | None, trials: int) -> Search:
    """Find a step size that satisfies the weak Wolfe conditions, for each sample its own.

    Brackets as algorithm 4.6 of Lewis and Overton (2013), with interpolation in place of bisection. Where energies
    differ by less than rounding, the slope decides (the approximate Wolfe conditions of Hager and Zhang 2005). A sample
    whose trials run out keeps the last step that satisfied Armijo's condition, if any. The device is read once per
    evaluation.

    Args:
        evaluate: evaluates the energy and its gradient.
        point: with its energy; ``point.residual`` is minus the gradient.
        direction: ``[batch, dim]``; a sample whose direction does not descend fails at once.
        active: bool ``[batch]``, the samples to search for; ``None`` for all.
        trials: the most evaluations.
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
        if trial >= EXPANSIONS:  # an energy that is unbounded below would use up all trials in every step
            short = short & torch.isfinite(bracket.high)
        accepted = enough & ~short
        best, reached = tried.select(enough, best), tried.select(accepted, reached)
        moved = moved | enough
        bracket = bracket.narrowed(size, tried.energy, there, short, searching & ~enough)
        searching = searching & ~accepted
        left, lost = torch.stack((searching, failed | (searching & ~moved))).sum(dim=1).tolist()
        if not left:
            break
        size = bracket.next_size(slope, level, halve=trial % 3 == 0)
        rows = rows_apart(evaluate, searching, left)
    return Search(best, failed | (searching & ~moved), lost > 0, tried, spent)


def showing_nonfinite(trial: Point, failed: Tensor, reached: Point) -> Point:
    """``reached``, but with the last ``trial`` of those ``failed`` samples (bool ``[batch]``) where it is not finite:
    the loop then reports them as non-finite and not as a breakdown of the method."""
    return trial.select(failed & ~torch.isfinite(row_norm(trial.residual)), reached)


def rows_apart(evaluate: Evaluator, chosen: Tensor, count: int) -> Tensor | None:
    """The places of the ``count`` samples that are ``chosen``, int64 ``[count]``; ``None`` where evaluating them alone
    is not allowed or does not pay."""
    if evaluate.system.row_params is None or count > CROWD * chosen.shape[0]:
        return None
    return chosen.nonzero().squeeze(1)


def evaluate_some(evaluate: Evaluator, z: Tensor, chosen: Tensor, rows: Tensor | None, rest: Point) -> Point:
    """Evaluate the ``chosen`` samples at ``z``; the others keep their points of ``rest``.

    Args:
        evaluate: evaluates the whole batch.
        z: states ``[batch, dim]``.
        chosen: bool ``[batch]``.
        rows: the result of :func:`rows_apart`; ``None`` where the whole batch has to be evaluated.
        rest: the points of the others.
    """
    if rows is None:
        there = torch.where(chosen[:, None], z, rest.z)
        return evaluate(evaluate.project(there)).select(chosen, rest)
    part = evaluate.take(rows)
    there_alone = part(part.project(z[rows]))
    evaluate.rows_evaluated = part.rows_evaluated
    return rest.put(rows, there_alone)
