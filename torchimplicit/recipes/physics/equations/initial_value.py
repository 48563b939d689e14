"""Ordinary differential equations from a start, with SciPy's integration as the trusted solution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.physics.equations.base import Condition, Equation, Fields, spread


class InitialValueProblem(Equation):
    """:math:`y'=s(y)` from :math:`y(t_0)`.

    Attributes:
        start: the state at the beginning of the interval.
    """

    start: ClassVar[tuple[float, ...]]
    source = "SciPy's DOP853 to 1e-12"

    @abstractmethod
    def slope(self, *state: Any) -> list[Any]:
        """The rates of the components; of numbers, or of tensors."""

    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        first = torch.tensor([self.low], dtype=torch.float64)
        return (
            Condition(first, (), lambda x, u: u[()] - torch.tensor(self.start).to(x)),
            Condition(spread(count, *self.low, *self.high), ((0,),), self.equation, weight=0.1),
        )

    def equation(self, x: Tensor, u: Fields) -> Tensor:
        """What the solution makes zero."""
        return u[0,] - torch.stack(self.slope(*u[()].unbind(1)), dim=1)

    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self._integrated(x[:, 0]).T)

    @cached_property
    def _integrated(self) -> Any:
        from scipy.integrate import solve_ivp  # heavy, and settings are made without it

        return solve_ivp(
            lambda t, y: self.slope(*y),
            (*self.low, *self.high),
            self.start,
            "DOP853",
            rtol=1e-12,
            atol=1e-14,
            dense_output=True,
        ).sol
