"""Signals as points: coordinates, and the values there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


class Points(nn.Module, ABC):
    """A signal known at numbered points.

    Attributes:
        inputs, outputs: coordinates of a point, and values there.
        low, high: the values' range; their difference is the peak of the signal-to-noise ratio.
        corner: the coordinates run from ``-corner[i]`` to ``corner[i]``.
    """

    inputs: int
    outputs: int
    low: float = -1.0
    high: float = 1.0
    corner: tuple[float, ...]

    @abstractmethod
    def __len__(self) -> int:
        """How many points."""

    @abstractmethod
    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``[points, inputs]`` and values ``[points, outputs]`` of the points ``index``."""


@final
class Grid(Points):
    """Values on a regular grid: an image, a sound, a video.

    Args:
        values: ``[size_1, ..., size_d, outputs]``, from ``low`` to ``high``; integers are of eight bits, from 0 to 255.
        corner: of the coordinates; by default the longest side runs from -1 to 1 and the cells are cubes.
    """

    values: Tensor

    def __init__(self, values: Tensor, corner: Sequence[float] | None = None):
        super().__init__()
        *sizes, self.outputs = values.shape
        self.sizes = tuple(sizes)
        self.inputs = len(sizes)
        self.corner = tuple(n / max(sizes) for n in sizes) if corner is None else tuple(corner)
        self.register_buffer("values", values.flatten(0, -2), persistent=False)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.values.device)
        values = self.values[index]
        if values.dtype == torch.uint8:
            values = values.float() / 127.5 - 1
        return centres(index, self.sizes, self.corner, values.dtype), values


def centres(index: Tensor, sizes: Sequence[int], corner: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """The centres of the cells ``index`` of a grid, ``[points, len(sizes)]``: cell i of n is at
    ``((2i + 1) / n - 1) * corner``, so that grids of different sizes cover the same domain."""
    columns = []
    for size, side in zip(reversed(sizes), reversed(corner), strict=True):
        columns.append(((2 * (index % size) + 1).to(torch.float64) / size - 1) * side)
        index = index // size
    return torch.stack(columns[::-1], dim=1).to(dtype)


def every_other(sizes: Sequence[int], offset: Sequence[int]) -> Tensor:
    """The cells whose places are ``offset`` modulo 2: one in ``2 ** len(sizes)``."""
    index = torch.arange(math.prod(sizes)).reshape(*sizes)
    return index[tuple(slice(start, None, 2) for start in offset)].flatten()
