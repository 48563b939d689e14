"""Autocast, and what must not run under it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, TypeVar

import torch

Method = TypeVar("Method")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: the user's function alone runs under it, not the algebra of the solvers around it."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class AutocastState:
    """The autocast state of this moment for one kind of device, to be entered again later (in a backward pass).

    Attributes:
        dtype: the lower precision; ``None`` where autocast is off.
    """

    def __init__(self, device: torch.device):
        self.kind = device.type
        self.dtype = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which that state holds."""
        now = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None
        if now == self.dtype:
            return contextlib.nullcontext()
        if self.dtype is None:
            return torch.autocast(self.kind, enabled=False)
        return torch.autocast(self.kind, dtype=self.dtype)


def at_precision(method: Method, dtype: torch.dtype | None) -> Method:
    """``method``, a solver or linear solver, with the default tolerance of ``dtype`` where it has none of its own.

    Under autocast the map is evaluated in a lower precision than that of the state, whose own default tolerance would
    be out of reach.
    """
    if dtype is None or getattr(method, "rtol", 0.0) is not None:
        return method
    return replace(method, rtol=torch.finfo(dtype).eps ** (2 / 3))  # type: ignore[type-var]
