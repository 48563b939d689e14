"""Computing constants on plain tensors, hidden from autograd and under any transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchimplicit._torch import Node
from torchimplicit.closure import is_transformed


def unseen(function: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call ``function`` with plain tensors; its results count as constants for every transform.

    The function may branch on the numbers that it computes, as the search for an active set does. Samples under
    ``vmap`` become rows of the one batch that it sees.

    Args:
        function: from ``tensors`` to tensors ``[rows, ...]``.
        rows: the batch size.
        tensors: ``[rows or 1, ...]``.
    """
    plain = tuple(t.detach() for t in tensors)
    if not any(is_transformed(t) for t in plain):
        with torch.no_grad():
            return function(*plain)
    # an autograd Function is what unwraps the tensors of torch.func transforms
    results: tuple[Tensor, ...] = _Unseen.apply(function, rows, *plain)
    return results


class _Unseen(Node):
    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, rows: int, *tensors: Tensor) -> tuple[Any, Any]:
        size = info.batch_size
        results = _Unseen.apply(function, size * rows, *_folded(size, rows, in_dims[2:], tensors))
        return tuple(t.reshape(size, rows, *t.shape[1:]) for t in results), (0,) * len(results)


def _folded(size: int, rows: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The copies of ``tensors`` under vmap, with the copies folded into the batch: ``[size * rows, ...]``."""
    copies = [t[None] if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return [t.expand(size, rows, *t.shape[2:]).reshape(size * rows, *t.shape[2:]) for t in copies]
