"""Training labels: densities of Kohn-Sham systems in known potentials, with the energies and slopes a functional should
have there.

Each is one step of a self-consistent iteration: from a density between the superposition of atoms and the ground state,
with a potential added to its Fock matrix. Its orbitals are the ground state of non-interacting electrons in that
potential, which tells the slope of their kinetic energy (Zhang et al. 2024, M-OFDFT; Remme et al. 2025, STRUCTURES25).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.compute import (
    NotComputedError,
    computing,
    constrained_fit,
    kohn_sham,
    orbital_gap,
    superposition,
)
from torchimplicit.recipes.density.integrals import (
    Array,
    attraction,
    basis_of,
    check_bases,
    check_functional,
    coulomb_matrix,
    density_basis,
    exchange_correlation,
    made,
    orbitals_on_grid,
    potentials,
    three_centre,
)
from torchimplicit.recipes.density.settings import ChemistrySettings, LabelSettings
from torchimplicit.recipes.density.storage import Format, key, readable
from torchimplicit.recipes.runtime.settings import to_plain

EXPONENTS = (0.1, 6.0)
"""Exponents of the Gaussians used as added potentials, in 1/bohr²: these act on valence electrons rather than cores."""

TRIES = 4
"""How often the size of a perturbation is adjusted until the density is roughly at the wanted distance from the ground
state."""


# -- The labels of a molecule, and their files -------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """The labels of one molecule, in atomic units and float64. The first density is the ground state.

    Attributes:
        geometry: geometry of the molecule.
        chemistry: how its ground state was computed, the density basis and the grid.
        settings: how many densities, and how far they are from the ground state.
        coefficients: coefficients of the densities, ``[labels, n]``, fitted as those of the molecule's data file.
        kinetic: :math:`T_s`, of the non-interacting electrons, ``[labels]``.
        exchange_correlation: :math:`E_{xc}`, ``[labels]``.
        hartree, attraction: the other terms of the energy, as the orbitals have them, ``[labels]``.
        slope: the derivative of :math:`T_s+E_{xc}` in the coefficients, ``[labels, n]``. It is known up to multiples
            of the functions' integrals, since no electron is added, and given without its part along them in the
            metric of the overlap.
        loss: :math:`\\int(\\rho-\\rho_{gs})^2/(2N)`, ``[labels]``.
        gap: between the highest occupied orbital and the next, ``[labels]``.
        seconds: how long it took.
    """

    geometry: Geometry
    chemistry: ChemistrySettings
    settings: LabelSettings
    coefficients: Tensor
    kinetic: Tensor
    exchange_correlation: Tensor
    hartree: Tensor
    attraction: Tensor
    slope: Tensor
    loss: Tensor
    gap: Tensor
    seconds: float

    doubt: ClassVar[str] = ""
    """They have none of their own, beside that of the molecule."""

    @property
    def learned(self) -> Tensor:
        """:math:`T_s+E_{xc}`, ``[labels]``."""
        return self.kinetic + self.exchange_correlation


FILES = Format("labels", 1, Labels)


def file_name(geometry: Geometry, chemistry: ChemistrySettings, settings: LabelSettings) -> str:
    """Name of a file of labels, which lies beside the molecule's own file."""
    asked = key(geometry, chemistry, labels=to_plain(settings), labels_version=FILES.version)
    return f"{readable(geometry.name)}-{asked}.labels.npz"


def write(path: Path, labels: Labels) -> None:
    """Write a file of labels; see :meth:`Format.write`."""
    FILES.write(path, labels)


def read(path: Path) -> Labels:
    """Read a file of labels; see :meth:`Format.read`."""
    return Labels(**FILES.read(path))


# -- Their computation -------------------------------------------------------------------------------------------------


