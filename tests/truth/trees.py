"""The structures that a state may have, and the units of its leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.truth.case import Case


class Tree:
    """Between states ``[batch, dim]`` in units of order one and the pytrees that the user's function sees.

    Attributes:
        shapes: of the leaves, without the batch.
        units: of the leaves.
    """

    def __init__(self, case: Case):
        dim, half = case.dim, (case.dim + 1) // 2
        self.kind = case.tree
        self.shapes: list[tuple[int, ...]] = {
            "flat": [(dim,)],
            "folded": [(2, dim // 2)] if dim % 2 == 0 else [(1, dim)],
            "tuple": [(half,), (dim - half,)],
            "dict": [(half, 1), (dim - half,)],
            "nested": [(1,), (dim - 1, 1)],
            "columns": [(1,)] * dim,
        }[case.tree]
        unit = case.unit if case.of == "state" else 1.0
        self.units = [unit] * len(self.shapes)
        if case.of == "leaf":
            self.units[-1] = case.unit

    def split(self, z: Tensor) -> Any:
        """The pytree of a state in units of order one."""
        leaves, start = [], 0
        for shape, unit in zip(self.shapes, self.units, strict=True):
            size = torch.Size(shape).numel()
            leaves.append(z[..., start : start + size].reshape(*z.shape[:-1], *shape) * unit)
            start += size
        if self.kind == "dict":
            return {"left": leaves[0], "right": leaves[1]}
        if self.kind == "nested":
            return {"a": (leaves[0],), "b": [leaves[1]]}
        return leaves[0] if len(leaves) == 1 else tuple(leaves)

    def join(self, tree: Any) -> Tensor:
        """The state ``[batch, dim]`` in units of order one."""
        leaves = torch.utils._pytree.tree_leaves(tree)
        parts = [
            leaf.reshape(*leaf.shape[: leaf.ndim - len(shape)], -1) / unit
            for leaf, shape, unit in zip(leaves, self.shapes, self.units, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
