"""The settings of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchimplicit.recipes.options import positive
from torchimplicit.recipes.physics.config import EquationName
from torchimplicit.recipes.runtime.table import Plan

OptimizerName = Literal["least-squares", "l-bfgs", "adam"]


@dataclass(frozen=True, kw_only=True)
class PhysicsInformedConfig:
    """Equilibrium models with 5 and 20 states beside plain networks: four equations, three optimizers."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=15))

    equations: tuple[EquationName, ...] = ("van-der-pol", "four-tanks", "burgers", "helmholtz")
    """Which equations."""

    optimizers: tuple[OptimizerName, ...] = ("least-squares", "l-bfgs", "adam")
    """Which optimizers; least-squares is Gauss–Newton."""

    ordinary_seconds: float = 4.0
    """Of the processor's time for a run on an ordinary differential equation."""

    partial_seconds: float = 10.0
    """Likewise on a partial one."""

    ordinary_points: int = 50
    """At which an ordinary differential equation is asked for."""

    partial_points: int = 400
    """At which a partial one is."""

    def __post_init__(self) -> None:
        positive(self, "ordinary_seconds", "partial_seconds", "ordinary_points", "partial_points")


def default() -> PhysicsInformedConfig:
    """The table."""
    return PhysicsInformedConfig()
