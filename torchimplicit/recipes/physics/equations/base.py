"""What a differential equation states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Order = tuple[int, ...]
Fields = dict[Order, Tensor]
"""The function's value ``[points, outputs]`` under ``()``, and its derivatives under their coordinates."""


@dataclass(frozen=True)
class Condition:
    """What must vanish at some points: the equation inside, an initial or a boundary condition.

    Attributes:
        points: ``[points, inputs]``.
        orders: the derivatives that are needed.
        residual: of the points and the fields there, ``[points, terms]``.
        weight: of its mean square in the loss.
    """

    points: Tensor
    orders: tuple[Order, ...]
    residual: Callable[[Tensor, Fields], Tensor]
    weight: float = 1.0


class Equation(ABC):
    """A differential equation on a box, with its conditions and a trusted solution.

    Attributes:
        title: for people.
        inputs, outputs: names of the coordinates, and of the function's components.
        low, high: the box.
        source: of the trusted solution.
    """

    title: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    low: ClassVar[tuple[float, ...]]
    high: ClassVar[tuple[float, ...]]
    source: ClassVar[str]

    @abstractmethod
    def conditions(self, count: int, seed: int) -> Sequence[Condition]:
        """What the function must satisfy, the equation itself at ``count`` points."""

    @abstractmethod
    def reference(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The trusted solution at ``[points, inputs]``: ``[points, outputs]``."""

    @abstractmethod
    def grid(self) -> NDArray[np.float64]:
        """Points ``[points, inputs]`` on which errors are measured; of an interval, evenly spaced."""

    def errors(self, values: NDArray[np.float64]) -> dict[str, float]:
        """The errors of values on the grid: the integral of the absolute error over one coordinate (IAE, summed over
        the components), and the relative error in the mean square."""
        grid = self.grid()
        right = self.reference(grid)
        gap = values - right
        found = {"relative_l2": float(np.linalg.norm(gap) / np.linalg.norm(right))}
        if len(self.inputs) == 1:
            found["iae"] = float(np.abs(gap).sum() * (grid[1, 0] - grid[0, 0]))
        return found


def scattered(count: int, low: Sequence[float], high: Sequence[float], seed: int) -> Tensor:
    """Points ``[count, inputs]`` that fill a box evenly: a scrambled Sobol sequence."""
    engine = torch.quasirandom.SobolEngine(len(low), scramble=True, seed=seed)
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return a + (b - a) * engine.draw(count, dtype=torch.float64)


def spread(count: int, low: float, high: float) -> Tensor:
    """Evenly spaced points of an interval, ``[count, 1]``."""
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None]
