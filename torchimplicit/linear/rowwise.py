"""Taking and clearing rows of a state: a ``NamedTuple`` of tensors whose dimension 0 is the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``state`` with ``function`` of each of its tensors; nested tuples are entered, all else is kept."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        fields = [map_tensors(field, function) for field in state]
        return type(state)(*fields) if hasattr(state, "_fields") else tuple(fields)
    return state


def select(state: Any, rows: Tensor) -> Any:
    """The state of some rows (int64 ``[k]``)."""
    return map_tensors(state, lambda t: t.index_select(0, rows))


def clear(state: Any, rows: Tensor) -> None:
    """Set some rows (int64 ``[k]``) of the state's tensors to zero, in place."""
    map_tensors(state, lambda t: t.index_fill_(0, rows, 0))
