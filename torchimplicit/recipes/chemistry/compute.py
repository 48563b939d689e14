"""Kohn-Sham calculations and integrals, by PySCF."""

from __future__ import annotations

import time
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchimplicit.recipes.chemistry.density_basis import DensityBasis
from torchimplicit.recipes.chemistry.elements import symbol
from torchimplicit.recipes.chemistry.fit import constrained_fit
from torchimplicit.recipes.chemistry.geometry import Geometry
from torchimplicit.recipes.chemistry.record import Record
from torchimplicit.recipes.chemistry.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError

Array = NDArray[np.float64]

AT_ONCE = 100
"""Basis functions whose three-centre integrals are in memory together."""


class NotComputedError(Exception):
    """A calculation that failed: which molecule, and why."""


def need_pyscf() -> None:
    """Only what computes needs PySCF; reading what was computed does not.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("pyscf") is None:
        raise UserError(
            "computing molecules needs PySCF (not installed; it runs on Linux and macOS); run: "
            "pip install 'torchimplicit[chemistry]'"
        )


def check_functional(name: str) -> None:
    """Whether PySCF knows a functional of the density by this name.

    Raises:
        UserError: PySCF is missing or does not know it, or it depends on more than
            the density and its gradient.
    """
    need_pyscf()
    from pyscf.dft import libxc

    try:
        local = libxc.parse_xc(name)[1] and libxc.xc_type(name) in ("LDA", "GGA")
        local = local and not libxc.is_hybrid_xc(name) and not libxc.is_nlc(name)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"--functional: PySCF knows no '{name}' ({error})") from None
    if not local:
        raise UserError(
            f"--functional {name} is none of the density and its gradient alone: it has exact exchange, the kinetic "
            "energy density or a non-local correlation; take lda,pw or pbe, for instance"
        )


def check_bases(geometry: Geometry, settings: ChemistrySettings) -> None:
    """Whether every element has its orbitals.

    Raises:
        UserError: PySCF is missing, or its basis of that name has nothing for an element.
    """
    need_pyscf()
    from pyscf.gto import basis
    from pyscf.lib.exceptions import BasisNotFoundError

    for element in dict.fromkeys(map(symbol, geometry.charges)):
        try:
            with warnings.catch_warnings(action="ignore"):  # that another package may have the basis
                basis.load(settings.orbital_basis, element)
        except (BasisNotFoundError, KeyError, RuntimeError, OSError):
            raise UserError(
                f"PySCF's basis {settings.orbital_basis} has nothing for {element}; choose another --orbital-basis"
            ) from None


def compute(geometry: Geometry, settings: ChemistrySettings) -> Record:
    """The Kohn-Sham calculation of a molecule, and everything that a density functional needs of it.

    Raises:
        NotComputedError: the iteration does not converge, or PySCF fails.
        UserError: see :func:`check_functional` and :func:`check_bases`.
    """
    check_functional(settings.functional)
    check_bases(geometry, settings)
    try:
        return _compute(geometry, settings)
    except (ArithmeticError, RuntimeError, ValueError, KeyError, MemoryError, np.linalg.LinAlgError) as error:
        raise NotComputedError(f"PySCF fails with {type(error).__name__}: {error}") from error


def _compute(geometry: Geometry, settings: ChemistrySettings) -> Record:
    import pyscf
    from pyscf import df, dft, gto

    began = time.monotonic()
    atoms = [(symbol(charge), place) for charge, place in zip(geometry.charges, geometry.positions, strict=True)]
    mol = gto.M(atom=atoms, unit="Bohr", basis=settings.orbital_basis, charge=geometry.charge, verbose=0)
    field = dft.RKS(mol, xc=settings.functional)
    field.conv_tol, field.max_cycle = settings.scf_tolerance, settings.scf_cycles
    field.grids.level = settings.scf_grid
    guess = field.get_init_guess(key="minao")
    field.kernel(dm0=guess)
    if not field.converged:
        raise NotComputedError(
            f"the Kohn-Sham iteration did not converge to {settings.scf_tolerance:g} hartree in {settings.scf_cycles} "
            "cycles"
        )
    orbitals = field.make_rdm1()

    fitting = df.addons.make_auxmol(mol, df.aug_etb(mol, beta=settings.beta))
    basis = _basis(fitting)
    weight = basis.integrals().numpy()
    coulomb = fitting.intor("int2c2e")
    potential = _potentials(mol, fitting, [orbitals, guess])
    fitted = constrained_fit(coulomb, potential, weight, geometry.electrons)
    points, quadrature = _grid(mol, settings.grid)

    found = {
        "overlap": fitting.intor("int1e_ovlp"),
        "coulomb": coulomb,
        "external": _attraction(mol, fitting),
        "reference": fitted[:, 0],
        "guess": fitted[:, 1],
        "points": points,
        "quadrature": quadrature,
    }
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise NotComputedError(f"{name} has values that are not finite")
    energies = field.get_veff(dm=orbitals)
    return Record(
        geometry=geometry,
        settings=settings,
        basis=basis,
        energy=float(field.e_tot),
        repulsion=float(mol.energy_nuc()),
        kinetic=float(np.vdot(mol.intor("int1e_kin"), orbitals)),
        exchange_correlation=float(energies.exc),
        attraction=float(np.vdot(mol.intor("int1e_nuc"), orbitals)),
        hartree=float(energies.ecoul),
        software=f"PySCF {pyscf.__version__}",
        seconds=time.monotonic() - began,
        **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()},
    )


def _basis(fitting: Any) -> DensityBasis:
    """PySCF's even-tempered basis: uncontracted, and spherical."""
    shells = range(fitting.nbas)
    assert all(fitting.bas_nprim(shell) == 1 == fitting.bas_nctr(shell) for shell in shells)
    return DensityBasis(
        centres=torch.from_numpy(fitting.atom_coords().copy()),
        atom=torch.tensor([int(fitting.bas_atom(shell)) for shell in shells]),
        angular=torch.tensor([int(fitting.bas_angular(shell)) for shell in shells]),
        exponent=torch.tensor([float(fitting.bas_exp(shell)[0]) for shell in shells], dtype=torch.float64),
    )


