"""What was aimed at, and what came out."""

from __future__ import annotations

import math

from torchimplicit.recipes.ofdft_runs import lowered, mean, shown
from torchimplicit.recipes.ofdft_stability.growth import least, own, softest, worst
from torchimplicit.recipes.ofdft_stability.rows import HELPS, INNER, Row
from torchimplicit.recipes.reproduce.record import Claim

SLOWED, HELD = 4.0, 2.0
"""The aims: minimizations grow at least so many times longer in the slides' way, and at most so many in ours."""

HELPED = 0.5
"""Of the growth beyond none that is left where something is said to stop it."""


def claims(rows: list[Row]) -> list[Claim]:
    """The slowdown, what holds it, and what each of the helps does to it."""
    there = {row.name: row for row in rows}
    made = []
    if slides := there.get("descent-plain"):
        made.append(
            Claim(
                f"The slides' way (gradient descent with momentum to 1e-4): minimizations grow at least {SLOWED:g} "
                "times as long along training, with every seed",
                f"{shown(least(slides), 3)} times at least, {shown(worst(slides), 3)} at most; the least eigenvalue "
                f"falls to {shown(min(softest(one) for one in slides.results.values()), 2)}",
                least(slides) >= SLOWED,
            )
        )
    if ours := there.get("l-bfgs-plain"):
        made.append(
            Claim(
                f"Preconditioned L-BFGS to 1e-8: minimizations grow at most {HELD:g} times as long, with every seed",
                f"{shown(worst(ours), 3)} times at most; the least eigenvalue falls to "
                f"{shown(min(softest(one) for one in ours.results.values()), 2)}",
                worst(ours) <= HELD,
            )
        )
    for inner in INNER:
        if plain := there.get(f"{inner}-plain"):
            made += [_helps(plain, there[f"{inner}-{way}"]) for way in HELPS if f"{inner}-{way}" in there][1:]
    return made


def _helps(plain: Row, helped: Row) -> Claim:
    """Of the seeds that both have."""
    seeds = [seed for seed in plain.results if seed in helped.results]
    before = mean(own(plain.results[seed]) for seed in seeds)
    after = mean(own(helped.results[seed]) for seed in seeds)
    losses = [mean(lowered(row.results[seed]) for seed in seeds) for row in (plain, helped)]
    soft = [mean(softest(row.results[seed]) for seed in seeds) for row in (plain, helped)]
    return Claim(
        f"Densities by {INNER[plain.inner]}: {HELPS[helped.help].label} takes at least half off the growth",
        f"{shown(before, 3)} times as long without it, {shown(after, 3)} with it; least eigenvalue {shown(soft[0], 2)} "
        f"and {shown(soft[1], 2)}; loss {shown(losses[0], 2)} and {shown(losses[1], 2)} of its start",
        math.isfinite(after) and (not math.isfinite(before) or after - 1 <= HELPED * (before - 1)) and before > 1.1,
    )
