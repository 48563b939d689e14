"""Molecules computed by PySCF, as records on disk."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.recipes.density.chemistry import Geometry, constrained_fit, symbol
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import DamagedFileError, UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.settings import to_plain

# -- The basis of a density: Gaussians times real solid harmonics, evaluated anywhere ----------------------------------
#
# The functions are those of PySCF, in its order, so that a data file needs to hold their exponents only: their values
# on
# a grid, along a line or on a plane are made here, without PySCF.


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DensityBasis:
    """Shells of 2l+1 functions each, :math:`N\\,S_{lm}(r-R)\\,e^{-a|r-R|^2}`, normalized in :math:`L^2`.

    Within a shell m runs from -l to l, but for l=1, which is in the order x, y, z.

    Attributes:
        centres: where the atoms are, ``[atoms, 3]``, in bohr.
        atom: at which atom each shell sits, ``[shells]``, integers.
        angular: its angular momentum l, ``[shells]``, integers.
        exponent: its a, ``[shells]``, in 1/bohr².
    """

    centres: Tensor
    atom: Tensor
    angular: Tensor
    exponent: Tensor

    @property
    def sizes(self) -> Tensor:
        """How many functions each shell has, ``[shells]``."""
        return 2 * self.angular + 1

    def spread(self, of_shells: Tensor) -> Tensor:
        """A figure of every shell as one of every function, ``[n]``."""
        return of_shells.repeat_interleave(self.sizes)

    def numbers(self) -> Tensor:
        """Of every shell among those of the same l at the same atom, the tightest being 0, ``[shells]``."""
        alike = (self.atom[:, None] == self.atom) & (self.angular[:, None] == self.angular)
        return (alike & (self.exponent > self.exponent[:, None])).sum(dim=1)

    def integrals(self) -> Tensor:
        """:math:`\\int\\omega_i`, ``[n]``: nought but for s functions, :math:`N\\,(\\pi/a)^{3/2}\\,S_{00}`."""
        whole = _norm(self.exponent, 0) * (math.pi / self.exponent) ** 1.5 / math.sqrt(4 * math.pi)
        return self.spread(torch.where(self.angular == 0, whole, 0.0))

    def values(self, points: Tensor) -> Tensor:
        """The functions at ``points`` (``[points, 3]``, in bohr): ``[points, n]``."""
        return self.evaluate(points)[0]

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The functions and their derivatives.

        Args:
            points: ``[points, 3]``, in bohr.

        Returns:
            values ``[points, n]`` and derivatives in x, y and z ``[3, points, n]``.
        """
        offsets = torch.cat([self.sizes.new_zeros(1), self.sizes.cumsum(0)]).tolist()
        values = points.new_empty(len(points), offsets[-1])
        gradients = points.new_empty(3, len(points), offsets[-1])
        for atom, centre in enumerate(self.centres):
            shells = (self.atom == atom).nonzero().flatten().tolist()
            if not shells:
                continue
            r = (points - centre).T
            square = (r * r).sum(dim=0)
            harmonics = solid_harmonics(r, int(self.angular[shells].max()))
            for shell in shells:
                l, a = int(self.angular[shell]), float(self.exponent[shell])
                radial = float(_norm(self.exponent[shell], l)) * torch.exp(-a * square)
                S, dS = harmonics[l][0], harmonics[l][1:]
                part = slice(offsets[shell], offsets[shell + 1])
                values[:, part] = (S * radial).T
                gradients[:, :, part] = ((dS - 2 * a * r[:, None] * S) * radial).transpose(1, 2)
        return values, gradients


def _norm(exponent: Tensor, l: int) -> Tensor:
    """So that :math:`\\int_0^\\infty r^{2l+2}N^2e^{-2ar^2}dr=1`."""
    return torch.sqrt(2 * (2 * exponent) ** (l + 1.5) / math.gamma(l + 1.5))


