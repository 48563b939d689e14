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
        seconds: spent in the optimizer until then.
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
    """A training so far; it travels in the checkpoint."""

    looks: list[Look] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        """Done."""
        return self.looks[-1].iteration if self.looks else 0

    @property
    def seconds(self) -> float:
        """Spent."""
        return self.looks[-1].seconds if self.looks else 0.0


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        parameters: of the model.
        reference: the trusted solution.
        errors: on the grid, at the end.
        residuals, jacobians: evaluations of the optimizer.
        unconverged: share of the grid's points whose equilibrium was not found; zero for a network.
    """

    state: str
    parameters: int
    reference: str
    errors: dict[str, float]
    residuals: int
    jacobians: int
    unconverged: float
    looks: list[Look]
    environment: Environment
    config: PhysicsConfig
