"""Kohn-Sham calculations by PySCF."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.integrals import (
    Array,
    attraction,
    basis_of,
    check_bases,
    check_functional,
    density_basis,
    grid,
    made,
    potentials,
    three_centre,
)
from torchimplicit.recipes.density.record import Record
from torchimplicit.recipes.density.settings import ChemistrySettings

_FAILURES = (ArithmeticError, RuntimeError, ValueError, KeyError, MemoryError, np.linalg.LinAlgError)
"""Exceptions that PySCF raises when a calculation fails."""


class NotComputedError(Exception):
    """A calculation that failed, with the molecule and the reason."""


@contextmanager
def computing() -> Iterator[None]:
    """Turn PySCF's exceptions into a :class:`NotComputedError`."""
    try:
        yield
    except _FAILURES as error:
        raise NotComputedError(f"PySCF fails with {type(error).__name__}: {error}") from error


@computing()
def compute(geometry: Geometry, settings: ChemistrySettings) -> Record:
    """Run the Kohn-Sham calculation of a molecule and derive everything that a density functional needs of it.

    Raises:
        NotComputedError: the iteration does not converge, or PySCF fails.
        UserError: see :func:`check_functional` and :func:`check_bases`.
    """
    check_functional(settings.functional)
    check_bases(geometry, settings)
    began = time.monotonic()
    mol = made(geometry, settings.orbital_basis)
    atoms = superposition(mol)
    field = kohn_sham(mol, settings, atoms)
    orbitals = field.make_rdm1()
    energies = field.get_veff(dm=orbitals)
    return replace(
        _record_of(geometry, settings, mol, [orbitals, atoms]),
        energy=float(field.e_tot),
        kinetic=float(np.vdot(mol.intor("int1e_kin"), orbitals)),
        exchange_correlation=float(energies.exc),
        attraction=float(np.vdot(mol.intor("int1e_nuc"), orbitals)),
        hartree=float(energies.ecoul),
        seconds=time.monotonic() - began,
        gap=orbital_gap(field.mo_energy, geometry.electrons),
    )


@computing()
def unsolved(geometry: Geometry, settings: ChemistrySettings) -> Record:
    """Everything a density functional needs to find a molecule's density, without a Kohn-Sham calculation: the energies
    and the reference density are NaN.

    Raises:
        NotComputedError: PySCF fails.
        UserError: see :func:`check_bases`.
    """
    check_bases(geometry, settings)
    mol = made(geometry, settings.orbital_basis)
    return _record_of(geometry, settings, mol, [superposition(mol)])


def superposition(mol: Any) -> Array:
    """The density matrix of the superposition of atoms (MINAO), ``[orbitals, orbitals]``."""
    from pyscf import dft

    return np.asarray(dft.RKS(mol).get_init_guess(key="minao"))


def kohn_sham(mol: Any, settings: ChemistrySettings, guess: Array) -> Any:
    """PySCF's converged calculation.

    Args:
        mol: PySCF's molecule.
        guess: the density matrix to begin at, ``[orbitals, orbitals]``.

    Raises:
        NotComputedError: it does not converge.
    """
    from pyscf import dft

    field = dft.RKS(mol, xc=settings.functional)
    field.conv_tol, field.max_cycle = settings.scf_tolerance, settings.scf_cycles
    field.grids.level = settings.scf_grid
    field.kernel(dm0=guess)
    if not field.converged:
        raise NotComputedError(
            f"the Kohn-Sham iteration did not converge to {settings.scf_tolerance:g} hartree in {settings.scf_cycles} "
            "cycles; allow it more --scf-cycles, or look at the geometry; open shells, such as those of O2, of most "
            "single atoms and of broken bonds, are not supported"
        )
    return field


def orbital_gap(energies: Array, electrons: int) -> float:
    """How far the lowest empty orbital is above the highest occupied one; infinite if none is empty.

    Args:
        energies: of the orbitals, ascending, ``[orbitals]``.
        electrons: how many, two to an orbital.
    """
    occupied = electrons // 2
    return float(energies[occupied] - energies[occupied - 1]) if occupied < len(energies) else math.inf


def _record_of(geometry: Geometry, settings: ChemistrySettings, mol: Any, densities: list[Array]) -> Record:
    """Build the record, without energies: fits of the orbitals' density, if there is one, and of the superposition of
    atoms."""
    import pyscf

    fitting = density_basis(mol, settings)
    basis = basis_of(fitting)
    coulomb, external = fitting.intor("int2c2e"), attraction(mol, fitting)
    nuclear = mol.intor("int1e_nuc")
    held = np.array([[geometry.electrons] * len(densities), [float(np.vdot(nuclear, one)) for one in densities]])
    conditions = np.stack([basis.integrals().numpy(), external], axis=1)
    fitted = constrained_fit(coulomb, potentials(three_centre(mol, fitting), densities), conditions, held)
    points, quadrature = grid(mol, settings.grid)
    unknown: dict[str, Any] = dict.fromkeys(
        ("energy", "kinetic", "exchange_correlation", "attraction", "hartree", "seconds"), math.nan
    )
    arrays = {
        "overlap": fitting.intor("int1e_ovlp"),
        "coulomb": coulomb,
        "external": external,
        "guess": fitted[:, -1],
        "points": points,
        "quadrature": quadrature,
    }
    for name, array in [*arrays.items(), ("reference", fitted[:, 0])]:
        if not np.isfinite(array).all():
            raise NotComputedError(f"{name} has values that are not finite")
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return Record(
        geometry=geometry,
        settings=settings,
        basis=basis,
        repulsion=float(mol.energy_nuc()),
        reference=torch.from_numpy(fitted[:, 0].copy() if len(densities) > 1 else np.full(len(fitted), math.nan)),
        **unknown,
        software=f"PySCF {pyscf.__version__}",
        **tensors,
    )


def constrained_fit(coulomb: Array, potential: Array, constraints: Array, values: Array) -> Array:
    """The coefficients whose error has the least Coulomb energy, among those with given integrals.

    The minimum of :math:`\\tfrac12\\langle p,Jp\\rangle-\\langle b,p\\rangle` under :math:`C^\\top p=c` (Dunlap,
    Connolly, Sabin, J. Chem. Phys. 71, 3396 (1979), who hold the number of electrons):

    .. math:: \\begin{pmatrix}J&C\\\\ C^\\top&0\\end{pmatrix}\\begin{pmatrix}p\\\\ \\lambda\\end{pmatrix}
              =\\begin{pmatrix}b\\\\ c\\end{pmatrix}

    Args:
        coulomb: J, ``[n, n]``, positive definite.
        potential: b, ``[n, k]``: the Coulomb energies of the basis functions with each of k densities.
        constraints: C, ``[n, m]``: what is held of each basis function, such as its integral.
        values: c, ``[m, k]``: what each density has of it, such as its number of electrons.

    Returns:
        p, ``[n, k]``.
    """
    from scipy.linalg import solve  # heavy, and settings are made without it

    n, m = constraints.shape
    matrix = np.block([[coulomb, constraints], [constraints.T, np.zeros((m, m))]])
    coefficients: Array = solve(matrix, np.concatenate([potential, values]), assume_a="sym")[:n]
    return coefficients
