"""The Van der Pol oscillator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from torchimplicit.recipes.physics.equations.base import Condition, Equation, Fields, spread

MU = 1.0
START = (0.0, 0.1)


class VanDerPol(Equation):
    """:math:`y_1'=y_2`, :math:`y_2'=\\mu(1-y_1^2)y_2-y_1`, :math:`\\mu=1`, :math:`y(0)=(0, 0.1)`, on [0, 2].

    The problem of Pacheco's thesis, whose loss weighs the equation by 0.1.
    """

    title = "Van der Pol oscillator"
    inputs = ("t",)
    outputs = ("y1", "y2")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (2.0,)
    source = "SciPy's DOP853 to 1e-12"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        return (
            Condition(torch.zeros(1, 1, dtype=torch.float64), (), lambda x, u: u[()] - torch.tensor(START).to(x)),
            Condition(spread(count, *self.low, *self.high), ((0,),), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """What the solution makes zero."""
        y1, y2 = u[()].unbind(1)
        d1, d2 = u[0,].unbind(1)
        return torch.stack([d1 - y2, d2 - MU * (1 - y1**2) * y2 + y1], dim=1)

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(_integrated()(x[:, 0]).T)

    def grid(self) -> NDArray[np.float64]:
        return np.arange(0, 2 + 1e-9, 0.002)[:, None]


@lru_cache(maxsize=1)
def _integrated() -> Any:
    def slope(t: float, y: Any) -> list[float]:
        return [y[1], MU * (1 - y[0] ** 2) * y[1] - y[0]]

    return solve_ivp(slope, (0, 2), START, "DOP853", rtol=1e-12, atol=1e-14, dense_output=True).sol
