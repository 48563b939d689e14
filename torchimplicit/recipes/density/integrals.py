"""PySCF's molecules, bases, grids and integrals."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.recipes.density.chemistry import Geometry, symbol
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError

Array = NDArray[np.float64]

AT_ONCE = 100
"""Number of basis functions whose three-centre integrals are in memory together."""

POINTS_AT_ONCE = 4096
"""Number of grid points whose orbitals are in memory together."""

# -- What PySCF has ----------------------------------------------------------------------------------------------------


def need_pyscf() -> None:
    """Raise if PySCF is missing. Only computations need it, not reading computed files.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("pyscf") is None:
        raise UserError(
            "computing molecules needs PySCF (not installed; it runs on Linux and macOS); run: "
            "pip install 'torchimplicit[chemistry]'"
        )


def check_functional(name: str) -> None:
    """Check that PySCF knows a density functional by this name.

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
    """Check that the basis covers every element.

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


# -- A molecule, its grid and its density's basis ----------------------------------------------------------------------


def made(geometry: Geometry, basis: str) -> Any:
    """PySCF's molecule."""
    from pyscf import gto

    atoms = [(symbol(charge), place) for charge, place in zip(geometry.charges, geometry.positions, strict=True)]
    return gto.M(atom=atoms, unit="Bohr", basis=basis, charge=geometry.charge, verbose=0)


def grid(mol: Any, level: int) -> tuple[Array, Array]:
    """Becke's grid: points and weights, without padding points."""
    from pyscf import dft

    grid = dft.gen_grid.Grids(mol)
    grid.level = level
    grid.build()
    keep = grid.weights != 0
    return grid.coords[keep], grid.weights[keep]


def grid_of(geometry: Geometry, level: int) -> tuple[Tensor, Tensor]:
    """Points ``[points, 3]``, in bohr, and weights ``[points]`` of PySCF's grid of a level for a molecule.

    Raises:
        UserError: PySCF is missing.
    """
    need_pyscf()
    points, weights = grid(made(geometry, "sto-3g"), level)  # which orbitals there are does not matter
    return torch.from_numpy(np.ascontiguousarray(points)), torch.from_numpy(np.ascontiguousarray(weights))


def density_basis(mol: Any, settings: ChemistrySettings) -> Any:
    """PySCF's even-tempered functions for a density, as a PySCF molecule."""
    from pyscf import df

    return df.addons.make_auxmol(mol, df.aug_etb(mol, beta=settings.beta))


def basis_of(fitting: Any) -> DensityBasis:
    """PySCF's even-tempered basis: uncontracted, and spherical."""
    shells = range(fitting.nbas)
    assert all(fitting.bas_nprim(shell) == 1 == fitting.bas_nctr(shell) for shell in shells)
    return DensityBasis(
        centres=torch.from_numpy(fitting.atom_coords().copy()),
        atom=torch.tensor([int(fitting.bas_atom(shell)) for shell in shells]),
        angular=torch.tensor([int(fitting.bas_angular(shell)) for shell in shells]),
        exponent=torch.tensor([float(fitting.bas_exp(shell)[0]) for shell in shells], dtype=torch.float64),
    )


# -- Integrals ---------------------------------------------------------------------------------------------------------


def attraction(mol: Any, fitting: Any) -> Array:
    """:math:`\\int\\omega_iv_{ext}`: the Coulomb energy with the nuclei, which are Gaussians of exponent 1e16."""
    from pyscf import gto

    nuclei = gto.fakemol_for_charges(mol.atom_coords())
    integrals: Array = -gto.intor_cross("int2c2e", fitting, nuclei) @ mol.atom_charges()
    return integrals


def three_centre(mol: Any, fitting: Any) -> Iterator[tuple[slice, Array]]:
    """The Coulomb integrals of two orbitals and a fitting function, in blocks of about :data:`AT_ONCE` fitting
    functions.

    Yields:
        which fitting functions, and their integrals ``[pairs, k]`` with each pair of orbitals, taken once: those of the
        lower triangle, row by row.
    """
    from pyscf import df

    start, place = 0, fitting.ao_loc_nr()
    while start < fitting.nbas:
        stop = max(start + 1, int(np.searchsorted(place, place[start] + AT_ONCE, side="right")) - 1)
        part = (0, mol.nbas, 0, mol.nbas, start, stop)
        yield (
            slice(place[start], place[stop]),
            df.incore.aux_e2(mol, fitting, "int3c2e", aosym="s2ij", shls_slice=part),
        )
        start = stop


def potentials(integrals: Iterable[tuple[slice, Array]], densities: Sequence[Array]) -> Array:
    """Every fitting function's Coulomb energy with each density of orbitals, ``[n, len(densities)]``.

    Args:
        integrals: see :func:`three_centre`.
        densities: density matrices, ``[orbitals, orbitals]`` each.
    """
    rows, columns = np.tril_indices(len(densities[0]))
    twice = np.where(rows == columns, 1.0, 2.0)  # a pair stands for both of its orders
    packed = np.stack([density[rows, columns] * twice for density in densities], axis=1)
    return np.concatenate([block.T @ packed for _, block in integrals])


def coulomb_matrix(integrals: Iterable[tuple[slice, Array]], p: Array) -> Array:
    """The Coulomb potential of a fitted density (``[n]``) between orbitals, ``[orbitals, orbitals]``.

    Args:
        integrals: see :func:`three_centre`.
        p: coefficients.
    """
    from pyscf.lib import unpack_tril

    matrix: Array = unpack_tril(sum(block @ p[which] for which, block in integrals))
    return matrix


# -- Exchange and correlation on PySCF's grid --------------------------------------------------------------------------


def orbitals_on_grid(field: Any) -> Iterator[tuple[slice, Array]]:
    """The orbitals' basis functions and their derivatives in x, y, z, some points of the calculation's grid at a time.

    Yields:
        which points, and ``[4, points, orbitals]``.
    """
    for start in range(0, len(field.grids.weights), POINTS_AT_ONCE):
        part = slice(start, start + POINTS_AT_ONCE)
        yield part, field.mol.eval_gto("GTOval_sph_deriv1", field.grids.coords[part])


def exchange_correlation(field: Any, part: slice, orbitals: Array, rho: Array) -> tuple[float, Array, Array]:
    """Exchange and correlation of a density at some points.

    Args:
        field: PySCF's calculation, with its functional and its grid.
        part: which points.
        orbitals: see :func:`orbitals_on_grid`.
        rho: the density there, ``[points]``; with its derivatives in x, y, z, ``[4, points]``, for a functional of
            them.

    Returns:
        the energy; the weighted derivatives of its density in ``rho``, ``[1 or 4, points]``; and the potential between
        orbitals, ``[orbitals, orbitals]``.
    """
    numint, weights = field._numint, field.grids.weights[part]
    energy, first = numint.eval_xc_eff(field.xc, rho, deriv=1, xctype=numint._xc_type(field.xc))[:2]
    first = weights * np.atleast_2d(first)
    half = 0.5 * first[0][:, None] * orbitals[0] + np.einsum("xg,xgi->gi", first[1:], orbitals[1 : len(first)])
    half = orbitals[0].T @ half
    return float(weights * np.atleast_2d(rho)[0] @ energy), first, half + half.T