def solid_harmonics(r: Tensor, largest: int) -> list[Tensor]:
    """The real regular solid harmonics :math:`r^lY_{lm}` with their derivatives, by recursion in l.

    Helgaker, Jørgensen, Olsen, Molecular Electronic-Structure Theory (2000), eqs. 6.4.70-6.4.72, for harmonics of
    Racah's norm; here multiplied by :math:`\\sqrt{(2l+1)/4\\pi}`, so that they are orthonormal on the unit sphere.

    Args:
        r: ``[3, points]``.
        largest: the last l.

    Returns:
        for every l the values, then the derivatives in x, y and z: ``[4, 2l+1, points]``, m in the order of
        :class:`DensityBasis`.
    """
    square = torch.cat([(r * r).sum(dim=0, keepdim=True), 2 * r])
    coordinates = torch.stack(
        [torch.cat([r[i : i + 1], torch.eye(3).to(r)[i, :, None].expand_as(r)]) for i in range(3)]
    )

    def times(factor: Tensor, jet: Tensor) -> Tensor:
        """The product of two functions that are given with their derivatives, ``[4, points]``."""
        return torch.cat([factor[:1] * jet[:1], factor[1:] * jet[:1] + factor[:1] * jet[1:]])

    x, y, z = coordinates
    first = torch.zeros_like(square)
    first[0] = 1
    tables: list[dict[int, Tensor]] = [{0: first}]
    for l in range(largest):
        last = tables[l]
        c = math.sqrt((2 * l + 1) / (2 * l + 2))
        if l == 0:
            new = {1: x, -1: y}
        else:
            new = {
                l + 1: c * (times(x, last[l]) - times(y, last[-l])),
                -l - 1: c * (times(y, last[l]) + times(x, last[-l])),
            }
        for m in range(-l, l + 1):
            risen = (2 * l + 1) * times(z, last[m])
            if abs(m) < l:
                risen = risen - math.sqrt((l + m) * (l - m)) * times(square, tables[l - 1][m])
            new[m] = risen / math.sqrt((l + m + 1) * (l - m + 1))
        tables.append(new)
    found = []
    for l, table in enumerate(tables):
        order = (1, -1, 0) if l == 1 else range(-l, l + 1)
        found.append(math.sqrt((2 * l + 1) / (4 * math.pi)) * torch.stack([table[m] for m in order], dim=1))
    return found


# -- Kohn-Sham calculations and integrals, by PySCF --------------------------------------------------------------------


Array = NDArray[np.float64]

AT_ONCE = 100
"""Basis functions whose three-centre integrals are in memory together."""


_FAILURES = (ArithmeticError, RuntimeError, ValueError, KeyError, MemoryError, np.linalg.LinAlgError)
"""What PySCF raises where a calculation goes wrong."""


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
    except _FAILURES as error:
        raise NotComputedError(f"PySCF fails with {type(error).__name__}: {error}") from error


def unsolved(geometry: Geometry, settings: ChemistrySettings) -> Record:
    """What a density functional needs to find a molecule's density, without a Kohn-Sham calculation: the energies and
    the reference density are NaN.

    Raises:
        NotComputedError: PySCF fails.
        UserError: see :func:`check_bases`.
    """
    check_bases(geometry, settings)
    try:
        return _record_of(geometry, settings, [])
    except _FAILURES as error:
        raise NotComputedError(f"PySCF fails with {type(error).__name__}: {error}") from error


def _compute(geometry: Geometry, settings: ChemistrySettings) -> Record:
    began = time.monotonic()
    field = kohn_sham(geometry, settings)
    mol, orbitals = field.mol, field.make_rdm1()
    energies = field.get_veff(dm=orbitals)
    return replace(
        _record_of(geometry, settings, [orbitals]),
        energy=float(field.e_tot),
        kinetic=float(np.vdot(mol.intor("int1e_kin"), orbitals)),
        exchange_correlation=float(energies.exc),
        attraction=float(np.vdot(mol.intor("int1e_nuc"), orbitals)),
        hartree=float(energies.ecoul),
        seconds=time.monotonic() - began,
    )


