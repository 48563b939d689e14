"""Helmholtz' equation on the square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.physics.equations.base import Condition, Equation, Fields, scattered

WAVES = (1.0, 2.0)
NUMBER = 1.0


class Helmholtz(Equation):
    """:math:`u_{xx}+u_{yy}+k^2u=q` on [-1, 1]², zero on the boundary, with the q that makes
    :math:`\\sin(\\pi x)\\sin(2\\pi y)` the solution, k = 1."""

    title = "Helmholtz' equation"
    inputs = ("x", "y")
    outputs = ("u",)
    low: ClassVar[tuple[float, ...]] = (-1.0, -1.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    source = "the closed form"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        side = torch.linspace(-1, 1, max(8, round(count**0.5)), dtype=torch.float64)
        edges = []
        for end in (-1.0, 1.0):
            whole = torch.full_like(side, end)
            edges += [torch.stack([side, whole], dim=1), torch.stack([whole, side], dim=1)]
        return (
            Condition(torch.cat(edges), (), lambda p, u: u[()], weight=10.0),
            Condition(scattered(count, self.low, self.high, seed), ((0, 0), (1, 1)), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """What the solution makes zero."""
        squares = NUMBER**2 - torch.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)
        source = squares * torch.sin(WAVES[0] * torch.pi * x[:, :1]) * torch.sin(WAVES[1] * torch.pi * x[:, 1:])
        return u[0, 0] + u[1, 1] + NUMBER**2 * u[()] - source

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.sin(WAVES[0] * np.pi * x[:, :1]) * np.sin(WAVES[1] * np.pi * x[:, 1:]))

    def grid(self) -> NDArray[np.float64]:
        x, y = np.meshgrid(np.linspace(-1, 1, 61), np.linspace(-1, 1, 61), indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1)
