"""A molecule in training: what is kept of it from one minimization to the next."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.coordinates import Metric
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import DampedImplicit, EquilibriumPropagation, Gradient, Implicit
from torchimplicit.linear import MINRES, HessianMemory, ReferenceHessian
from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.models.orbital_free.response import plane, projected_hessian
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.solution import Solution
from torchimplicit.solvers import LBFGS, GradientDescent, Solver

PATIENCE = 15
"""Steps of L-BFGS after which the kept Hessian is recomputed."""

TAIL = 1e-3
"""Density in electrons per cubic bohr below which errors weigh no more than at this density."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about solves that do not converge, where their status is recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@dataclass
class Case:
    """A molecule with its metric, the kept Hessian that preconditions, and the density found last.

    Attributes:
        weighing: see :meth:`away`, ``[n, n]``.
        density: coefficients ``[n]`` to begin the next minimization at.
        fresh: whether the kept Hessian still serves.
    """

    molecule: Molecule
    metric: Metric
    weighing: Tensor
    hessian: HessianMemory = field(default_factory=lambda: ReferenceHessian().init())
    density: Tensor = field(init=False)
    fresh: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.density = self.molecule.guess

    @classmethod
    def of(cls, molecule: Molecule, tail_weight: float = 0.0) -> Case:
        """A case with the metric of the basis' overlap.

        Args:
            tail_weight: :math:`\\kappa` of :meth:`away`.
        """
        matrix = molecule.overlap
        if tail_weight:
            share = molecule.quadrature / (molecule.density(molecule.reference).clamp_min(0) + TAIL)
            matrix = matrix + tail_weight * molecule.basis.products(share[None, None])
        weighing = torch.linalg.cholesky(matrix / molecule.electrons).mT
        return cls(molecule, molecule.metric, weighing)

    def problem(self, functional: OrbitalFree) -> Minimum:
        """The density of least energy."""
        return functional.problem(self.molecule, self.metric)

    def solved(self, functional: OrbitalFree, config: OrbitalFreeTraining, *, cold: bool = False) -> Solution:
        """The density of least energy, starting from the last one found or (``cold``) from the superposition of atoms
        with a fresh Hessian. With several minima, the start decides which one is found.

        The solution carries the config's gradient. It is remembered where it is converged; whether it is, is for the
        caller to see.
        """
        start = self.molecule.guess if cold else self.density
        if cold or not self.fresh:
            self.refresh(functional, start)
        with quiet():
            solution = solve(
                self.problem(functional),
                start,
                solver=self.solver(config),
                gradient=self.gradient(config),
                throw=False,
            )
        if bool(solution.converged):
            if not cold:
                self.density = solution.value.detach()
            self.fresh = int(solution.steps) <= PATIENCE
        return solution

    def refresh(self, functional: OrbitalFree, p: Tensor) -> None:
        """Keep the Hessian at ``p``, in the metric's coordinates and on the plane of the constraint."""
        self.hessian.keep(self.curvature(functional, p)[None])
        self.fresh = True

    def curvature(self, functional: OrbitalFree, p: Tensor) -> Tensor:
        """:math:`PHP` at ``p``, ``[n, n]``, in the metric's coordinates, assembled.

        Along the constraint's normal it has the mean of its eigenvalues in place of zero, so that its inverse and its
        extreme eigenvalues are those on the plane.
        """
        matrix, (_, normal) = projected_hessian(functional, p, self.molecule, self.plane), self.plane
        mean = matrix.diagonal().sum() / max(1, len(matrix) - 1)
        return matrix + mean * normal.T @ normal

    @cached_property
    def plane(self) -> tuple[Tensor, Tensor]:
        """See :func:`~torchimplicit.models.orbital_free.response.plane`; made once."""
        return plane(self.molecule, self.metric)

    def solver(self, config: OrbitalFreeTraining) -> Solver:
        """The solver of the config."""
        bounds: dict[str, Any] = {"rtol": 0.0, "atol": config.inner_tolerance, "max_steps": config.inner_steps}
        bounds["keep_trajectory"] = config.correction > 0
        if config.inner == "descent":  # with the momentum of STRUCTURES25's density optimization, which the slides take
            return GradientDescent(step_size=config.inner_rate, momentum=0.9, **bounds)
        return LBFGS(preconditioner=self.hessian, **bounds)

    def gradient(self, config: OrbitalFreeTraining) -> Gradient:
        """The gradient estimator of the config."""
        linear = MINRES(rtol=1e-8, preconditioner=self.hessian)
        if config.gradient == "implicit":
            return Implicit(linear_solver=linear)
        if config.gradient == "damped":
            return DampedImplicit(linear_solver=linear)
        one_sided = config.gradient == "eqprop-one-sided"
        inner = LBFGS(preconditioner=self.hessian, rtol=0.0, atol=config.inner_tolerance, max_steps=config.inner_steps)
        return EquilibriumPropagation(nudge=config.nudge, symmetric=not one_sided, curved=one_sided, solver=inner)

    def away(self, p: Tensor) -> Tensor:
        """``[n]``: half its square is what training lowers for this molecule,
        :math:`\\int(\\rho-\\rho_{gs})^2(1+\\kappa/(\\rho_{gs}+\\delta))/(2N)`."""
        return self.weighing @ (p - self.molecule.reference)

    def loss(self, p: Tensor) -> Tensor:
        """:math:`L=\\int(\\rho-\\rho_{gs})^2/(2N)`."""
        difference = p - self.molecule.reference
        return 0.5 * difference @ (self.molecule.overlap @ difference) / self.molecule.electrons

    def l1(self, p: Tensor) -> Tensor:
        """:math:`\\int|\\rho-\\rho_{gs}|/N` on the grid."""
        difference = self.molecule.density(p - self.molecule.reference).abs()
        return self.molecule.quadrature @ difference / self.molecule.electrons
