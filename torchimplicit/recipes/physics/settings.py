"""The settings of the physics recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import OptimizerName, not_negative, positive

EquationName = Literal["van-der-pol", "four-tanks", "burgers", "helmholtz"]


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Solve a differential equation by an equilibrium model, or by a plain network, from the equation alone."""

    equation: EquationName = "van-der-pol"
    """Which equation."""

    model: Literal["equilibrium", "network"] = "equilibrium"
    """z = tanh(Ax + Bz + b) with a linear head, or a perceptron with tanh."""

    states: int = 20
    """Of the equilibrium."""

    width: int = 20
    """Of the network's hidden layers."""

    depth: int = 2
    """How many hidden layers."""

    points: int = 50
    """Collocation points at which the equation is asked for."""

    optimizer: OptimizerName = "least-squares"
    """A trust-region Gauss–Newton method with exact Jacobians, L-BFGS (both SciPy's), or Adam with a cosine."""

    iterations: int = 100
    """Of the optimizer, at most."""

    seconds: float | None = None
    """Stop the optimizer after so much of the processor's time, measuring errors not counted."""

    learning_rate: float = 1e-2
    """Adam's peak."""

    error_every: int = 5
    """Iterations between two measurements of the error on the grid; with --seconds, they are spread over the time."""

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """Of the initial weights and the collocation points."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "states", "width", "depth", "points", "iterations", "learning_rate", "error_every", "seconds")
        not_negative(self, "seed", "threads")
        if self.points < 2:
            raise UserError(f"--points must be at least 2, and it is {self.points}")


def van_der_pol() -> PhysicsConfig:
    """The oscillator of Pacheco's thesis, seconds on one core."""
    return PhysicsConfig(equation="van-der-pol")


def four_tanks() -> PhysicsConfig:
    """The four-tank process, seconds on one core."""
    return PhysicsConfig(equation="four-tanks")


def burgers() -> PhysicsConfig:
    """Burgers' equation, with second derivatives in space: half a minute on one core."""
    return PhysicsConfig(equation="burgers", points=300)


def helmholtz() -> PhysicsConfig:
    """Helmholtz' equation on the square: half a minute on one core."""
    return PhysicsConfig(equation="helmholtz", points=300)
