"""The tensors of a constraint among a system's parameters: one row per sample, or one for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.state import Layout

PerSample = Callable[..., tuple[Tensor, ...]]
"""``(rows, *params) -> tensors [rows or 1, k]``: picks the constraint's tensors out of all parameters."""


def taken(which: slice) -> PerSample:
    """Picks the parameters at the places ``which``, unchanged."""

    def constraint_tensors(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
        return params[which]

    return constraint_tensors


def stacked(per_sample: PerSample, size: int, dims: tuple[int | None, ...]) -> PerSample:
    """``per_sample`` for ``size`` copies of the system, stacked along the batch. Parameter i has its copies in
    dimension ``dims[i]``, or is shared (``None``)."""

    def of_copies(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
        each = rows // size

        def expanded(*params: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.expand(each, -1) for t in per_sample(each, *params))

        if all(d is None for d in dims):  # vmap refuses to run without a mapped argument
            return tuple(t.repeat(size, 1) for t in expanded(*params))
        return tuple(t.reshape(rows, -1) for t in torch.vmap(expanded, in_dims=dims)(*params))

    return of_copies


def flat_tree(layout: Layout, tree: Any, rows: int, what: str) -> Tensor:
    """A constraint's pytree in flat form, ``[rows or 1, dim]``. Its leaves may or may not have the batch dimension.

    Args:
        layout: layout of the state.
        tree: a pytree with the structure of the state.
        rows: the batch size.
        what: the tree's name in errors.

    Raises:
        ValueError: the tree does not fit the state.
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
    """A scalar for all samples as ``[1, 1]``, or one per sample as ``[rows, 1]``; other shapes raise ``ValueError``."""
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
    """A bound in flat form, ``[rows or 1, dim]``, from one number for the whole state or from a pytree like it."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0 and layout.shapes != ((),)):
        return torch.as_tensor(value, dtype=layout.dtype, device=layout.device).expand(1, layout.dim)
    return flat_tree(layout, value, rows, what)


def flat_matrix(layout: Layout, matrix: Any, right: Any, rows: int, what: str) -> tuple[Tensor, Tensor]:
    """A constraint's matrix and right-hand side, ``[rows or 1, m, dim]`` and ``[rows or 1, m]``.

    Args:
        layout: layout of the state.
        matrix: ``[m, dim]`` or ``[rows, m, dim]``.
        right: a number, ``[m]`` or ``[rows, m]``.
        rows: the batch size.
        what: the constraint's name in errors.

    Raises:
        ValueError: they do not fit the state or each other.
    """
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
            f"{what} has {m} rows, but a right-hand side of shape {tuple(right.shape)}: give a number, or ({m},)"
            + (f", or ({rows}, {m}) for one per sample" if layout.batched else "")
        )
    return matrix.reshape(-1, m, layout.dim), right.expand(1, m) if right.ndim == 0 else right.reshape(-1, m)
