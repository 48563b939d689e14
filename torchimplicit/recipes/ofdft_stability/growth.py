"""How the work of finding a density grows along a training."""

from __future__ import annotations

import math
from statistics import fmean

from torchimplicit.recipes.ofdft_runs import measured
from torchimplicit.recipes.ofdft_stability.measure import Counted
from torchimplicit.recipes.ofdft_stability.rows import Row
from torchimplicit.recipes.orbital_free.history import Results
from torchimplicit.recipes.orbital_free.measure import Quality, Summary


def steps(found: list[Quality]) -> float:
    """Of a minimization, the mean of the molecules; infinite if one was not done within its budget."""
    return fmean(one.steps for one in found) if all(one.converged for one in found) else math.inf


def own(one: Results) -> float:
    """The most steps of a minimization that were counted after the start, over those at the start, in the way that the
    row trains in."""
    looks = measured(one)
    first = looks[0][1].mean_steps
    return max((_steps(found) for _, found in looks[1:]), default=math.nan) / first


def at_end(row: Row) -> list[tuple[float, float]]:
    """Steps at the end over those at the start by gradient descent and by L-BFGS, of every seed."""
    return [_both(one) for one in row.counted.values()]


def softest(one: Results) -> float:
    """The least eigenvalue that was measured."""
    return min(found.least for _, found in measured(one))


def hardest(one: Results) -> float:
    """The largest."""
    return max(found.largest for _, found in measured(one))


def slowdowns(row: Row) -> list[float]:
    """Steps of gradient descent after training over those before, of every seed, however the row was trained."""
    return [descent for descent, _ in at_end(row)]


def worst(row: Row) -> float:
    """Of the seeds, the largest growth in the way that the row trains in."""
    return max(own(one) for one in row.results.values())


def _steps(found: Summary) -> float:
    return math.inf if found.unconverged else found.mean_steps


def _both(one: Counted) -> tuple[float, float]:
    return (
        steps(one.descent_after) / steps(one.descent_before),
        steps(one.l_bfgs_after) / steps(one.l_bfgs_before),
    )
