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


class Search(NamedTuple):
    """Where the search ended, ``point``, and the samples that found no decrease, ``failed`` (they did not move)."""

    point: Point
    failed: Tensor


def search(evaluate: Evaluator, point: Point, direction: Tensor, active: Tensor | None, trials: int) -> Search:
    """The weak Wolfe conditions by bisection (Lewis and Overton 2013, algorithm 4.6), in at most ``trials`` evaluations.

    Where energies differ by less than rounding, the slope decides (the approximate Wolfe conditions of Hager and Zhang
    2005). A sample whose trials run out keeps the best step that satisfied Armijo's condition, if any.

    Args:
        point: with its energy; ``point.residual`` is minus the gradient.
        direction: ``[batch, dim]``; a sample whose direction does not descend fails at once.
        active: the samples to search for; ``None`` for all.
    """
    assert point.energy is not None
    start, slope = point.energy, -(point.residual * direction).sum(dim=1)
    number = torch.finfo(start.dtype)
    rounding = 8 * number.eps * start.abs()
    searching = slope < 0 if active is None else (slope < 0) & active
    failed = ~(slope < 0) if active is None else ~(slope < 0) & active
    low = torch.zeros_like(start)
    high = torch.full_like(start, torch.inf)
    size = torch.ones_like(start)
    best = reached = point
    moved = torch.zeros_like(searching)
    for _ in range(trials):
        if not bool(searching.any()):
            break
        to = torch.where(searching[:, None], point.z + size[:, None] * direction, reached.z)
        trial = evaluate(evaluate.place(to))
        assert trial.energy is not None
        there = -(trial.residual * direction).sum(dim=1)
        level = trial.energy <= start + rounding
        enough = (trial.energy <= start + SUFFICIENT * size * slope) | (level & (there <= (2 * SUFFICIENT - 1) * slope))
        enough = enough & torch.isfinite(there)
        steep = there < CURVATURE * slope
        best = trial.select(searching & enough, best)
        moved = moved | (searching & enough)
        reached = trial.select(searching & enough & ~steep, reached)
        searching = searching & ~(enough & ~steep)
        high = torch.where(searching & ~enough, size, high)
        low = torch.where(searching & enough, size, low)
        size = torch.where(torch.isinf(high), 2 * size, 0.5 * (low + high))
    return Search(best, failed | (searching & ~moved))
