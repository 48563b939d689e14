"""What the runs of the table hold."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.jiio_meta.measure import Quality

TITLES = {"sinusoid": "Sine waves", "omniglot": "Omniglot, 5-way 1-shot"}
UNITS = {"sinusoid": "mean squared error", "omniglot": "cross-entropy"}

Key = tuple[str, str, int]
"""A problem, a row, a seed."""

Found = dict[Key, dict[str, Quality]]
"""The adaptations by their names."""


def of(found: Found, problem: str, row: str, name: str, what: str) -> list[float]:
    """A figure of an adaptation at the models of a row, seed by seed."""
    return [
        getattr(one[name], what)
        for (own, kind, _), one in found.items()
        if (own, kind) == (problem, row) and name in one
    ]


def fastest(found: Found, problem: str, row: str, kind: str, goal: float) -> tuple[str, float, float] | None:
    """The fastest adaptation of a kind whose error comes to the goal: its name, error and seconds."""
    names = next((list(one) for key, one in found.items() if key[:2] == (problem, row)), [])
    reached = [
        (name, error, fmean(of(found, problem, row, name, "seconds")))
        for name in names
        if name.startswith(kind) and (error := fmean(of(found, problem, row, name, "error"))) <= goal
    ]
    return min(reached, key=lambda one: one[2], default=None)
