"""Checks of a strategy's fields. The errors say what is wrong and what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_count(owner: object, name: str, least: int = 1) -> None:
    """Raise unless ``owner.name`` is an integer of at least ``least``."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_where(owner, name)} must be an integer, not {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"{_where(owner, name)} is {value}, and must be at least {least}")


def check_counts(owner: object, name: str) -> tuple[int, ...]:
    """Raise unless ``owner.name`` is a sequence of integers of at least zero; returns them sorted, without
    duplicates."""
    value = getattr(owner, name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{_where(owner, name)} must be True, False or numbers of steps, as (4, 8), not {value!r}")
    for one in value:
        at_least(_where(owner, name), "a number of steps", one, 0)
    return tuple(sorted(set(value)))


def check_fraction(owner: object, name: str) -> None:
    """Raise unless ``owner.name`` lies in (0, 1]."""
    value = _number(owner, name)
    if not 0 < value <= 1:
        raise ValueError(f"{_where(owner, name)} is {value}, and must lie in (0, 1]: 1 takes the full step")


def check_positive(owner: object, name: str) -> None:
    """Raise unless ``owner.name`` is a positive finite number."""
    value = _number(owner, name)
    if not 0 < value < float("inf"):
        raise ValueError(f"{_where(owner, name)} is {value}, and must be a positive finite number")


def check_nonnegative(owner: object, name: str, optional: bool = False) -> None:
    """Raise unless ``owner.name`` is a finite number of at least zero (or ``None``, if ``optional``)."""
    if optional and getattr(owner, name) is None:
        return
    value = _number(owner, name)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{_where(owner, name)} is {value}, and must be a finite number of at least zero")


def check_type(owner: object, name: str, kind: type, optional: bool = False) -> None:
    """Raise unless ``owner.name`` is an instance of ``kind`` (or ``None``, if ``optional``)."""
    value: Any = getattr(owner, name)
    if optional and value is None:
        return
    if not isinstance(value, kind):
        got = f"the class {value.__name__}: make one, {value.__name__}()" if isinstance(value, type) else repr(value)
        raise TypeError(f"{_where(owner, name)} must be a {kind.__name__}, not {got}")


def _number(owner: object, name: str) -> float:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_where(owner, name)} must be a number, not {type(value).__name__} ({value!r})")
    return value


def _where(owner: object, name: str) -> str:
    return f"{type(owner).__name__}.{name}"


def at_least(where: str, name: str, value: Any, least: int) -> None:
    """Raise unless the argument ``name`` of the function ``where`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer, not {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"{where}: {name} is {value}, and must be at least {least}")
