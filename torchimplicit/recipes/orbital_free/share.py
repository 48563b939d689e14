"""The residuals, the loss and the gradient of some of the molecules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.models.orbital_free.second import mixed
from torchimplicit.recipes.orbital_free.case import Case
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining
from torchimplicit.recipes.orbital_free.penalties import Penalties, floor_residual
from torchimplicit.recipes.orbital_free.weights import Weights
from torchimplicit.recipes.runtime.optimize import Array
from torchimplicit.regularizers import fixed_point_correction
from torchimplicit.regularizers.correction import chosen_iterates
from torchimplicit.solution import Solution


@dataclass
class Work:
    """What it took.

    Attributes:
        steps, evaluations: of the minimizations, summed over molecules.
        adjoint: products of the adjoint solves, likewise.
        unconverged: minimizations that were not done.
    """

    steps: float = 0.0
    evaluations: float = 0.0
    adjoint: float = 0.0
    unconverged: int = 0


class Share:
    """Some of the molecules of a training.

    The loss is the mean over all ``total`` molecules of the half square of :meth:`Case.away` (with fixed-point
    correction, of the iterates too, by their weights), of half the squared error of the energy per electron times its
    weight, and of the penalties.

    Attributes:
        work: of the last call.
    """

    def __init__(
        self,
        functional: OrbitalFree,
        cases: Sequence[Case],
        weights: Weights,
        config: OrbitalFreeTraining,
        total: int,
    ):
        self.functional, self.cases, self.weights = functional, cases, weights
        self.config, self.total = config, total
        self.penalties = Penalties(config)
        self.work = Work()

    def residuals(self, vector: Array) -> Array:
        """Of all molecules of the share; all infinite where a density is not found, after which no other is sought."""
        self._begin(vector)
        found = []
        for case in self.cases:
            with torch.no_grad():
                solution = self._solved(case)
                if not bool(solution.converged):
                    return np.full(sum(map(self._rows, self.cases)), np.inf)
                parts = [weight * case.away(p) for weight, p in self._points(solution)]
                if self.config.energy_weight:
                    parts.append(self._energy_error(case, solution.value).reshape(1))
            if self.config.floor_weight:
                matrix = case.curvature(self.functional, solution.value)
                lacking, _ = floor_residual(self.config, case, self.functional, solution.value, matrix)
                parts.append(lacking.detach().reshape(1))
            found.append(self._filled(case, torch.cat(parts)) / self.total**0.5)
        return torch.cat(found).numpy()

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``, by the implicit function theorem with assembled second derivatives: in the metric's
        coordinates :math:`dq/d\\theta=-(PHP)^+PB`, at the density, and at the iterates of a fixed-point correction as
        if they were it."""
        self._begin(vector)
        rows = []
        for case in self.cases:
            solution = self._solved(case)
            p, parts = solution.value.detach(), []
            matrix = moved = p
            for weight, p in self._points(solution):  # the last is the solution
                matrix = case.curvature(self.functional, p)
                moved = self._moved(case, p, matrix)
                parts.append(weight * case.weighing @ moved)
            if self.config.energy_weight:
                self.functional.zero_grad()
                self._energy_error(case, p).backward()
                parts.append(torch.as_tensor(self.weights.gradient())[None])
            if self.config.floor_weight:
                self.functional.zero_grad()
                lacking, along = floor_residual(self.config, case, self.functional, p, matrix)
                lacking.backward()
                parts.append(torch.as_tensor(self.weights.gradient())[None] + along @ moved)
            rows.append(self._filled(case, torch.cat(parts)))
        return (torch.cat(rows) / self.total**0.5).numpy()

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """This share's part of both."""
        self._begin(vector)
        value = 0.0
        for number, case in enumerate(self.cases):
            solution = self._solved(case)
            loss = self._density_loss(case, solution)
            if self.config.energy_weight:
                # at the minimum the energy's derivative through the density is nought (the envelope theorem)
                loss = loss + 0.5 * self._energy_error(case, solution.value.detach()).square()
            loss = loss + self.penalties(number, case, self.functional, solution.value.detach())
            (loss / self.total).backward()
            value += float(loss.detach()) / self.total
            if solution.adjoint is not None:
                self.work.adjoint += solution.adjoint.evaluations
        return value, self.weights.gradient()

    def _begin(self, vector: Array) -> None:
        self.weights.put(np.asarray(vector))
        self.work = Work()

    def _solved(self, case: Case) -> Solution:
        solution = case.solved(self.functional, self.config, cold=self.config.cold)
        self.work.steps += float(solution.steps)
        self.work.evaluations += solution.evaluations
        self.work.unconverged += not bool(solution.converged)
        return solution

    def _moved(self, case: Case, p: Tensor, matrix: Tensor) -> Tensor:
        """``[n, weights]``: how the density of least energy moves with the weights, if ``p`` is it.

        Args:
            matrix: the case's ``curvature`` at ``p``.
        """
        inner, normal = case.plane
        slopes = inner @ self.weights.columns(mixed(self.functional, p, case.molecule, self.weights.names))
        slopes = slopes - normal.T @ (normal @ slopes)
        return -inner @ torch.linalg.solve(matrix, slopes)

    def _points(self, solution: Solution) -> list[tuple[float, Tensor]]:
        """The densities in the loss, the solution last, each with the root of its weight."""
        count = 1 + self.config.correction
        chosen = chosen_iterates(solution, count, random=self.config.correction_random) if count > 1 else []
        points = [solution.trajectory[k] for k in chosen] + [solution.value.detach()]
        return [(self.config.correction_gamma ** (0.5 * (len(points) - 1 - k)), p) for k, p in enumerate(points)]

    def _rows(self, case: Case) -> int:
        """Residuals of a molecule."""
        densities = (1 + self.config.correction) * case.molecule.size
        return densities + (self.config.energy_weight > 0) + (self.config.floor_weight > 0)

    def _filled(self, case: Case, rows: Tensor) -> Tensor:
        """With zeros, where there were fewer iterates than the correction takes."""
        missing = self._rows(case) - len(rows)
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    def _density_loss(self, case: Case, solution: Solution) -> Tensor:
        def half_square(p: Tensor) -> Tensor:
            return 0.5 * case.away(p).square().sum()

        if not self.config.correction:
            return half_square(solution.value)
        return fixed_point_correction(
            solution,
            half_square,
            count=1 + self.config.correction,
            gamma=self.config.correction_gamma,
            random=self.config.correction_random,
        )

    def _energy_error(self, case: Case, p: Tensor) -> Tensor:
        molecule: Molecule = case.molecule
        error: Tensor = (self.functional(p, molecule) - molecule.energy) / molecule.electrons
        return self.config.energy_weight**0.5 * error