def kohn_sham(geometry: Geometry, settings: ChemistrySettings, guess: Array | None = None) -> Any:
    """PySCF's converged calculation.

    Args:
        guess: the density matrix to begin at, ``[orbitals, orbitals]``; ``None``: the superposition of atoms (MINAO).

    Raises:
        NotComputedError: it does not converge.
    """
    from pyscf import dft

    field = dft.RKS(made(geometry, settings.orbital_basis), xc=settings.functional)
    field.conv_tol, field.max_cycle = settings.scf_tolerance, settings.scf_cycles
    field.grids.level = settings.scf_grid
    field.kernel(dm0=field.get_init_guess(key="minao") if guess is None else guess)
    if not field.converged:
        raise NotComputedError(
            f"the Kohn-Sham iteration did not converge to {settings.scf_tolerance:g} hartree in {settings.scf_cycles} "
            "cycles"
        )
    return field


def _record_of(geometry: Geometry, settings: ChemistrySettings, orbitals: list[Array]) -> Record:
    """With the fits of the orbitals' density, if there are any, and of the superposition of atoms; without energies."""
    import pyscf
    from pyscf import dft

    mol = made(geometry, settings.orbital_basis)
    fitting = density_basis(mol, settings)
    basis = _basis(fitting)
    coulomb, external = fitting.intor("int2c2e"), _attraction(mol, fitting)
    densities = [*orbitals, dft.RKS(mol).get_init_guess(key="minao")]
    nuclear = mol.intor("int1e_nuc")
    held = np.array([[geometry.electrons] * len(densities), [float(np.vdot(nuclear, one)) for one in densities]])
    conditions = np.stack([basis.integrals().numpy(), external], axis=1)
    fitted = constrained_fit(coulomb, _potentials(mol, fitting, densities), conditions, held)
    points, quadrature = _grid(mol, settings.grid)
    unknown: dict[str, Any] = dict.fromkeys(
        ("energy", "kinetic", "exchange_correlation", "attraction", "hartree", "seconds"), math.nan
    )
    found = {
        "overlap": fitting.intor("int1e_ovlp"),
        "coulomb": coulomb,
        "external": external,
        "guess": fitted[:, -1],
        "points": points,
        "quadrature": quadrature,
    }
    for name, array in [*found.items(), ("reference", fitted[:, 0])]:
        if not np.isfinite(array).all():
            raise NotComputedError(f"{name} has values that are not finite")
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}
    return Record(
        geometry=geometry,
        settings=settings,
        basis=basis,
        repulsion=float(mol.energy_nuc()),
        reference=torch.from_numpy(fitted[:, 0].copy() if orbitals else np.full(len(fitted), math.nan)),
        **unknown,
        software=f"PySCF {pyscf.__version__}",
        **tensors,
    )


def density_basis(mol: Any, settings: ChemistrySettings) -> Any:
    """PySCF's even-tempered functions for a density, as a molecule of its."""
    from pyscf import df

    return df.addons.make_auxmol(mol, df.aug_etb(mol, beta=settings.beta))


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
    # of the symmetric matrices only the lower triangles, with what is off the diagonal twice
    rows, columns = np.tril_indices(mol.nao)
    twice = np.where(rows == columns, 1.0, 2.0)
    packed = np.stack([density[rows, columns] * twice for density in densities], axis=1)
    return np.concatenate([integrals.T @ packed for _, integrals in three_centre(mol, fitting, aosym="s2ij")])


def three_centre(mol: Any, fitting: Any, **how: Any) -> Iterator[tuple[slice, Array]]:
    """The Coulomb integrals of two orbitals and a fitting function, some :data:`AT_ONCE` of the latter after the other.

    Args:
        how: see ``pyscf.df.incore.aux_e2``.

    Returns:
        which fitting functions, and their integrals: ``[orbitals, orbitals, k]``, or ``[pairs, k]`` with ``aosym``.
    """
    from pyscf import df

    start, place = 0, fitting.ao_loc_nr()
    while start < fitting.nbas:
        stop = max(start + 1, int(np.searchsorted(place, place[start] + AT_ONCE, side="right")) - 1)
        part = (0, mol.nbas, 0, mol.nbas, start, stop)
        yield slice(place[start], place[stop]), df.incore.aux_e2(mol, fitting, "int3c2e", shls_slice=part, **how)
        start = stop


