"""Tensors of a constraint, one row for each sample or one for all, among a system's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.state import Layout

PerSample = Callable[..., tuple[Tensor, ...]]
"""``(rows, *params) -> tensors [rows or 1, k]``."""


def taken(which: slice) -> PerSample:
    """Those that lie among the parameters as they are."""

    def own(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
        return params[which]

    return own


def stacked(own: PerSample, size: int, dims: tuple[int | None, ...]) -> PerSample:
    """Of ``size`` copies of the system, stacked along the batch, where parameter i has its copies in ``dims[i]``."""

    def of_copies(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
        each = rows // size

        def widened(*params: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.expand(each, -1) for t in own(each, *params))

        if all(d is None for d in dims):
            return tuple(t.repeat(size, 1) for t in widened(*params))
        return tuple(t.reshape(rows, -1) for t in torch.vmap(widened, in_dims=dims)(*params))

    return of_copies


def flat_tree(layout: Layout, tree: Any, rows: int, what: str) -> Tensor:
    """A constraint's pytree ``[rows or 1, dim]``, whose leaves may have the batch dimension or not.

    Args:
        layout: of the tree.
        what: names the tree in errors.
    """
    leaves, spec = pytree.tree_flatten(tree)
    if spec != layout.spec:
        raise ValueError(f"{what} has the structure {spec}, but z0 has {layout.spec}")
    parts = []
    for leaf, shape in zip(leaves, layout.shapes, strict=True):
        leaf = torch.as_tensor(leaf, dtype=layout.dtype, device=layout.device)
        if leaf.shape == shape:
            parts.append(leaf.reshape(1, -1))
        elif layout.batched and leaf.shape == (rows, *shape):
            parts.append(leaf.reshape(rows, -1))
        else:
            raise ValueError(
                f"{what} has a leaf of shape {tuple(leaf.shape)} where the state has {tuple(shape)} "
                f"per sample: give that shape, or {(rows, *shape)} for one per sample"
            )
    tallest = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(tallest, -1) for part in parts], dim=1)


def column(layout: Layout, value: Any, rows: int, what: str) -> Tensor:
    """A number for all samples, ``[1, 1]``, or one for each, ``[rows, 1]``."""
    value = torch.as_tensor(value, dtype=layout.dtype, device=layout.device)
    if value.ndim == 0:
        return value.reshape(1, 1)
    if layout.batched and value.shape == (rows,):
        return value.reshape(rows, 1)
    raise ValueError(
        f"{what} has shape {tuple(value.shape)}: give a number, a scalar tensor"
        + (f", or one per sample, ({rows},)" if layout.batched else "")
    )


def bound(layout: Layout, value: Any, rows: int, what: str) -> Tensor:
    """A number for all numbers of the state, or a pytree like it, ``[rows or 1, dim]``."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0 and layout.shapes != ((),)):
        return torch.as_tensor(value, dtype=layout.dtype, device=layout.device).expand(1, layout.dim)
    return flat_tree(layout, value, rows, what)


def flat_matrix(layout: Layout, matrix: Any, right: Any, rows: int, what: str) -> tuple[Tensor, Tensor]:
    """``[rows or 1, m, dim]`` and ``[rows or 1, m]``."""
    matrix = torch.as_tensor(matrix, dtype=layout.dtype, device=layout.device)
    right = torch.as_tensor(right, dtype=layout.dtype, device=layout.device)
    lead = ((), (rows,)) if layout.batched else ((),)
    if matrix.ndim < 2 or matrix.shape[-1] != layout.dim or matrix.shape[:-2] not in lead:
        raise ValueError(
            f"{what}.matrix has shape {tuple(matrix.shape)}: give (m, {layout.dim})"
            + (f", or ({rows}, m, {layout.dim}) for one per sample" if layout.batched else "")
        )
    m = matrix.shape[-2]
    if right.ndim and (right.shape[-1] != m or right.shape[:-1] not in lead):
        raise ValueError(
            f"{what} has {m} rows, and a right-hand side of shape {tuple(right.shape)}: give a number, or ({m},)"
            + (f", or ({rows}, {m}) for one per sample" if layout.batched else "")
        )
    return matrix.reshape(-1, m, layout.dim), right.expand(1, m) if right.ndim == 0 else right.reshape(-1, m)
