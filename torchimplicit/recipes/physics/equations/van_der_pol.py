"""The Van der Pol oscillator."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchimplicit.recipes.physics.equations.initial_value import InitialValueProblem

MU = 1.0


class VanDerPol(InitialValueProblem):
    """:math:`y_1'=y_2`, :math:`y_2'=\\mu(1-y_1^2)y_2-y_1`, :math:`\\mu=1`, :math:`y(0)=(0, 0.1)`, on [0, 2].

    The problem of Pacheco's thesis, whose loss weighs the equation by 0.1.
    """

    title = "Van der Pol oscillator"
    inputs = ("t",)
    outputs = ("y1", "y2")
    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (2.0,)
    start = (0.0, 0.1)

    def slope(self, *state: Any) -> list[Any]:
        y1, y2 = state
        return [y2, MU * (1 - y1**2) * y2 - y1]

    def grid(self) -> NDArray[np.float64]:
        return np.arange(0, 2 + 1e-9, 0.002)[:, None]
