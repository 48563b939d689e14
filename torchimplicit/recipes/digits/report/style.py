"""How the estimators are drawn."""

from __future__ import annotations

from typing import Any, NamedTuple


class Look(NamedTuple):
    """How an estimator is drawn. Colour, line and marker each tell the estimators apart on their own."""

    colour: str
    line: Any
    marker: str


LOOKS = {
    "implicit": Look("#0b63a5", "-", "o"),
    "unrolled-phantom": Look("#d1495b", (0, (5, 1.5)), "s"),
    "neumann-phantom": Look("#2e8b57", (0, (4, 1.2, 1, 1.2)), "^"),
    "one-step": Look("#8a5fbf", (0, (2, 1)), "D"),
}


def look(name: str) -> Look:
    """How an estimator is drawn."""
    return LOOKS[name]
