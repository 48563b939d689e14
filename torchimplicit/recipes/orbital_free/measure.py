"""How good the densities of a functional are, molecule by molecule, and how hard they are to find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.orbital_free.case import Case
from torchimplicit.recipes.orbital_free.config import OrbitalFreeTraining


@dataclass(frozen=True)
class Quality:
    """Of one molecule.

    Attributes:
        name, size: of the molecule, and how many basis functions it has.
        loss: :math:`\\int(\\rho-\\rho_{gs})^2/(2N)`.
        l1: :math:`\\int|\\rho-\\rho_{gs}|/N`.
        energy_error: of the energy at the density that was found, in hartree.
        guess_loss, guess_l1: the same figures of the superposition of atoms (MINAO).
        negative: the least density on the grid, per cubic bohr.
        steps, evaluations: of the minimization from that superposition.
        converged: whether it was done within its budget.
        least, largest: eigenvalues of the Hessian on the constraint, in the metric's coordinates; NaN if not asked for.
    """

    name: str
    size: int
    loss: float
    l1: float
    energy_error: float
    guess_loss: float
    guess_l1: float
    negative: float
    steps: int
    evaluations: float
    converged: bool
    least: float = math.nan
    largest: float = math.nan

    @property
    def better(self) -> bool:
        """Than the superposition of atoms, by both figures."""
        return self.loss < self.guess_loss and self.l1 < self.guess_l1


@dataclass(frozen=True)
class Summary:
    """Means over molecules; ``better`` is a share, ``steps`` and the spectrum are the worst."""

    loss: float
    l1: float
    energy_error: float
    guess_loss: float
    guess_l1: float
    better: float
    steps: int
    mean_steps: float
    unconverged: float
    least: float
    largest: float


def quality(case: Case, functional: OrbitalFree, config: OrbitalFreeTraining, *, spectrum: bool = False) -> Quality:
    """Of the density that is found from the superposition of atoms."""
    molecule = case.molecule
    with torch.no_grad():
        solution = case.solved(functional, config, cold=True)
        p, guess = solution.value, molecule.guess
    least = largest = math.nan
    if spectrum:
        values = torch.linalg.eigvalsh(case.curvature(functional, p))
        least, largest = float(values[0]), float(values[-1])
    with torch.no_grad():
        return Quality(
            name=molecule.name,
            size=molecule.size,
            loss=float(case.loss(p)),
            l1=float(case.l1(p)),
            energy_error=float(functional(p, molecule) - molecule.energy),
            guess_loss=float(case.loss(guess)),
            guess_l1=float(case.l1(guess)),
            negative=float(molecule.density(p).min()),
            steps=int(solution.steps),
            evaluations=solution.evaluations,
            converged=bool(solution.converged),
            least=least,
            largest=largest,
        )


def qualities(
    cases: Sequence[Case], functional: OrbitalFree, config: OrbitalFreeTraining, *, spectrum: bool = False
) -> list[Quality]:
    """Of each."""
    return [quality(case, functional, config, spectrum=spectrum) for case in cases]


def summarized(found: Sequence[Quality]) -> Summary:
    """Of some molecules, at least one."""
    return Summary(
        loss=fmean(one.loss for one in found),
        l1=fmean(one.l1 for one in found),
        energy_error=fmean(abs(one.energy_error) for one in found),
        guess_loss=fmean(one.guess_loss for one in found),
        guess_l1=fmean(one.guess_l1 for one in found),
        better=fmean(one.better for one in found),
        steps=max(one.steps for one in found),
        mean_steps=fmean(one.steps for one in found),
        unconverged=fmean(not one.converged for one in found),
        least=min(one.least for one in found),
        largest=max(one.largest for one in found),
    )
