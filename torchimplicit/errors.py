"""The library's errors and warnings. Their messages say what went wrong, why, and what to try."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchimplicit.solution import Solution


class SolveError(RuntimeError):
    """A solve went non-finite. ``error.solution`` holds the results of all samples up to then."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


class UnsupportedDerivativeError(RuntimeError):
    """The chosen estimator does not support the derivative that was asked for (its order, or its mode)."""


class ConvergenceWarning(UserWarning):
    """A solver stopped at ``max_steps`` or broke down before it reached its tolerance."""


class SmoothnessWarning(UserWarning):
    """A derivative does not exist, or is one-sided: a second derivative of a piecewise linear map, or a solution at a
    kink of its constraint."""


class CaptureWarning(UserWarning):
    """A solve with ``compile=True`` could not be compiled as a whole, and ran in the eager loop."""


def users_frame() -> FrameType:
    """The innermost frame that belongs neither to the library nor to PyTorch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _within(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _within(module: str) -> bool:
    if module.startswith(("torchimplicit.testing", "torchimplicit.recipes")):  # these use the library as users do
        return False
    return module.startswith(("torchimplicit.", "torch.", "contextlib"))
