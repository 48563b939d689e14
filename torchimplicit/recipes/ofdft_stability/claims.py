"""What was aimed at, and what came out."""

from __future__ import annotations

import math
from statistics import median

from torchimplicit.recipes.ofdft_runs import lowered, mean, shown, told
from torchimplicit.recipes.ofdft_stability.growth import own, slowdowns, softest, worst
from torchimplicit.recipes.ofdft_stability.rows import HELPS, INNER, Row
from torchimplicit.recipes.runtime.table import Claim

SLOWED, HELD = 4.0, 2.0
"""The aims: minimizations grow at least so many times longer in the slides' way, and at most so many in ours."""

HELPED = 0.5
"""Of the growth beyond none that is left where something is said to stop it."""


def claims(rows: list[Row]) -> list[Claim]:
    """The slowdown, what holds it, and what each of the helps does to it."""
    there = {row.name: row for row in rows}
    made = []
    for inner in INNER:
        if plain := there.get(f"{inner}-plain"):
            found = slowdowns(plain)
            made.append(
                Claim(
                    f"Trained with densities by {INNER[inner]}: the slides' way to find them (gradient descent with "
                    f"momentum to 1e-4) takes at least {SLOWED:g} times as many steps after training as before "
                    "(median of the seeds)",
                    f"{_times(found)}; least eigenvalue {_soft(plain)}",
                    median(found) >= SLOWED,
                )
            )
    if ours := there.get("l-bfgs-plain"):
        made.append(
            Claim(
                f"Preconditioned L-BFGS to 1e-8, along the same training: at most {HELD:g} times as many, with every "
                "seed",
                f"{_times([own(one) for one in ours.results.values()])}; least eigenvalue {_soft(ours)}",
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
    pair = [
        Row(row.inner, row.help, {s: row.results[s] for s in seeds}, {s: row.counted[s] for s in seeds})
        for row in (plain, helped)
    ]
    before, after = (mean(slowdowns(row)) for row in pair)
    losses = [told([lowered(one) for one in row.results.values()], 2) for row in pair]
    return Claim(
        f"Densities by {INNER[plain.inner]}: with {HELPS[helped.help].label}, gradient descent slows down at most half "
        "as much (mean of the seeds)",
        f"{_times(slowdowns(pair[0]))} without, {_times(slowdowns(pair[1]))} with; least eigenvalue "
        f"{_soft(pair[0])} and {_soft(pair[1])}; loss {losses[0]} and {losses[1]} of its start",
        math.isfinite(after) and (not math.isfinite(before) or after - 1 <= HELPED * (before - 1)) and before > 1.1,
    )


def _times(found: list[float]) -> str:
    """Of every seed."""
    return ", ".join("not found" if math.isinf(one) else f"{shown(one, 3)}" for one in found) + " times"


def _soft(row: Row) -> str:
    return ", ".join(shown(softest(one), 2) for one in row.results.values())