def _attraction(mol: Any, fitting: Any) -> Array:
    """:math:`\\int\\omega_iv_{ext}`: the Coulomb energy with the nuclei, which are Gaussians of exponent 1e16."""
    from pyscf import gto

    nuclei = gto.fakemol_for_charges(mol.atom_coords())
    found: Array = -gto.intor_cross("int2c2e", fitting, nuclei) @ mol.atom_charges()
    return found


def grid_of(geometry: Geometry, level: int) -> tuple[Tensor, Tensor]:
    """Points ``[points, 3]``, in bohr, and weights ``[points]`` of PySCF's grid of a level for a molecule.

    Raises:
        UserError: PySCF is missing.
    """
    need_pyscf()
    points, weights = _grid(made(geometry, "sto-3g"), level)  # which orbitals there are does not matter
    return torch.from_numpy(np.ascontiguousarray(points)), torch.from_numpy(np.ascontiguousarray(weights))


def made(geometry: Geometry, basis: str) -> Any:
    """PySCF's molecule."""
    from pyscf import gto

    atoms = [(symbol(charge), place) for charge, place in zip(geometry.charges, geometry.positions, strict=True)]
    return gto.M(atom=atoms, unit="Bohr", basis=basis, charge=geometry.charge, verbose=0)


def _grid(mol: Any, level: int) -> tuple[Array, Array]:
    """Becke's grid: points and weights, without the points that only fill up a block."""
    from pyscf import dft

    grid = dft.gen_grid.Grids(mol)
    grid.level = level
    grid.build()
    keep = grid.weights != 0
    return grid.coords[keep], grid.weights[keep]


# -- What is kept of a computed molecule -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A molecule's matrices, grid, densities and energies; atomic units, float64.

    The basis on the grid is not among them: it is made again from the exponents, in less time than it takes to read.

    Attributes:
        geometry: of which molecule.
        settings: how it was computed.
        basis: of the density, n functions.
        overlap, coulomb, external, reference, guess, points, quadrature: see
            :class:`~torchimplicit.models.orbital_free.molecule.Molecule`.
        energy, repulsion, kinetic, exchange_correlation: likewise.
        attraction: of the nuclei on the Kohn-Sham density, as the orbitals have it.
        hartree: the Coulomb energy of the Kohn-Sham density, as the orbitals have it.
        software: what computed it, with the version.
        seconds: how long it took.
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

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those of the basis aside."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def on_grid(self, level: int) -> Record:
        """The same on a grid of another level.

        Raises:
            UserError: PySCF, which makes the grid, is missing.
        """
        points, quadrature = grid_of(self.geometry, level)
        return replace(self, points=points, quadrature=quadrature, settings=replace(self.settings, grid=level))

    def molecule(self) -> Molecule:
        """What a density functional needs of it, float64."""
        values, gradients = self.basis.evaluate(self.points)
        return Molecule(
            name=self.geometry.name,
            charges=torch.tensor(self.geometry.charges),
            positions=torch.tensor(self.geometry.positions, dtype=torch.float64),
            electrons=torch.tensor(float(self.geometry.electrons), dtype=torch.float64),
            weight=self.basis.integrals(),
            atom=self.basis.spread(self.basis.atom),
            angular=self.basis.spread(self.basis.angular),
            shell=self.basis.spread(self.basis.numbers()),
            values=values,
            gradients=gradients,
            **self.tensors(),
            **{
                name: torch.tensor(getattr(self, name), dtype=torch.float64)
                for name in ("energy", "repulsion", "kinetic", "exchange_correlation")
            },
        )


# -- A file of a computed molecule: numpy's .npz without pickles, with a checksum of its content -----------------------


FORMAT = "torchimplicit molecule"
VERSION = 2
"""Of the file's layout and of what its numbers mean."""

LARGEST_GROWTH = 200
"""When it is unpacked: floating-point numbers hardly shrink, and only the zeros of a symmetric molecule do."""

_BASIS = ("atom", "angular", "exponent")
_ARRAYS = ("overlap", "coulomb", "external", "reference", "guess", "points", "quadrature")
_FIGURES = ("energy", "repulsion", "kinetic", "exchange_correlation", "attraction", "hartree", "software", "seconds")


class BrokenFileError(DamagedFileError):
    """A file that cannot be used: it is damaged, of another version, or no molecule at all."""


