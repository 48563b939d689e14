"""Checks of settings, in the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchimplicit.recipes.errors import UserError


def option(name: str) -> str:
    """A setting's name as one types it: ``--learning-rate``."""
    return f"--{name.replace('_', '-')}"


def positive(settings: Any, *names: str) -> None:
    """Each must be positive; ``None`` passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"{option(name)} must be positive, and it is {value}")


def not_negative(settings: Any, *names: str) -> None:
    """Each must be zero or more; ``None`` passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= 0:
            raise UserError(f"{option(name)} must not be negative, and it is {value}")


def share(settings: Any, *names: str) -> None:
    """Each must lie in [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise UserError(f"{option(name)} must lie in [0, 1], and it is {value}")


def fraction(settings: Any, *names: str) -> None:
    """Each must lie in (0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 < value <= 1:
            raise UserError(f"{option(name)} must lie in (0, 1], and it is {value}")


def known_rows(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Each of the rows that ``--rows`` names must be one of the table's."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"--rows: there is no row {', '.join(unknown)}; the rows are {', '.join(known)}")
