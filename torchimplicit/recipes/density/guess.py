"""A density as the start of a Kohn-Sham calculation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.density.compute import Record, density_basis, made

Array = NDArray[np.float64]

AT_ONCE = 100
"""Basis functions whose three-centre integrals are in memory together."""


def density_matrix(p: Tensor, record: Record) -> Array:
    """The density matrix ``[orbitals, orbitals]`` of the orbitals in the potential of a density.

    One diagonalization of the Kohn-Sham matrix that the density gives (Harris 1985): unlike the density itself, it has
    orbitals that a calculation can begin at.

    Args:
        p: coefficients of the density, ``[n]``.
        record: of the molecule.

    Raises:
        UserError: PySCF is missing.
    """
    from pyscf import dft

    field = dft.RKS(made(record.geometry, record.settings.orbital_basis), xc=record.settings.functional)
    field.grids.level = record.settings.scf_grid
    matrix = field.get_hcore() + _coulomb(field.mol, p, record) + _exchange_correlation(field, p, record)
    energies, orbitals = field.eig(matrix, field.get_ovlp())
    found: Array = np.asarray(field.make_rdm1(orbitals, field.get_occ(energies, orbitals)))
    return found


def _coulomb(mol: Any, p: Tensor, record: Record) -> Array:
    """Of the density with every pair of orbitals."""
    from pyscf import df

    fitting = density_basis(mol, record.settings)
    total, place, start = 0.0, fitting.ao_loc_nr(), 0
    while start < fitting.nbas:
        stop = max(start + 1, int(np.searchsorted(place, place[start] + AT_ONCE, side="right")) - 1)
        part = (0, mol.nbas, 0, mol.nbas, start, stop)
        total = (
            total + df.incore.aux_e2(mol, fitting, "int3c2e", shls_slice=part) @ p[place[start] : place[stop]].numpy()
        )
        start = stop
    return np.asarray(total)


def _exchange_correlation(field: Any, p: Tensor, record: Record) -> Array:
    """The potential of the density between every pair of orbitals."""
    from pyscf.dft import libxc

    field.grids.build()
    points = torch.from_numpy(np.ascontiguousarray(field.grids.coords))
    values, gradients = record.basis.evaluate(points)
    rho, slopes = (values @ p).clamp_min(0).numpy(), (gradients @ p).numpy()
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