def _potentials(mol: Any, fitting: Any, densities: list[Array]) -> Array:
    """Every fitting function's Coulomb energy with each density of orbitals, ``[n, len(densities)]``."""
    from pyscf import df

    # of the symmetric matrices only the lower triangles, with what is off the diagonal twice
    rows, columns = np.tril_indices(mol.nao)
    twice = np.where(rows == columns, 1.0, 2.0)
    packed = np.stack([density[rows, columns] * twice for density in densities], axis=1)
    found, start, place = [], 0, fitting.ao_loc_nr()
    while start < fitting.nbas:
        stop = max(start + 1, int(np.searchsorted(place, place[start] + AT_ONCE, side="right")) - 1)
        part = (0, mol.nbas, 0, mol.nbas, start, stop)
        integrals = df.incore.aux_e2(mol, fitting, "int3c2e", aosym="s2ij", shls_slice=part)
        found.append(integrals.T @ packed)
        start = stop
    return np.concatenate(found)


def _attraction(mol: Any, fitting: Any) -> Array:
    """:math:`\\int\\omega_iv_{ext}`: the Coulomb energy with the nuclei, which are Gaussians of exponent 1e16."""
    from pyscf import gto

    nuclei = gto.fakemol_for_charges(mol.atom_coords())
    found: Array = -gto.intor_cross("int2c2e", fitting, nuclei) @ mol.atom_charges()
    return found


def _grid(mol: Any, level: int) -> tuple[Array, Array]:
    """Becke's grid: points and weights, without the points that only fill up a block."""
    from pyscf import dft

    grid = dft.gen_grid.Grids(mol)
    grid.level = level
    grid.build()
    keep = grid.weights != 0
    return grid.coords[keep], grid.weights[keep]