@computing()
def labelled(geometry: Geometry, chemistry: ChemistrySettings, settings: LabelSettings) -> Labels:
    """Compute the labels.

    Each is the density :math:`D'` of the orbitals of lowest energy in the Fock matrix
    :math:`h+J[D]+V_{xc}[D]+V_c`, where :math:`D` lies between the ground state and the superposition of atoms, and
    :math:`V_c` is the Coulomb potential of a random fitted density c.

    Raises:
        NotComputedError: the ground state's iteration does not converge, or PySCF fails.
        UserError: PySCF is missing, or does not know the functional or the basis.
    """
    check_functional(chemistry.functional)
    check_bases(geometry, chemistry)
    began = time.monotonic()
    system = _System(geometry, chemistry)
    draw = np.random.default_rng([settings.seed, int(key(geometry, chemistry), 16)])
    least, most = np.log10(settings.nearest), np.log10(settings.farthest)
    targets = [0.0, *np.sort(10 ** draw.uniform(least, most, settings.count - 1))]
    shares = [0.0, *(0.0 if k % 2 else draw.uniform(*settings.shares) for k in range(1, settings.count))]
    begins = [(1 - share) * system.ground + share * system.guess for share in shares]
    within = system.exchange_correlation(begins)
    focks = system.core + system.field.get_j(dm=np.stack(begins)) + within.matrices
    added = np.stack([system.perturbation(*one, draw) for one in zip(focks, targets, strict=True)])
    densities, gaps = zip(*(system.stepped(*one) for one in zip(focks, added, strict=True)), strict=True)
    coefficients = np.stack([system.fitted(density) for density in densities])
    outside = system.exchange_correlation(densities)
    # Euler's equation: T_s has its slope, up to a multiple of the integrals, in minus the potential of its orbitals
    felt = system.external + potentials(system.integrals, begins).T + within.slopes + added @ system.coulomb
    slopes = outside.slopes - felt
    inverse = np.linalg.solve(system.overlap, system.weight)
    slopes = slopes - np.outer(slopes @ inverse / (system.weight @ inverse), system.weight)
    repulsions = system.field.get_j(dm=np.stack(densities))
    labels = {
        "coefficients": coefficients,
        "kinetic": [np.vdot(system.kinetic, one) for one in densities],
        "exchange_correlation": outside.energies,
        "hartree": [0.5 * np.vdot(j, one) for j, one in zip(repulsions, densities, strict=True)],
        "attraction": [np.vdot(system.core - system.kinetic, one) for one in densities],
        "slope": slopes,
        "loss": [system.away(p) for p in coefficients],
        "gap": gaps,
    }
    arrays = {name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in labels.items()}
    for name, tensor in arrays.items():
        if name != "gap" and not bool(tensor.isfinite().all()):
            raise NotComputedError(f"the labels' {name} has values that are not finite")
    return Labels(geometry=geometry, chemistry=chemistry, settings=settings, seconds=time.monotonic() - began, **arrays)


