"""What was aimed at, and what came out."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.jiio_meta.config import MetaTableConfig
from torchimplicit.recipes.jiio_meta.gathered import TITLES, Found, fastest, of
from torchimplicit.recipes.jiio_meta.rows import ROWS, native
from torchimplicit.recipes.runtime.table import Claim, spread


def claims_of(config: MetaTableConfig, problem: str, found: Found) -> list[Claim]:
    """Of one problem: error against time, and the exact gradient against the first-order one."""
    made = []
    rows = {row for own, row, _ in found if own == problem}
    title = TITLES[problem]
    for row in ("jiio", "first-order", "unrolled"):
        if not {row, "descent"} <= rows:
            continue
        rival = native(config, problem, "descent")
        goal = fmean(of(found, problem, "descent", rival, "error"))
        seconds = fmean(of(found, problem, "descent", rival, "seconds"))
        own = fastest(found, problem, row, "JIIO", goal)
        names = {name for key, one in found.items() if key[:2] == (problem, row) for name in one if "JIIO" in name}
        best = min(fmean(of(found, problem, row, name, "error")) for name in names)
        made.append(
            Claim(
                f"{title}: trained and adapted by {ROWS[row][0]}, the error of {rival} (its own training) is reached "
                "at least 3 times as fast",
                f"{rival} has {goal:.3f} after {1e3 * seconds:.0f} ms; "
                + (
                    f"{own[0]} has {own[1]:.3f} after {1e3 * own[2]:.0f} ms, {seconds / own[2]:.1f} times as fast"
                    if own is not None
                    else f"JIIO comes to {best:.3f} at best"
                ),
                own is not None and seconds / own[2] >= 3,
            )
        )
    for row in ("jiio", "unrolled"):
        if row not in rows:
            continue
        goal = fmean(of(found, problem, row, native(config, problem, row), "error"))
        own, other = (fastest(found, problem, row, kind, 1.02 * goal) for kind in ("JIIO", "descent"))
        assert own is not None
        made.append(
            Claim(
                f"{title}: at the same weights, those trained by {ROWS[row][0]}, it comes to its error at least 3 "
                "times as fast as descent",
                f"{own[0]} has {own[1]:.3f} after {1e3 * own[2]:.0f} ms; "
                + (
                    f"{other[0]} has {other[1]:.3f} after {1e3 * other[2]:.0f} ms: {other[2] / own[2]:.1f} times it"
                    if other is not None
                    else "descent never does in its steps"
                ),
                other is None or other[2] / own[2] >= 3,
            )
        )
    if {"jiio", "first-order"} <= rows:
        exact, cheap = (
            of(found, problem, row, native(config, problem, row), "error") for row in ("jiio", "first-order")
        )
        made.append(
            Claim(
                f"{title}: the exact gradient trains to a lower error than the first-order one",
                f"{spread(exact, 3)} instead of {spread(cheap, 3)}, means and deviations over the seeds",
                fmean(exact) < fmean(cheap),
            )
        )
    return made
