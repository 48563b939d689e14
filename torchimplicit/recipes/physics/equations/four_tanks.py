"""The four-tank process."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.physics.equations.initial_value import InitialValueProblem

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
DURATION = 60.0
"""Seconds."""


class FourTanks(InitialValueProblem):
    """Four tanks that fill and drain one another (Johansson 2000, the minimum-phase setting), from a start off balance.

    The levels in cm obey :math:`A_i\\dot h_i=-a_i\\sqrt{2gh_i}+\\dots`; time, in minutes, runs from 0 to 1.
    """

    title = "Four tanks"
    inputs = ("t",)
    outputs = ("h1", "h2", "h3", "h4")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (1.0,)
    start = (6.0, 6.0, 3.0, 3.0)

    def slope(self, *state: Any) -> list[Any]:
        return flows(*state)

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