class _System:
    """A molecule's converged Kohn-Sham calculation, and what steps of its iteration take.

    Attributes:
        field: PySCF's calculation.
        ground, guess: density matrices of the ground state and of the superposition of atoms, ``[orbitals, orbitals]``.
        core, kinetic, metric: one-electron matrices: all of it, the kinetic energy, the overlap; likewise.
        fitting: PySCF's basis of the density, n functions.
        weight, external: integrals of the density's functions, and their attraction by the nuclei, ``[n]``.
        coulomb, overlap: Coulomb integrals and overlaps of the functions, ``[n, n]``.
        integrals: with the pairs of orbitals, kept, since every density needs them.
        reference: the fitted ground state, ``[n]``.
    """

    def __init__(self, geometry: Geometry, chemistry: ChemistrySettings):
        mol = made(geometry, chemistry.orbital_basis)
        self.electrons = geometry.electrons
        self.guess = superposition(mol)
        self.field = kohn_sham(mol, chemistry, self.guess)
        self.ground = self.field.make_rdm1()
        self.core, self.kinetic = self.field.get_hcore(), mol.intor("int1e_kin")
        self.metric = mol.intor("int1e_ovlp")
        self.fitting = density_basis(mol, chemistry)
        basis = basis_of(self.fitting)
        self.weight, self.external = basis.integrals().numpy(), attraction(mol, self.fitting)
        self.coulomb, self.overlap = self.fitting.intor("int2c2e"), self.fitting.intor("int1e_ovlp")
        self.integrals = list(three_centre(mol, self.fitting))
        exponents = basis.spread(basis.exponent).numpy()
        self._felt = (exponents > EXPONENTS[0]) & (exponents < EXPONENTS[1])
        self.reference = self.fitted(self.ground)

    def fitted(self, density: Array) -> Array:
        """The coefficients of a density of orbitals, ``[n]``, with its electrons and its attraction by the nuclei."""
        held = np.array([[self.electrons], [float(np.vdot(self.core - self.kinetic, density))]])
        conditions = np.stack([self.weight, self.external], axis=1)
        return constrained_fit(self.coulomb, potentials(self.integrals, [density]), conditions, held)[:, 0]

    def away(self, p: Array) -> float:
        """:math:`\\int(\\rho-\\rho_{gs})^2/(2N)`."""
        gap = p - self.reference
        return float(0.5 * gap @ self.overlap @ gap / self.electrons)

    def stepped(self, fock: Array, perturbation: Array) -> tuple[Array, float]:
        """The density of the lowest orbitals of a Fock matrix and of the potential of a fitted density (``[n]``), and
        the gap to the next orbital."""
        from scipy.linalg import eigh

        energies, orbitals = eigh(fock + coulomb_matrix(self.integrals, perturbation), self.metric)
        occupied = self.electrons // 2
        return 2 * orbitals[:, :occupied] @ orbitals[:, :occupied].T, orbital_gap(energies, self.electrons)

    def perturbation(self, fock: Array, target: float, draw: np.random.Generator) -> Array:
        """A random fitted density, ``[n]``, whose potential takes the step from a Fock matrix about as far from the
        ground state as ``target``; nothing for a target of nought."""
        perturbation = np.zeros(len(self.weight))
        if target:
            perturbation = 0.05 * draw.normal(size=len(self.weight)) * self._felt / np.sqrt(self.coulomb.diagonal())
            for _ in range(TRIES):
                ratio = self.away(self.fitted(self.stepped(fock, perturbation)[0])) / target
                if 0.5 < ratio < 2:
                    break
                perturbation *= np.clip(ratio**-0.5, 0.1, 10)
        return perturbation

    def exchange_correlation(self, densities: Sequence[Array]) -> _Within:
        """Evaluate all densities at once, so that the basis functions are evaluated only once."""
        mol, numint = self.field.mol, self.field._numint
        kind = numint._xc_type(self.field.xc)
        energies = np.zeros(len(densities))
        matrices = np.zeros((len(densities), mol.nao, mol.nao))
        slopes = np.zeros((len(densities), self.fitting.nao))
        for part, orbitals in orbitals_on_grid(self.field):
            functions = self.fitting.eval_gto("GTOval_sph_deriv1", self.field.grids.coords[part])
            for number, density in enumerate(densities):
                rho = numint.eval_rho(mol, orbitals if kind != "LDA" else orbitals[0], density, xctype=kind, hermi=1)
                energy, first, matrix = exchange_correlation(self.field, part, orbitals, rho)
                energies[number] += energy
                slopes[number] += np.einsum("xg,xgi->i", first, functions[: len(first)], optimize=True)
                matrices[number] += matrix
        return _Within(energies, matrices, slopes)


@dataclass(frozen=True)
class _Within:
    """Exchange and correlation of several densities: energies ``[k]``, matrices ``[k, orbitals, orbitals]`` and slopes
    in the fitting functions ``[k, n]``."""

    energies: Array
    matrices: Array
    slopes: Array
