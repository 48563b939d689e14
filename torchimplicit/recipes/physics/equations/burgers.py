"""Burgers' equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.physics.equations.base import Condition, Equation, Fields, scattered

VISCOSITY = 0.1 / np.pi


class Burgers(Equation):
    """:math:`u_t+uu_x=\\nu u_{xx}` on [0, 1] × [-1, 1], :math:`u(0,x)=-\\sin\\pi x`, zero at both ends.

    :math:`\\nu=0.1/\\pi` is ten times the viscosity of Raissi et al. (2019), so that few points resolve the front.
    """

    title = "Burgers' equation"
    inputs = ("t", "x")
    outputs = ("u",)
    low: ClassVar[tuple[float, ...]] = (0.0, -1.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    source = "the Cole–Hopf transform, by Gauss–Hermite quadrature (Basdevant et al. 1986)"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        some = max(8, round(count**0.5))
        x = torch.linspace(-1, 1, 2 * some, dtype=torch.float64)
        t = torch.linspace(0, 1, some, dtype=torch.float64)
        first = torch.stack([torch.zeros_like(x), x], dim=1)
        ends = torch.cat([torch.stack([t, torch.full_like(t, end)], dim=1) for end in (-1.0, 1.0)])
        return (
            Condition(first, (), lambda p, u: u[()] + torch.sin(torch.pi * p[:, 1:])),
            Condition(ends, (), lambda p, u: u[()]),
            Condition(scattered(count, self.low, self.high, seed), ((0,), (1,), (1, 1)), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """What the solution makes zero."""
        return u[0,] + u[()] * u[1,] - VISCOSITY * u[1, 1]

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        nodes, weights = np.polynomial.hermite.hermgauss(150)
        t, place = x[:, :1], x[:, 1:]
        moved = place - np.sqrt(4 * VISCOSITY * t) * nodes
        damp = weights * np.exp(-np.cos(np.pi * moved) / (2 * np.pi * VISCOSITY))
        values = -(damp * np.sin(np.pi * moved)).sum(1) / damp.sum(1)
        return np.asarray(values[:, None])

    def grid(self) -> NDArray[np.float64]:
        t, x = np.meshgrid(np.linspace(0, 1, 51), np.linspace(-1, 1, 101), indexing="ij")
        return np.stack([t.ravel(), x.ravel()], axis=1)
