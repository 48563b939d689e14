"""What the table claims, tested."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.fields.settings import FILTERS
from torchimplicit.recipes.implicit_generalization.read import Measured
from torchimplicit.recipes.implicit_generalization.rows import KINDS, Row
from torchimplicit.recipes.runtime.table import Claim


def claims(found: Measured, labels: dict[str, str]) -> list[Claim]:
    """Those for which there are runs."""
    made: list[Claim] = []
    for name in FILTERS:
        implicit = Row(filter=name, implicit=True, size="1L")
        made += _over(found, labels, implicit, Row(filter=name, implicit=False, size="1L"), 1.5)
    for name in FILTERS:
        implicit = Row(filter=name, implicit=True, size="1L")
        made += _over(found, labels, implicit, Row(filter=name, implicit=False, size="4L"), 0.0)
    for name in FILTERS:
        made += _amortized(found, labels, Row(filter=name, implicit=True, size="1L"))
    for name in FILTERS:
        made += _sooner(found, labels, Row(filter=name, implicit=True, size="1L"))
    return made


def _over(found: Measured, labels: dict[str, str], one: Row, other: Row, margin: float) -> list[Claim]:
    differences = found.difference(one, other)
    if not differences:
        return []
    parts = [f"{fmean(values):+.2f} dB on {kind}" for kind in KINDS if (values := found.difference(one, other, kind))]
    mean = fmean(differences)
    better = sum(value > 0 for value in differences)
    words = (
        f"{labels[one.name]} is at least {margin:g} dB over {labels[other.name]}"
        if margin
        else f"{labels[one.name]} is at least level with {labels[other.name]}, of four times the layers"
    )
    return [
        Claim(
            words,
            f"{mean:+.2f} dB over all ({', '.join(parts)}); better in {better} of {len(differences)} runs",
            mean >= margin,
        )
    ]


def _amortized(found: Measured, labels: dict[str, str], row: Row) -> list[Claim]:
    full = Row(filter=row.filter, implicit=True, size=row.size, full=True)
    pairs = found.pairs(row, full)
    if not pairs or row.name not in found.cost or full.name not in found.cost:
        return []
    ratio = found.cost[full.name].seconds / found.cost[row.name].seconds
    lost = fmean(b - a for a, b in pairs)
    return [
        Claim(
            f"{labels[row.name]} trained by one evaluation and one product a step is at least twice as fast as by full "
            "solves, within 1 dB",
            f"a step is {ratio:.1f} times as fast, and {lost:.2f} dB are lost",
            ratio >= 2 and lost <= 1,
        )
    ]


def _sooner(found: Measured, labels: dict[str, str], row: Row) -> list[Claim]:
    target = Row(filter=row.filter, implicit=False, size="1L")
    tries = found.steps_to(row, target)
    if not tries or row.name not in found.cost or target.name not in found.cost:
        return []
    reached = [(own, other) for own, other in tries if own is not None]
    words = f"{labels[row.name]} comes to the best PSNR of {labels[target.name]} in less time than that itself"
    if not reached:
        return [Claim(words, f"it never does, in {len(tries)} runs", False)]
    own = fmean(pair[0] for pair in reached) * found.cost[row.name].seconds
    other = fmean(pair[1] for pair in reached) * found.cost[target.name].seconds
    return [
        Claim(
            words,
            f"in {len(reached)} of {len(tries)} runs it does come there, on average after {own:.1f} s instead of "
            f"{other:.1f} s",
            len(reached) == len(tries) and own < other,
        )
    ]
