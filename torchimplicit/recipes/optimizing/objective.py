"""What an optimizer is asked to lower, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


class Objective(Protocol):
    """Half the sum of squares of residuals, as a function of a model's weights.

    Attributes:
        evaluations, jacobians: how many there were.
        rejected: evaluations at weights at which the model's equilibria were not all found.
    """

    evaluations: int
    jacobians: int
    rejected: int

    @property
    def model(self) -> nn.Module:
        """Which holds the weights."""

    @property
    def weights(self) -> Array:
        """Those that are to be found, as one vector."""

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the model."""

    def residuals(self, vector: Array) -> Array:
        """All residuals at some weights; infinite where they are rejected."""

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Half the sum of squares, or what stands for it, and its gradient, at some weights."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to go on.

    Attributes:
        iterations: of the optimizer, at most.
        seconds: of the processor's time, measurements not counted; ``None``: as long as it takes.
        measure_every: iterations between two measurements; with ``seconds`` they are spread over the time.
    """

    iterations: int
    seconds: float | None = None
    measure_every: int = 1


@dataclass
class Clock:
    """A training so far; it travels in the checkpoint.

    Attributes:
        iterations: done.
        seconds: of the processor's time, spent in the optimizer.
        residuals, jacobians: evaluations; one of the loss with its gradient counts as one of the residuals.
        rejected: see :class:`Objective`.
    """

    iterations: int = 0
    seconds: float = 0.0
    residuals: int = 0
    jacobians: int = 0
    rejected: int = 0