def key(geometry: Geometry, settings: ChemistrySettings) -> str:
    """Of a calculation: the same for the same nuclei, charge, settings and format; 12 hexadecimal digits."""
    nuclei = {"charges": geometry.charges, "positions": geometry.positions, "charge": geometry.charge}
    asked = to_plain({"version": VERSION, "geometry": nuclei, "settings": settings})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def file_name(geometry: Geometry, settings: ChemistrySettings) -> str:
    """Under which the calculation is kept."""
    return f"{re.sub(r'[^A-Za-z0-9._+-]', '_', geometry.name)}-{key(geometry, settings)}.npz"


def write(path: Path, record: Record) -> None:
    """Write the file; whoever reads meanwhile finds the former one or this one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    tensors = record.tensors() | {name: getattr(record.basis, name) for name in _BASIS}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "geometry": to_plain(record.geometry),
        "settings": to_plain(record.settings),
        **{name: getattr(record, name) for name in _FIGURES},
    }
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
    digest = np.frombuffer(bytes.fromhex(_digest(text, arrays)), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, about=text, sha256=digest, **arrays)


def read(path: Path) -> Record:
    """What is in a file.

    Raises:
        BrokenFileError: it is damaged, of another version, or was not written by :func:`write`.
        UserError: there is no such file, or it may not be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: a molecule's data file is made by torchimplicit molecules")
    try:
        # opened here: numpy alone would take any bytes for a pickle, and say so
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            size = sum(one.file_size for one in archive.infolist())
        if size > LARGEST_GROWTH * (path.stat().st_size + 1024):
            raise BrokenFileError(_damaged(path, f"it would grow to {size} bytes"))
        if not {"about.npy", "sha256.npy"} <= names:
            raise BrokenFileError(
                f"{path} is no molecule's data file (it holds {', '.join(sorted(names)[:4]) or 'nothing'})"
            )
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        text, digest = arrays.pop("about"), arrays.pop("sha256")
        about = json.loads(text.tobytes().decode())
        if about.get("format") != FORMAT:
            raise BrokenFileError(f"{path} is no molecule's data file, but '{about.get('format')}'")
        if about["version"] != VERSION:
            raise BrokenFileError(
                f"{path} has version {about['version']} of the format, and this program reads version {VERSION}; "
                "compute it again: torchimplicit molecules"
            )
        if digest.tobytes().hex() != _digest(text, arrays):
            raise BrokenFileError(_damaged(path, "its content does not have the checksum inside"))
        return _record(about, arrays)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive, or what is damaged in it, raises nearly everything
        raise BrokenFileError(_damaged(path, " ".join(str(error).split()) or type(error).__name__)) from None


def load(path: Path) -> Molecule:
    """The molecule in a file, float64.

    Raises:
        UserError: see :func:`read`.
    """
    return read(path).molecule()


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): delete it and compute it again with torchimplicit molecules"


