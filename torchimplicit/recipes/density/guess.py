"""A density as the initial guess of a Kohn-Sham calculation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.recipes.density.integrals import (
    Array,
    coulomb_matrix,
    density_basis,
    exchange_correlation,
    made,
    orbitals_on_grid,
    three_centre,
)
from torchimplicit.recipes.density.record import Record


def density_matrix(p: Tensor, record: Record) -> Array:
    """The density matrix ``[orbitals, orbitals]`` of the orbitals in the potential of a density.

    One diagonalization of the Kohn-Sham matrix that the density gives (Harris 1985): unlike the density itself, it has
    orbitals that a calculation can begin at.

    Args:
        p: coefficients of the density, ``[n]``.
        record: record of the molecule.

    Raises:
        UserError: PySCF is missing.
    """
    from pyscf import dft

    mol = made(record.geometry, record.settings.orbital_basis)
    field = dft.RKS(mol, xc=record.settings.functional)
    field.grids.level = record.settings.scf_grid
    field.grids.build()
    integrals = three_centre(mol, density_basis(mol, record.settings))
    matrix = field.get_hcore() + coulomb_matrix(integrals, p.numpy())
    rho = OnGrid(record.basis, torch.from_numpy(np.ascontiguousarray(field.grids.coords)))(p).numpy()
    rho[0] = rho[0].clip(min=0)  # a fitted density may dip below
    if field._numint._xc_type(field.xc) == "LDA":
        rho = rho[0]
    for part, orbitals in orbitals_on_grid(field):
        matrix = matrix + exchange_correlation(field, part, orbitals, rho[..., part])[2]
    energies, orbitals = field.eig(matrix, field.get_ovlp())
    density: Array = np.asarray(field.make_rdm1(orbitals, field.get_occ(energies, orbitals)))
    return density
