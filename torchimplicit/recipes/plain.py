"""Dataclasses to plain values that JSON holds, and back."""

from __future__ import annotations

import math
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NAMED = ("inf", "-inf", "nan")
"""Numbers that JSON does not know."""


def to_plain(value: Any, exact: bool = False) -> Any:
    """Dataclasses become dicts, tuples become lists, paths strings.

    A number that JSON does not know becomes None, as a figure that there is not; with ``exact``, as settings need it,
    its name: ``"inf"``, ``"-inf"`` or ``"nan"``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name), exact) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item, exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, exact) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if exact else None
    return value


def from_plain(kind: type[T], plain: Any) -> T:
    """The inverse of :func:`to_plain`, for a dataclass of scalars, tuples, lists, dicts and dataclasses.

    Raises:
        ValueError, TypeError, KeyError: if ``plain`` does not fit.
    """
    result: T = _value(kind, plain)
    return result


def _value(kind: Any, plain: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _value(hints[name], item) for name, item in plain.items()})  # type: ignore[operator]
    if origin is Literal:
        if plain not in arguments:
            raise ValueError(f"{plain!r} is none of {arguments}")
        return plain
    if origin in (Union, types.UnionType):
        if plain is None:
            return None
        return _value(next(one for one in arguments if one is not types.NoneType), plain)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in plain)
    if origin is list:
        return [_value(arguments[0], item) for item in plain]
    if origin is dict:
        return {key: _value(arguments[1], item) for key, item in plain.items()}
    if kind is float:
        if isinstance(plain, bool) or (isinstance(plain, str) and plain not in _NAMED):
            raise TypeError(f"{plain!r} is not float")
        return math.nan if plain is None else float(plain)
    if kind in (int, bool, str) and type(plain) is not kind:
        raise TypeError(f"{plain!r} is not {kind.__name__}")
    return kind(plain)


def missing(plain: Any, whole: Any, at: str = "") -> list[str]:
    """The settings of ``whole`` that ``plain`` does not name, both as :func:`to_plain` gives them."""
    if not (isinstance(plain, dict) and isinstance(whole, dict)):
        return []
    found: list[str] = []
    for name, value in whole.items():
        found += missing(plain[name], value, f"{at}{name}.") if name in plain else [f"{at}{name}"]
    return found
