"""The library's own defaults, as they were when a run began.

A recipe's settings name what a person may choose; what they do not name, such as the memory of Anderson's method, is a
default of the library. A run notes all of them, and goes on with what it noted when the library has others by then.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torchimplicit import gradients, linear, models, solvers
from torchimplicit.gradients import Gradient
from torchimplicit.linear import LinearSolver
from torchimplicit.recipes.files import say_once
from torchimplicit.recipes.plain import to_plain
from torchimplicit.solvers import Solver

_ROOMS = (solvers, linear, gradients, models)

Defaults = dict[str, dict[str, Any]]
"""By the strategy's name, the fields that have a default."""


def present() -> Defaults:
    """Those of this version, as plain values; a field whose default is made anew every time is left out, for what it
    is made of is here itself."""
    return {name: to_plain(_plain_defaults(kind), exact=True) for name, kind in _strategies().items()}


@contextmanager
def of_run(noted: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Within it strategies are made with the defaults that a run noted.

    What has changed since is told once; of a field that is not there any more, that it is not.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    strategies = _strategies()
    try:
        for name, fields in noted.items():
            now = _plain_defaults(strategies[name]) if name in strategies else {}
            for field, value in fields.items():
                was = _tuples(value)
                if field not in now:
                    say_once(f"the run had {name}({field}={was!r}), which this version does not know")
                elif to_plain(now[field], exact=True) != value:
                    say_once(f"this version has {name}({field}={now[field]!r}); the run keeps its own, {was!r}")
                    table: dict[str, Any] = strategies[name].__init__.__kwdefaults__  # type: ignore[misc]
                    before.append((table, field, table[field]))
                    table[field] = was
        yield
    finally:
        for table, field, value in reversed(before):
            table[field] = value


@cache
def _strategies() -> dict[str, type]:
    """The frozen dataclasses with keyword-only defaults: solvers, linear solvers, estimators, and models' configs."""
    found: dict[str, type] = {}
    for room in _ROOMS:
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            for name, kind in vars(import_module(module.name)).items():
                if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.name:
                    wanted = issubclass(kind, Solver | LinearSolver | Gradient) or name.endswith("Config")
                    if wanted and kind.__init__.__kwdefaults__:
                        found[name] = kind
    return found


def _plain_defaults(kind: type) -> dict[str, Any]:
    table: dict[str, Any] = kind.__init__.__kwdefaults__  # type: ignore[misc]
    return {name: value for name, value in table.items() if isinstance(value, int | float | str | tuple | None)}


def _tuples(value: Any) -> Any:
    """As a default is: JSON knows lists only, and names numbers that are not finite."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return float(value) if value in ("inf", "-inf", "nan") else value
