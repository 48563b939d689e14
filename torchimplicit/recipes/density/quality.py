"""Quality of a functional's densities, molecule by molecule, and the effort to find them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.runtime.files import say_once

SPURIOUS_ENERGY, SPURIOUS_LOSS = 0.05, 2.0
"""Thresholds in hartree per electron, and relative to the L of the superposition of atoms. A minimum farther off than
either is a spurious one rather than an error of a trained functional."""


@dataclass(frozen=True)
class Finer:
    """The density of the same functional on a finer grid, minimized from the one on its own grid.

    Attributes:
        level: PySCF's, of the finer grid.
        loss, l1, guess_l1, energy_error, converged: see :class:`Quality`.
        moved: :math:`\\int(\\rho-\\rho_{own})^2/(2N)`, how far it is from the density on its own grid.
    """

    level: int
    loss: float
    l1: float
    guess_l1: float
    energy_error: float
    converged: bool
    moved: float

    def better(self, guess_loss: float) -> bool:
        """Return whether it beats the superposition of atoms, whose L does not depend on the grid."""
        return self.converged and self.loss < guess_loss and self.l1 < self.guess_l1


@dataclass(frozen=True)
class Quality:
    """Quality of one molecule's density.

    Attributes:
        name, size: the molecule's name and number of basis functions.
        loss: :math:`\\int(\\rho-\\rho_{gs})^2/(2N)`.
        l1: :math:`\\int|\\rho-\\rho_{gs}|/N`.
        energy_error: error of the energy at the density found, in hartree.
        trained_energy_error: likewise, by the elements' constants that training had; ``energy_error`` is by those that
            are fitted to the training molecules' energies afterwards, unless energies are trained.
        guess_loss, guess_l1: the same figures of the superposition of atoms (MINAO).
        negative: the least density on the grid, per cubic bohr.
        steps, evaluations: steps and evaluations of the minimization from that superposition.
        converged: whether it was done within its budget.
        least, largest: eigenvalues of the Hessian on the constraint, in the metric's coordinates; NaN if not asked for.
        finer: the same molecule on a finer grid, where it was looked at.
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
    trained_energy_error: float = math.nan
    finer: Finer | None = None

    @property
    def better(self) -> bool:
        """Return whether it was found and beats the superposition of atoms in both figures, and also on the finer grid
        if there is one."""
        improved = self.converged and self.loss < self.guess_loss and self.l1 < self.guess_l1
        return improved and (self.finer is None or self.finer.better(self.guess_loss))


@dataclass(frozen=True)
class Summary:
    """Means over molecules. ``better`` is a share; ``steps`` and the spectrum are the worst; fields named ``finer``
    belong to the finer grid, and are NaN without one."""

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
    trained_energy_error: float = math.nan
    finer_loss: float = math.nan
    finer_l1: float = math.nan
    finer_energy_error: float = math.nan


def quality(
    case: Case,
    functional: OrbitalFree,
    config: OrbitalFreeTraining,
    *,
    spectrum: bool = False,
    constants: Tensor | None = None,
    file: Path | None = None,
) -> Quality:
    """Quality of the density found from the superposition of atoms.

    Args:
        spectrum: look at the Hessian's extreme eigenvalues too.
        constants: the elements' constants that training had; ``None``: those that ``functional`` has.
        file: file of the molecule, to look at a finer grid too; ``None``: do not.
    """
    molecule = case.molecule
    with torch.no_grad():
        solution = case.solved(functional, config, cold=True)
    p, least, largest = solution.value, math.nan, math.nan
    if spectrum:
        values = torch.linalg.eigvalsh(case.curvature(functional, p))
        least, largest = float(values[0]), float(values[-1])
    with torch.no_grad():
        energy_error = float(functional(p, molecule) - molecule.energy)
        refitted = 0.0 if constants is None else float((functional.constants - constants)[molecule.charges].sum())
        return Quality(
            **errors(case, p),
            energy_error=energy_error,
            trained_energy_error=energy_error - refitted,
            steps=int(solution.steps),
            evaluations=solution.evaluations,
            converged=bool(solution.converged),
            least=least,
            largest=largest,
            finer=None if file is None else finer(case, functional, config, p, file),
        )


