"""A molecule's matrices, grid, densities and energies."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import final

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.integrals import grid_of
from torchimplicit.recipes.density.settings import ChemistrySettings

NARROW = 0.05
"""Gap of the orbitals in hartree below which a closed shell is doubtful: by LDA, a triplet has less energy for CH2 (gap
.003) and H2 at 2.5 angstrom (.049), and not for O3 (.058), N2 at 1.8 angstrom (.081) and others with larger gaps."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A molecule's matrices, grid, densities and energies; atomic units, float64.

    The basis on the grid is not among them: it is made again from the exponents, in less time than it takes to read.

    Attributes:
        geometry: geometry of the molecule.
        settings: how it was computed.
        basis: basis of the density, n functions.
        overlap, coulomb, external, reference, guess, points, quadrature: see
            :class:`~torchimplicit.models.orbital_free.molecule.Molecule`.
        energy, repulsion, kinetic, exchange_correlation: likewise.
        attraction: attraction of the nuclei on the Kohn-Sham density, as the orbitals have it.
        hartree: the Coulomb energy of the Kohn-Sham density, as the orbitals have it.
        software: what computed it, with the version.
        seconds: how long it took.
        gap: of the Kohn-Sham orbitals, the lowest empty minus the highest occupied, in hartree; NaN if unknown.
    """

    geometry: Geometry
    settings: ChemistrySettings
    basis: DensityBasis
    overlap: Tensor
    coulomb: Tensor
    external: Tensor
    reference: Tensor
    guess: Tensor
    points: Tensor
    quadrature: Tensor
    energy: float
    repulsion: float
    kinetic: float
    exchange_correlation: float
    attraction: float
    hartree: float
    software: str
    seconds: float
    gap: float = math.nan

    @property
    def doubt(self) -> str:
        """Warnings about the Kohn-Sham calculation; empty if there are none."""
        if not self.gap < NARROW:
            return ""
        return (
            f"the lowest empty orbital is only {self.gap:.3f} hartree above the highest occupied one: this is a closed "
            "shell, and an open shell may have less energy"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without the basis."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def on_grid(self, level: int) -> Record:
        """The same record on a grid of another level.

        Raises:
            UserError: PySCF, which makes the grid, is missing.
        """
        points, quadrature = grid_of(self.geometry, level)
        return replace(self, points=points, quadrature=quadrature, settings=replace(self.settings, grid=level))

    def molecule(self) -> Molecule:
        """The data that a density functional needs, in float64."""
        return self._molecule(OnGrid(self.basis, self.points))

    def molecule_without_grid(self) -> Molecule:
        """The same data without grid points: only the analytic part."""
        nothing = self.overlap.new_zeros(4, 0, len(self.overlap))
        short = replace(self, points=self.points[:0].clone(), quadrature=self.quadrature[:0].clone())
        return short._molecule(OnGrid.of(nothing[0], nothing[1:]))

    def _molecule(self, basis: OnGrid) -> Molecule:
        return Molecule(
            name=self.geometry.name,
            charges=torch.tensor(self.geometry.charges),
            positions=torch.tensor(self.geometry.positions, dtype=torch.float64),
            electrons=torch.tensor(float(self.geometry.electrons), dtype=torch.float64),
            weight=self.basis.integrals(),
            atom=self.basis.spread(self.basis.atom),
            angular=self.basis.spread(self.basis.angular),
            shell=self.basis.spread(self.basis.numbers()),
            basis=basis,
            **self.tensors(),
            **{
                name: torch.tensor(getattr(self, name), dtype=torch.float64)
                for name in ("energy", "repulsion", "kinetic", "exchange_correlation")
            },
        )
