"""Taking and clearing rows of a state: a ``NamedTuple`` of tensors whose dimension 0 is the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


def column(mask: Tensor, like: Tensor) -> Tensor:
    """``mask`` (``[rows]``), to be broadcast against ``like`` (``[rows, ...]``)."""
    return mask.view(-1, *(1,) * (like.dim() - 1))


def clear(state: Any, rows: Tensor, keep: Collection[str] = ()) -> Any:
    """The state with some rows (bool ``[batch]``) set to zero, but for the fields named in ``keep``."""
    cleared = {
        name: map_tensors(field, lambda t: t.clone().masked_fill_(column(rows, t), 0))  # as it lies in memory
        for name, field in state._asdict().items()
        if name not in keep
    }
    return state._replace(**cleared)
