"""The four-tank process."""

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

AREA = (28.0, 32.0, 28.0, 32.0)
"""Cross-sections of the tanks, cm²."""
OUTLET = (0.071, 0.057, 0.071, 0.057)
"""Of the outlets, cm²."""
GRAVITY = 981.0
PUMP = (3.33, 3.35)
"""Flow of the pumps per volt, cm³/(V s)."""
VALVE = (0.7, 0.6)
"""Share of each pump's flow that goes to the lower tank."""
VOLTAGE = (3.0, 3.0)
START = (6.0, 6.0, 3.0, 3.0)
"""Levels, cm."""
DURATION = 60.0
"""Seconds."""


class FourTanks(Equation):
    """Four tanks that fill and drain one another (Johansson 2000, the minimum-phase setting), from a start off balance.

    The levels obey :math:`A_i\\dot h_i=-a_i\\sqrt{2gh_i}+\\dots`; time is in minutes, so that it runs from 0 to 1.
    """

    title = "Four tanks"
    inputs = ("t",)
    outputs = ("h1", "h2", "h3", "h4")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (1.0,)
    source = "SciPy's DOP853 to 1e-12"

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        return (
            Condition(torch.zeros(1, 1, dtype=torch.float64), (), lambda x, u: u[()] - torch.tensor(START).to(x)),
            Condition(spread(count, *self.low, *self.high), ((0,),), self.equation, weight=0.1),
        )

    @staticmethod
    def equation(x: Tensor, u: Fields) -> Tensor:
        """What the solution makes zero."""
        return u[0,] - torch.stack(flows(*u[()].unbind(1)), dim=1)

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(_integrated()(x[:, 0]).T)

    def grid(self) -> NDArray[np.float64]:
        return np.linspace(0, 1, 1001)[:, None]


def flows(*levels: Any) -> list[Any]:
    """The levels' rates, cm a minute; numbers or tensors."""
    out = [
        outlet * (2 * GRAVITY * (level.clamp_min(1e-3) if isinstance(level, Tensor) else max(level, 1e-3))) ** 0.5
        for outlet, level in zip(OUTLET, levels, strict=True)
    ]
    pumped = [pump * volt for pump, volt in zip(PUMP, VOLTAGE, strict=True)]
    rates = (
        -out[0] + out[2] + VALVE[0] * pumped[0],
        -out[1] + out[3] + VALVE[1] * pumped[1],
        -out[2] + (1 - VALVE[1]) * pumped[1],
        -out[3] + (1 - VALVE[0]) * pumped[0],
    )
    return [DURATION * rate / area for rate, area in zip(rates, AREA, strict=True)]


@lru_cache(maxsize=1)
def _integrated() -> Any:
    return solve_ivp(lambda t, h: flows(*h), (0, 1), START, "DOP853", rtol=1e-12, atol=1e-14, dense_output=True).sol
