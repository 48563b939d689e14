"""A density as the initial guess of a Kohn-Sham calculation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.recipes.density.integrals import density_basis, made, three_centre
from torchimplicit.recipes.density.record import Record

Array = NDArray[np.float64]


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

    field = dft.RKS(made(record.geometry, record.settings.orbital_basis), xc=record.settings.functional)
    field.grids.level = record.settings.scf_grid
    matrix = field.get_hcore() + _coulomb(field.mol, p, record) + _exchange_correlation(field, p, record)
    energies, orbitals = field.eig(matrix, field.get_ovlp())
    density: Array = np.asarray(field.make_rdm1(orbitals, field.get_occ(energies, orbitals)))
    return density


def _coulomb(mol: Any, p: Tensor, record: Record) -> Array:
    """Coulomb energy of the density with every pair of orbitals."""
    fitting, total = density_basis(mol, record.settings), np.zeros((mol.nao, mol.nao))
    for which, integrals in three_centre(mol, fitting):
        total += integrals @ p[which].numpy()
    return total


def _exchange_correlation(field: Any, p: Tensor, record: Record) -> Array:
    """The potential of the density between every pair of orbitals."""
    from pyscf.dft import libxc

    field.grids.build()
    points = torch.from_numpy(np.ascontiguousarray(field.grids.coords))
    fields = OnGrid(record.basis, points)(p)
    rho, slopes = fields[0].clamp_min(0).numpy(), fields[1:].numpy()
    local = libxc.xc_type(field.xc) == "LDA"
    by = libxc.eval_xc(field.xc, rho if local else np.vstack([rho[None], slopes]))[1]  # rho, and sigma if it counts
    orbitals = field._numint.eval_ao(field.mol, field.grids.coords, deriv=0 if local else 1)
    weights = field.grids.weights
    if local:
        return np.asarray(orbitals.T @ ((weights * by[0])[:, None] * orbitals))
    half = (0.5 * weights * by[0])[:, None] * orbitals[0]
    half += np.einsum("p,xp,xpn->pn", 2 * weights * by[1], slopes, orbitals[1:])
    matrix = orbitals[0].T @ half
    return np.asarray(matrix + matrix.T)
