"""What torch's compiler must leave alone, said without loading it: that takes longer than the whole library."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiler_loaded() -> bool:
    """Whether there can be compiled code in this process, or a compiler at work."""
    return "torch._dynamo" in sys.modules


def untraced(reason: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``torch.compiler.disable`` for a function, from the moment when there is a compiler.

    Args:
        reason: told where a graph without breaks was asked for.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            return (_disabled(function, reason) if compiler_loaded() else function)(*args, **kwargs)

        called._torchdynamo_disable = True  # type: ignore[attr-defined]  # what is left of it while it is traced
        called._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return called

    return decorate


@functools.cache
def _disabled(function: Callable[..., Any], reason: str | None) -> Callable[..., Any]:
    return torch.compiler.disable(function, reason=reason)