def _record(about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Record:
    geometry = Geometry(
        name=about["geometry"]["name"],
        charges=tuple(about["geometry"]["charges"]),
        positions=tuple((x, y, z) for x, y, z in about["geometry"]["positions"]),
        charge=about["geometry"]["charge"],
    )
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Record(
        geometry=geometry,
        settings=ChemistrySettings(**about["settings"]),
        basis=DensityBasis(
            centres=torch.tensor(geometry.positions, dtype=torch.float64), **{name: tensors[name] for name in _BASIS}
        ),
        **{name: tensors[name] for name in _ARRAYS},
        **{name: about[name] for name in _FIGURES},
    )


def _digest(text: NDArray[np.uint8], arrays: dict[str, NDArray[Any]]) -> str:
    """Of the description and of every array with its name, type and shape."""
    digest = hashlib.sha256(text.tobytes())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# -- Molecules computed once and kept: the files of many, made side by side, and what is read of them ------------------


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What the numerical libraries read when they are loaded."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a molecule.

    Attributes:
        geometry: which.
        path: its file, unless it failed.
        reason: why it failed; empty if it did not.
        seconds: that its calculation took; nought for a file that was there.
        note: anything else worth telling.
    """

    geometry: Geometry
    path: Path | None = None
    reason: str = ""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """Molecules in the order in which they were asked for, without those that failed."""

    molecules: list[Molecule]
    failures: list[Outcome]


def prepared(
    geometries: Sequence[Geometry],
    settings: ChemistrySettings,
    folder: Path,
    workers: int = 1,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> Prepared:
    """The molecules, computed where ``folder`` does not hold them yet; see :func:`prepare`."""
    outcomes = prepare(geometries, settings, folder, workers, watch)
    return Prepared(
        [load(outcome.path) for outcome in outcomes if outcome.path is not None],
        [outcome for outcome in outcomes if outcome.path is None],
    )


def prepare(
    geometries: Sequence[Geometry],
    settings: ChemistrySettings,
    folder: Path,
    workers: int = 1,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """A file in ``folder`` for every molecule. What is there already and sound stays; an interruption loses only what
    was being computed.

    Args:
        geometries: which.
        settings: how.
        folder: made if there is none.
        workers: how many processes compute, a thread each; 1: this one. More than one need a main module that can be
            imported, as with all of Python's spawned processes.
        watch: is called with every outcome, as they come.

    Returns:
        an outcome for every geometry, in order; molecules that fail do not stop the others.

    Raises:
        UserError: the folder cannot be written; the functional is not known; PySCF is missing and something has to be
            computed.
    """
    _writable(folder)
    outcomes: dict[int, Outcome] = {}
    wanted: dict[int, tuple[Geometry, Path, str]] = {}
    first: dict[Path, int] = {}
    for index, geometry in enumerate(geometries):
        path = folder / file_name(geometry, settings)
        if path in first:  # asked for twice
            continue
        first[path] = index
        found, note = _found(path)
        if found:
            outcomes[index] = Outcome(geometry=geometry, path=path)
            watch(outcomes[index])
        else:
            wanted[index] = (geometry, path, note)
    if wanted:
        check_functional(settings.functional)
    for index, outcome in _computed(wanted, settings, workers):
        outcomes[index] = outcome
        watch(outcome)
    return [outcomes[first[folder / file_name(geometry, settings)]] for geometry in geometries]


def _found(path: Path) -> tuple[bool, str]:
    """Whether the file is there and sound, and what is to be said if it is not."""
    if not path.exists():
        return False, ""
    try:
        read(path)
    except BrokenFileError as error:
        return False, f"computed again: {error}"
    return True, ""


def _computed(
    wanted: dict[int, tuple[Geometry, Path, str]], settings: ChemistrySettings, workers: int
) -> Iterator[tuple[int, Outcome]]:
    """The outcomes as they come, the larger molecules being begun first, so that none is left for the end alone."""
    order = sorted(wanted, key=lambda index: -sum(wanted[index][0].charges))
    if workers == 1 or len(order) < 2:
        for index in order:
            yield index, _one(*wanted[index], settings)
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(min(workers, len(order)), mp_context=context, initializer=_begin)
        try:
            running = {pool.submit(_one, *wanted[index], settings): index for index in order}
            for future in as_completed(running):
                index = running[future]
                geometry = wanted[index][0]
                try:
                    yield index, future.result()
                except BrokenProcessPool:
                    reason = "a process ended abruptly, perhaps for lack of memory; try again with fewer --workers"
                    yield index, Outcome(geometry=geometry, reason=reason)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one(geometry: Geometry, path: Path, note: str, settings: ChemistrySettings) -> Outcome:
    """Compute a molecule and write its file."""
    try:
        record = compute(geometry, settings)
    except (UserError, NotComputedError) as error:
        return Outcome(geometry=geometry, reason=str(error), note=note)
    try:
        write(path, record)
    except OSError as error:
        return Outcome(geometry=geometry, reason=f"{path} cannot be written ({error.strerror or error})", note=note)
    return Outcome(geometry=geometry, path=path, seconds=record.seconds, note=note)


def _begin() -> None:
    """In a new process: end at once when interrupted (the files are written atomically) or when the first process has
    died, and use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    """A pool's processes would wait for work for ever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are begun meanwhile use one thread each; it must be said before they load their libraries."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} is a file; the molecules' files need a folder") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); choose another --output") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to; choose another --output")
