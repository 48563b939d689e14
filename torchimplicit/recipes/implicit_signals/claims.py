"""What the table claims, tested."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.fields.settings import FILTERS
from torchimplicit.recipes.implicit_signals.read import Measured
from torchimplicit.recipes.implicit_signals.rows import KINDS, Kind, Row
from torchimplicit.recipes.reproduce.record import Claim


def claims(found: Measured) -> list[Claim]:
    """Those for which there are runs."""
    made: list[Claim] = []
    for kind in KINDS:
        rows = [Row(kind=kind, filter=name, implicit=True) for name in FILTERS]
        for row in rows:
            made += _better(found, kind, row)
        for row in rows:
            made += _sooner(found, kind, row)
    return made


def _better(found: Measured, kind: Kind, row: Row) -> list[Claim]:
    values = found.over_twin(row)
    if not values:
        return []
    better = sum(value > 0 for value in values)
    return [
        Claim(
            f"{row.label} fits the {kind} better than {row.twin.label}, in as many steps",
            f"{fmean(values):+.2f} dB; better in {better} of {len(values)} runs",
            better == len(values),
        )
    ]


def _sooner(found: Measured, kind: Kind, row: Row) -> list[Claim]:
    tries = found.steps_to(row)
    if not tries or row.name not in found.cost or row.twin.name not in found.cost:
        return []
    words = f"{row.label} comes to the best PSNR of {row.twin.label} on the {kind} in less time than that itself"
    reached = [(own, other) for own, other in tries if own is not None]
    if not reached:
        return [Claim(words, f"it never does, in {len(tries)} runs", False)]
    own = fmean(pair[0] for pair in reached) * found.cost[row.name].seconds
    other = fmean(pair[1] for pair in reached) * found.cost[row.twin.name].seconds
    return [
        Claim(
            words,
            f"in {len(reached)} of {len(tries)} runs it does come there, on average after {own:.1f} s instead of "
            f"{other:.1f} s",
            len(reached) == len(tries) and own < other,
        )
    ]
