"""Warnings that are shown once per line of the user's code, and the counts of all solves."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import CodeType, MappingProxyType

from torchimplicit.errors import users_frame


@dataclass(frozen=True)
class SolveCounts:
    """The counts of all solves of this process, in all threads, up to some moment. ``later - earlier`` gives the counts
    in between.

    Attributes:
        solves: the number of solves.
        samples: the number of samples in them (a problem that is not batched counts as one).
        fell_short: the number of samples that did not reach what was asked (:attr:`Solution.fell_short`).
        adjoint_solves, adjoint_samples, adjoint_fell_short: the same for the linear systems of backward passes.
            Estimators that take a prescribed number of steps solve none.
        warnings: how often each kind of warning was due, whether it was shown or not.
    """

    solves: int = 0
    samples: int = 0
    fell_short: int = 0
    adjoint_solves: int = 0
    adjoint_samples: int = 0
    adjoint_fell_short: int = 0
    warnings: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def share(self) -> float:
        """The share of samples that fell short; zero without samples."""
        return self.fell_short / max(self.samples, 1)

    @property
    def adjoint_share(self) -> float:
        """The share of samples that fell short in backward passes."""
        return self.adjoint_fell_short / max(self.adjoint_samples, 1)

    def __sub__(self, earlier: SolveCounts) -> SolveCounts:
        numbers = {name: getattr(self, name) - getattr(earlier, name) for name in _NUMBERS}
        due = Counter(dict(self.warnings)) - Counter(dict(earlier.warnings))
        return SolveCounts(**numbers, warnings=MappingProxyType(dict(due)))


_NUMBERS = tuple(one.name for one in fields(SolveCounts) if one.name != "warnings")

_lock = threading.Lock()
_numbers: Counter[str] = Counter()
_due: Counter[str] = Counter()
_shown: set[tuple[str, str, CodeType, int]] = set()


def solve_counts() -> SolveCounts:
    """The counts up to now. They are never reset: take the difference of two.

    ::

        before = solve_counts()
        ...
        print((solve_counts() - before).share)
    """
    with _lock:
        return SolveCounts(**_numbers, warnings=MappingProxyType(dict(_due)))


def count_solve(samples: int, fell_short: int) -> None:
    """Count a forward solve."""
    with _lock:
        _numbers["solves"] += 1
        _numbers["samples"] += samples
        _numbers["fell_short"] += fell_short


def count_adjoint(samples: int, fell_short: int) -> None:
    """Count the linear solve of a backward pass."""
    with _lock:
        _numbers["adjoint_solves"] += 1
        _numbers["adjoint_samples"] += samples
        _numbers["adjoint_fell_short"] += fell_short


def notice(kind: str, message: str, category: type[Warning]) -> None:
    """Warn at the user's line, once for each kind and line, even though the figures in ``message`` differ each time; or
    always, if the user's filters say ``"always"`` or ``"error"``.

    Python's own "once per location" compares the whole message, and its location would be a line of this library.
    """
    frame = users_frame()
    place = frame.f_code.co_filename, frame.f_lineno
    module = frame.f_globals.get("__name__", "<unknown>")
    action = _action(message, category, module, place[1])
    once = action not in ("always", "all", "error")
    # with the code object, since in an interactive session every statement has the same file and line
    line = (kind, place[0], frame.f_code, place[1])
    with _lock:
        _due[kind] += 1
        if action == "ignore" or (once and line in _shown):
            return
        if once:
            _shown.add(line)
    if once:
        message += " (said once at this line: torchimplicit.solve_counts() counts what follows)"
    warnings.warn_explicit(message, category, *place, module=module, registry={}, module_globals=frame.f_globals)


def _action(text: str, category: type[Warning], module: str, line: int) -> str:
    """The action that the filters of :mod:`warnings` prescribe for a warning."""
    for action, message, kind, where, number in warnings.filters:
        if issubclass(category, kind) and _matches(message, text) and _matches(where, module) and number in (0, line):
            return action
    return "default"


def _matches(pattern: object, text: str) -> bool:
    match = getattr(pattern, "match", None)  # the filters that Python begins with hold plain strings
    return pattern is None or (pattern == text if match is None else match(text) is not None)
