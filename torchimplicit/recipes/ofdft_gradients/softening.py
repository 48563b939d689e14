"""What becomes of every gradient as an eigenvalue of the Hessian goes to zero, and below."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchimplicit.gradients import DampedImplicit, Gradient, Implicit
from torchimplicit.linear import Dense, ReferenceHessian
from torchimplicit.models.orbital_free.second import hessian
from torchimplicit.problems import Minimum
from torchimplicit.recipes.ofdft_gradients.config import FELT, MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.optimum import Optimum
from torchimplicit.recipes.ofdft_gradients.results import Softened

SYMMETRIC_NUDGE = 1e-3


def softest(optimum: Optimum, exact: Tensor) -> tuple[float, Tensor]:
    """The least eigenvalue, with its vector, among those through which the gradient gets a share of its length: a
    molecule's symmetry may hide the very least one from the loss.

    Raises:
        ValueError: there is none.
    """
    operator, right = optimum.system(optimum.problem)
    values, vectors = torch.linalg.eigh(operator.dense()[0])
    for value, vector in zip(values, vectors.T, strict=True):
        if value <= 1e-8 * values[-1]:  # the constraint's normal
            continue
        part = optimum.pulled(vector * (right[0] @ vector) / value)
        if float(part @ exact) >= FELT * float(exact @ exact):
            return float(value), vector
    raise ValueError(f"no mode carries {FELT:.0%} of the gradient")


def softened(
    optimum: Optimum, exact: Tensor, eigenvalue: float, vector: Tensor, damping: float, config: MoleculeGradientsConfig
) -> list[Softened]:
    """Every gradient, where the energy has half ``eigenvalue - moved`` times the square along ``vector`` taken off: the
    point stays stationary, and the rest of the spectrum what it is.

    Args:
        optimum: where.
        exact: the gradient before.
        eigenvalue, vector: see :func:`softest`.
        damping: of the damped gradients.
        config: what the eigenvalue is multiplied by, and how long a minimization may take.
    """
    found = []
    for factor in sorted(config.softness, reverse=True):
        problem = _moved(optimum, vector, (1 - factor) * eigenvalue)
        norm, cosine, status = {}, {}, {}
        reference = _reference(optimum, vector, (1 - factor) * eigenvalue)
        for name, estimator in _estimators(optimum, damping, reference, config.most_steps).items():
            estimate = optimum.estimate(estimator, problem)
            norm[name] = float(estimate.gradient.norm() / exact.norm())
            cosine[name], status[name] = estimate.cosine(exact), estimate.status
        found.append(Softened(factor * eigenvalue, norm, cosine, status))
    return found


def _estimators(optimum: Optimum, damping: float, reference: ReferenceHessian, most_steps: int) -> dict[str, Gradient]:
    solver = replace(optimum.solver(), preconditioner=reference, max_steps=most_steps)
    nudge = damping * float(optimum.cotangent.norm())
    return {
        "implicit": Implicit(linear_solver=Dense()),
        "damped": DampedImplicit(damping=damping, linear_solver=Dense()),
        "one-sided, whole loss": replace(optimum.propagation(nudge, symmetric=False, curved=True), solver=solver),
        "symmetric": replace(optimum.propagation(SYMMETRIC_NUDGE, symmetric=True), solver=solver),
    }


def _reference(optimum: Optimum, vector: Tensor, less: float) -> ReferenceHessian:
    """The Hessian of the energy that is moved, at the minimum."""
    inverse = optimum.metric.inverse[0]
    matrix = inverse @ hessian(optimum.functional, optimum.value, optimum.molecule) @ inverse
    reference = ReferenceHessian(refresh_after=1000)
    reference.keep((matrix - less * torch.outer(vector, vector))[None])
    return reference


def _moved(optimum: Optimum, vector: Tensor, less: float) -> Minimum:
    energy, along = optimum.problem.energy, optimum.metric.root[0] @ vector

    def energy_less(p: Tensor) -> Tensor:
        moved: Tensor = energy(p) - 0.5 * less * ((p - optimum.value) @ along).square()
        return moved

    return replace(optimum.problem, energy=energy_less)
