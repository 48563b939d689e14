"""Errors and warnings that name what went wrong, why, and what to try."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchimplicit.solution import Solution


class SolveError(RuntimeError):
    """A solve went non-finite. ``error.solution`` holds everything that was computed up to then."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


class UnsupportedDerivativeError(RuntimeError):
    """A derivative was asked for that the chosen estimator does not give (an order, or a mode of differentiation)."""


class ConvergenceWarning(UserWarning):
    """A solver stopped at ``max_steps`` or broke down before it reached its tolerance."""


class SmoothnessWarning(UserWarning):
    """A second derivative was asked for of a map that is linear in pieces."""


class CaptureWarning(UserWarning):
    """A solve with ``compile=True`` could not be compiled as a whole, and the eager loop served."""


def users_frame() -> FrameType:
    """The first frame that is neither the library's nor PyTorch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _within(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _within(module: str) -> bool:
    if module.startswith(("torchimplicit.testing", "torchimplicit.recipes")):  # what uses the library is its user
        return False
    return module.startswith(("torchimplicit.", "torch.", "contextlib"))
