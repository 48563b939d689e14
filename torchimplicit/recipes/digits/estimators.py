"""The gradient estimators that the recipe compares, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchimplicit.gradients import Gradient, Implicit, NeumannPhantom, OneStep, UnrolledPhantom
from torchimplicit.linear import GMRES
from torchimplicit.recipes.digits.config import DigitsConfig, EstimatorName


@dataclass(frozen=True)
class Estimator:
    """One way to differentiate the equilibrium, as the tables and the pictures show it.

    Attributes:
        label: for people.
        make: the estimator for a config.
        explanation: one sentence for a newcomer.
    """

    label: str
    make: Callable[[DigitsConfig], Gradient]
    explanation: str


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "implicit": Estimator(
        "Implicit (exact)",
        lambda config: Implicit(linear_solver=GMRES(rtol=config.tolerance, max_steps=config.solver_steps)),
        "solves the linear system (I − Jᵀ)g = u by GMRES, so its only error is the solver's tolerance.",
    ),
    "unrolled-phantom": Estimator(
        "Unrolled phantom",
        lambda config: UnrolledPhantom(steps=config.phantom_steps, damping=config.phantom_damping),
        "takes a few more damped steps of the cell from the equilibrium and backpropagates through those only.",
    ),
    "neumann-phantom": Estimator(
        "Neumann phantom",
        lambda config: NeumannPhantom(steps=config.phantom_steps, damping=config.phantom_damping),
        "adds up the first few terms of the series of (I − Jᵀ)⁻¹ at the equilibrium, in constant memory.",
    ),
    "one-step": Estimator(
        "One step",
        lambda config: OneStep(),
        "replaces (I − Jᵀ)⁻¹ by the identity: one vector–Jacobian product, whatever the Jacobian is.",
    ),
}