def errors(case: Case, p: Tensor) -> dict[str, Any]:
    """The fields of a :class:`Quality` that a density (``[n]``) has without an energy."""
    molecule = case.molecule
    return {
        "name": molecule.name,
        "size": molecule.size,
        "loss": float(case.loss(p)),
        "l1": float(case.l1(p)),
        "guess_loss": float(case.loss(molecule.guess)),
        "guess_l1": float(case.l1(molecule.guess)),
        "negative": float(molecule.density(p).min()),
    }


def finer(case: Case, functional: OrbitalFree, config: OrbitalFreeTraining, p: Tensor, file: Path) -> Finer:
    """Minimize again on the finer grid, from the density ``p`` (``[n]``) on the coarser one with its kept Hessian. This
    tests whether the minimum exists there, not how long it takes to find.

    Raises:
        UserError: PySCF, which makes the grid, is missing.
    """
    molecule = storage.read(file).on_grid(config.check_grid).molecule()
    fine = Case(molecule, case.metric, case.weighing, hessian=case.hessian)
    fine.density, fine.fresh = p, True
    solution = fine.solved(functional, replace(config, inner="l-bfgs", correction=0))
    value = solution.value
    moved = value - p
    return Finer(
        level=config.check_grid,
        loss=float(fine.loss(value)),
        l1=float(fine.l1(value)),
        guess_l1=float(fine.l1(molecule.guess)),
        energy_error=float(functional(value, molecule) - molecule.energy),
        converged=bool(solution.converged),
        moved=float(0.5 * moved @ (molecule.overlap @ moved) / molecule.electrons),
    )


def qualities(
    cases: Iterable[Case],
    functional: OrbitalFree,
    config: OrbitalFreeTraining,
    *,
    spectrum: bool = False,
    constants: Tensor | None = None,
    files: Mapping[str, Path] | None = None,
) -> list[Quality]:
    """Quality of each molecule; see :func:`quality`.

    Args:
        files: the molecules' files by name, to look at the finer grid of the config too, if it asks for one; ``None``:
            do not.
    """
    finer = files if files is not None and checked(config) else {}
    return [
        quality(case, functional, config, spectrum=spectrum, constants=constants, file=finer.get(case.molecule.name))
        for case in cases
    ]


def loaded(files: Mapping[str, Path]) -> Iterator[Case]:
    """The molecules of some files, of which one at a time is in memory."""
    return (Case.of(storage.load(path)) for path in files.values())


def summarized(qualities: Sequence[Quality]) -> Summary:
    """Summary of at least one molecule."""
    means = ("loss", "l1", "energy_error", "guess_loss", "guess_l1", "trained_energy_error")

    def on_finer_grid(name: str) -> float:
        return fmean(math.nan if one.finer is None else abs(getattr(one.finer, name)) for one in qualities)

    return Summary(
        **{name: fmean(abs(getattr(one, name)) for one in qualities) for name in means},
        **{f"finer_{name}": on_finer_grid(name) for name in ("loss", "l1", "energy_error")},
        better=fmean(one.better for one in qualities),
        steps=max(one.steps for one in qualities),
        mean_steps=fmean(one.steps for one in qualities),
        unconverged=fmean(not one.converged for one in qualities),
        least=min(one.least for one in qualities),
        largest=max(one.largest for one in qualities),
    )


def checked(config: OrbitalFreeTraining) -> bool:
    """Return whether densities are also minimized on a finer grid, which PySCF makes; say it if there is none."""
    finer_asked = config.check_grid > config.molecules.chemistry.grid
    if finer_asked and find_spec("pyscf") is None:
        say_once(f"PySCF is not installed: no density is checked on a grid of level {config.check_grid} (--check-grid)")
        return False
    return finer_asked


def spurious(one: Quality, electrons: float) -> bool:
    """Return whether a minimum is unrelated to the reference, or on the finer grid a different one, farther away than
    half of the superposition's L."""
    if not one.converged:
        return False
    if one.finer is not None and one.finer.converged and one.finer.moved > 0.5 * one.guess_loss:
        return True
    return one.loss > SPURIOUS_LOSS * one.guess_loss or abs(one.energy_error) > SPURIOUS_ENERGY * electrons


def share_spurious(qualities: Sequence[Quality], files: Mapping[str, Path]) -> float:
    """The share of spurious minima among molecules, given their files by name; NaN for none."""
    electrons = {one.name: float(storage.read(files[one.name]).geometry.electrons) for one in qualities}
    return fmean(spurious(one, electrons[one.name]) for one in qualities) if qualities else math.nan
