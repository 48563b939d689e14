"""What the runs of the table hold."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.jiio_adversarial.measure import Strength

Found = dict[tuple[str, int], dict[str, Strength]]
"""By row and seed: the attacks by their names."""


def of(found: Found, row: str, attack: str, what: str) -> list[float]:
    """A figure of an attack on the models of a row, seed by seed."""
    return [getattr(one[attack], what) for (own, _), one in found.items() if own == row and attack in one]


def ratio(found: Found, row: str, one: str, other: str, what: str) -> float:
    """Mean over the seeds of a figure of one attack over that of another."""
    pairs = zip(of(found, row, one, what), of(found, row, other, what), strict=True)
    return fmean(a / b for a, b in pairs)
