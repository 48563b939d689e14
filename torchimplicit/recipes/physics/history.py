"""What is measured while a field is trained, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchimplicit.recipes.environment import Environment
from torchimplicit.recipes.physics.config import PhysicsConfig


@dataclass(frozen=True)
class Look:
    """The state of a training.

    Attributes:
        iteration: iterations done.
        seconds: of the processor's time, spent in the optimizer until then.
        loss: half the weighted mean squares of the residuals.
        relative_l2, iae: errors on the grid, see :meth:`Equation.errors`; NaN where they were not measured.
    """

    iteration: int
    seconds: float
    loss: float
    relative_l2: float
    iae: float


@dataclass
class History:
    """A training so far; it travels in the checkpoint.

    Attributes:
        looks: in their order.
        iterations: done.
        seconds: of the processor's time, spent in the optimizer.
        residuals, jacobians: evaluations; one of the loss with its gradient counts as one of the residuals.
        rejected: evaluations at weights whose equilibria were not all found.
    """

    looks: list[Look] = field(default_factory=list)
    iterations: int = 0
    seconds: float = 0.0
    residuals: int = 0
    jacobians: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        parameters: of the model.
        reference: the trusted solution.
        errors: on the grid, at the end.
        loss: at the end.
        iterations, seconds, residuals, jacobians, rejected: see :class:`History`.
        unconverged: share of the grid's points whose equilibrium was not found; zero for a network.
    """

    state: str
    parameters: int
    reference: str
    errors: dict[str, float]
    loss: float
    iterations: int
    seconds: float
    residuals: int
    jacobians: int
    rejected: int
    unconverged: float
    looks: list[Look]
    environment: Environment
    config: PhysicsConfig
