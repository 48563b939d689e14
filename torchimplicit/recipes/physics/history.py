"""What is measured while a field is trained, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchimplicit.recipes.physics.config import PhysicsConfig
from torchimplicit.recipes.runtime.optimize import Clock
from torchimplicit.recipes.runtime.run import Environment


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
class History(Clock):
    """A training so far; it travels in the checkpoint.

    Attributes:
        looks: in their order.
    """

    looks: list[Look] = field(default_factory=list)


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
