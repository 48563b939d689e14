"""Selecting and clearing rows of a method's state: a ``NamedTuple`` of tensors with the batch in dimension 0."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor


def map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of ``state``, in nested tuples too; everything else is kept."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        fields = [map_tensors(field, function) for field in state]
        return type(state)(*fields) if hasattr(state, "_fields") else tuple(fields)
    return state


def select(state: Any, rows: Tensor) -> Any:
    """The state of the rows ``rows`` (int64 ``[k]``)."""
    return map_tensors(state, lambda t: t.index_select(0, rows))


def column(mask: Tensor, like: Tensor) -> Tensor:
    """``mask`` (``[rows]``), reshaped to broadcast against ``like`` (``[rows, ...]``)."""
    return mask.view(-1, *(1,) * (like.dim() - 1))


def clear(state: Any, rows: Tensor, keep: Collection[str] = ()) -> Any:
    """The state with the rows ``rows`` (bool ``[batch]``) set to zero, except in the fields named in ``keep``."""
    cleared = {
        # clone and in place: ``masked_fill`` would return a contiguous copy, and lose the layout of ``basis.room``
        name: map_tensors(field, lambda t: t.clone().masked_fill_(column(rows, t), 0))
        for name, field in state._asdict().items()
        if name not in keep
    }
    return state._replace(**cleared)
