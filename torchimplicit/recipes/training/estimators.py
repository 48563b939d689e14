"""Solvers and gradient estimators by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchimplicit.gradients import (
    AdaptivePhantom,
    Gradient,
    Implicit,
    NeumannPhantom,
    OneStep,
    UnbiasedNeumann,
    Unrolled,
    UnrolledPhantom,
)
from torchimplicit.linear import GMRES
from torchimplicit.recipes.training.settings import Equilibria, EstimatorName
from torchimplicit.solvers import Anderson, Broyden, FixedPointIteration, Solver


@dataclass(frozen=True)
class Estimator:
    """One way to differentiate an equilibrium.

    Attributes:
        label: for people, short.
        make: the estimator for the settings.
    """

    label: Callable[[Equilibria], str]
    make: Callable[[Equilibria], Gradient]


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "implicit": Estimator(
        lambda at: "implicit",
        lambda at: Implicit(linear_solver=GMRES(rtol=at.backward_tolerance, max_steps=at.backward_steps)),
    ),
    "unrolled-phantom": Estimator(
        lambda at: f"UPG({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: UnrolledPhantom(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "neumann-phantom": Estimator(
        lambda at: f"NPG({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: NeumannPhantom(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "adaptive-phantom": Estimator(
        lambda at: f"adaptive phantom({at.backward_tolerance:g})",
        lambda at: AdaptivePhantom(tolerance=at.backward_tolerance, max_steps=at.backward_steps),
    ),
    "unbiased-neumann": Estimator(
        lambda at: f"unbiased({at.phantom_steps}, {at.phantom_damping:g})",
        lambda at: UnbiasedNeumann(steps=at.phantom_steps, damping=at.phantom_damping),
    ),
    "one-step": Estimator(lambda at: "one step", lambda at: OneStep()),
    "unrolled": Estimator(lambda at: "unrolled", lambda at: Unrolled()),
}


def gradient(settings: Equilibria) -> Gradient:
    """The estimator that the settings name."""
    return ESTIMATORS[settings.gradient].make(settings)


def label(settings: Equilibria) -> str:
    """The estimator's name with its settings."""
    return ESTIMATORS[settings.gradient].label(settings)


def solver(settings: Equilibria) -> Solver:
    """The solver that the settings name."""
    kinds = {"anderson": Anderson, "broyden": Broyden, "fixed-point": FixedPointIteration}
    return kinds[settings.solver](rtol=settings.tolerance, max_steps=settings.solver_steps)
