"""Copies of records with other values, for code that runs in every solve or in every step."""

from __future__ import annotations

from typing import Any, TypeVar

R = TypeVar("R")


def changed(record: R, **values: Any) -> R:
    """A copy of ``record``, an object whose attributes lie in its ``__dict__``, with other values.

    It does what ``dataclasses.replace`` and ``copy.copy`` do, in a tenth of their time, but checks nothing.
    """
    copy = object.__new__(type(record))
    vars(copy).update(vars(record), **values)
    return copy
