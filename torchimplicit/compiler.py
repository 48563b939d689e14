"""Excluding functions from torch's compiler without importing it, which takes longer than importing this library."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiler_loaded() -> bool:
    """Return whether the compiler has been imported, so that there may be compiled code in this process."""
    return "torch._dynamo" in sys.modules


def untraced(reason: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: ``torch.compiler.disable``, applied once the compiler has been imported.

    Args:
        reason: the message where a graph without breaks (``fullgraph=True``) is asked for.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            return (_disabled(function, reason) if compiler_loaded() else function)(*args, **kwargs)

        called._torchdynamo_disable = True  # type: ignore[attr-defined]  # the attribute that Dynamo looks for
        called._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return called

    return decorate


@functools.cache
def _disabled(function: Callable[..., Any], reason: str | None) -> Callable[..., Any]:
    return torch.compiler.disable(function, reason=reason)
