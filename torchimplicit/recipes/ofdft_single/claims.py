"""What was aimed at, and what came out."""

from __future__ import annotations

from math import isfinite

from torchimplicit.recipes.ofdft_runs import lowered, mean, seconds_to, shown
from torchimplicit.recipes.ofdft_single.config import SingleConfig
from torchimplicit.recipes.ofdft_single.gathered import ESTIMATORS, OPTIMIZERS, Row
from torchimplicit.recipes.runtime.table import Claim

APART, BELOW = 0.05, 0.6
"""The aims: final losses no farther apart, and at most so much of the start."""


def claims(config: SingleConfig, rows: list[Row]) -> list[Claim]:
    """By optimizer: propagation ends where implicit differentiation does, far below the start, and how long each
    takes."""
    made = []
    for optimizer in config.optimizers:
        there = {row.estimator: row for row in rows if row.optimizer == optimizer}
        exact = there.get("implicit")
        if exact is None:
            continue
        for estimator in ("eqprop", "eqprop-one-sided", "damped"):
            if other := there.get(estimator):
                made.append(_together(exact, other))
        if other := there.get("eqprop"):
            made.append(_slower(config, exact, other))
    return made


def _together(exact: Row, other: Row) -> Claim:
    """Seed by seed."""
    seeds = [seed for seed in exact.results if seed in other.results]
    ends = [(exact.results[seed].looks[-1].loss, other.results[seed].looks[-1].loss) for seed in seeds]
    apart = max((abs(b - a) / a for a, b in ends), default=float("nan"))
    worst = max(lowered(row.results[seed]) for row in (exact, other) for seed in seeds) if seeds else float("nan")
    return Claim(
        f"{OPTIMIZERS[exact.optimizer]}: {ESTIMATORS[other.estimator]} ends within {100 * APART:g} % of the loss of "
        f"exact implicit differentiation with every seed, both at least {100 * (1 - BELOW):.0f} % below the start",
        f"farthest apart {shown(100 * apart, 2)} %; the higher of the two at {shown(worst, 2)} of the start at worst "
        f"({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'})",
        apart <= APART and worst <= BELOW,
    )


def _slower(config: SingleConfig, exact: Row, other: Row) -> Claim:
    """The slides found propagation to be the slower one."""
    times = [mean(seconds_to(one, config.level) for one in row.every) for row in (exact, other)]
    measured = (
        f"{shown(times[1], 2)} s against {shown(times[0], 2)} s of the processor's time to {config.level:g} of the "
        "starting loss"
    )
    return Claim(
        f"{OPTIMIZERS[exact.optimizer]}: symmetric propagation takes longer than exact implicit differentiation, as "
        "the slides report",
        measured if all(map(isfinite, times)) else f"not every run comes to {config.level:g} of its starting loss",
        times[1] > times[0],
    )
