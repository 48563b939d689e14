"""What is computed out of autograd's sight, on plain tensors, under whatever transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit.closure import is_transformed


def unseen(function: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function`` of ``tensors``, ``[rows or 1, ...]``, whose results are ``[rows, ...]`` and count as constants: it
    may read what it computes, and samples under ``vmap`` are rows of it."""
    plain = tuple(t.detach() for t in tensors)
    if not any(is_transformed(t) for t in plain):
        with torch.no_grad():
            return function(*plain)
    found: tuple[Tensor, ...] = _Unseen.apply(function, rows, *plain)
    return found


class _Unseen(Function):
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
        found = _Unseen.apply(function, size * rows, *_folded(size, rows, in_dims[2:], tensors))
        return tuple(t.reshape(size, rows, *t.shape[1:]) for t in found), (0,) * len(found)


_Unseen.forward.__signature__ = inspect.signature(_Unseen.forward)  # type: ignore[attr-defined]


def _folded(size: int, rows: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``[size * rows, ...]``."""
    copies = [t[None] if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return [t.expand(size, rows, *t.shape[2:]).reshape(size * rows, *t.shape[2:]) for t in copies]
