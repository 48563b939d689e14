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
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.compute import (
    NotComputedError,
    computing,
    constrained_fit,
    kohn_sham,
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

    Raises:
        NotComputedError: the ground state's iteration does not converge, or PySCF fails.
        UserError: PySCF is missing, or does not know the functional or the basis.
    """
    from scipy.linalg import eigh

    check_functional(chemistry.functional)
    check_bases(geometry, chemistry)
    began = time.monotonic()
    mol = made(geometry, chemistry.orbital_basis)
    guess = superposition(mol)
    field = kohn_sham(mol, chemistry, guess)
    ground = field.make_rdm1()
    fitting = density_basis(mol, chemistry)
    basis = basis_of(fitting)
    weight, external = basis.integrals().numpy(), attraction(mol, fitting)
    coulomb, overlap = fitting.intor("int2c2e"), fitting.intor("int1e_ovlp")
    core, kinetic, metric = field.get_hcore(), mol.intor("int1e_kin"), mol.intor("int1e_ovlp")
    integrals = list(three_centre(mol, fitting))  # kept: they are needed for every density

    def fitted(density: Array) -> Array:
        held = np.array([[geometry.electrons], [float(np.vdot(core - kinetic, density))]])
        conditions = np.stack([weight, external], axis=1)
        return constrained_fit(coulomb, potentials(integrals, [density]), conditions, held)[:, 0]

    reference = fitted(ground)

    def away(p: Array) -> float:
        return float(0.5 * (p - reference) @ overlap @ (p - reference) / geometry.electrons)

    draw = np.random.default_rng([settings.seed, int(key(geometry, chemistry), 16)])
    least, most = np.log10(settings.nearest), np.log10(settings.farthest)
    targets = np.sort(10 ** draw.uniform(least, most, settings.count - 1))
    shares = [0.0, *(0.0 if k % 2 else draw.uniform(*settings.shares) for k in range(1, settings.count))]
    begins = [(1 - share) * ground + share * guess for share in shares]
    within = _exchange_correlation(field, fitting, begins)
    repulsions = field.get_j(dm=np.stack(begins))
    labelled, added = [], []
    occupied = geometry.electrons // 2
    exponents = basis.spread(basis.exponent).numpy()
    felt = (exponents > EXPONENTS[0]) & (exponents < EXPONENTS[1])

    def stepped(number: int, perturbation: Array) -> tuple[Array, float, float]:
        fock = core + repulsions[number] + within.matrices[number]
        fock = fock + coulomb_matrix(integrals, perturbation)
        energies, orbitals = eigh(fock, metric)
        orbitals = orbitals[:, :occupied]
        gap = energies[occupied] - energies[occupied - 1] if occupied < len(energies) else np.inf
        return 2 * orbitals @ orbitals.T, float(energies[occupied - 1]), float(gap)

    for number in range(settings.count):
        perturbation = np.zeros(len(weight))
        if number:
            perturbation = 0.05 * draw.normal(size=len(weight)) * felt / np.sqrt(coulomb.diagonal())
            for _ in range(TRIES):
                ratio = away(fitted(stepped(number, perturbation)[0])) / targets[number - 1]
                if 0.5 < ratio < 2:
                    break
                perturbation *= np.clip(ratio**-0.5, 0.1, 10)
        labelled.append(stepped(number, perturbation))
        added.append(perturbation)
    densities = [density for density, _, _ in labelled]
    outside = _exchange_correlation(field, fitting, densities)
    coefficients = np.stack([fitted(density) for density in densities])
    # the kinetic energy's slope is minus the potential in which the orbitals are the ground state (Euler's equation)
    felt_there = potentials(integrals, begins).T + np.stack(added) @ coulomb
    slopes = outside.slopes - (external + felt_there + within.slopes)
    inverse = np.linalg.solve(overlap, weight)
    slopes = slopes - np.outer(slopes @ inverse / (weight @ inverse), weight)
    own = field.get_j(dm=np.stack(densities))
    labels = {
        "coefficients": coefficients,
        "kinetic": [np.vdot(kinetic, one) for one in densities],
        "exchange_correlation": outside.energies,
        "hartree": [0.5 * np.vdot(j, one) for j, one in zip(own, densities, strict=True)],
        "attraction": [np.vdot(core - kinetic, one) for one in densities],
        "slope": slopes,
        "loss": [away(p) for p in coefficients],
        "gap": [gap for _, _, gap in labelled],
    }
    arrays = {name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in labels.items()}
    for name, tensor in arrays.items():
        if name != "gap" and not bool(tensor.isfinite().all()):
            raise NotComputedError(f"the labels' {name} has values that are not finite")
    return Labels(geometry=geometry, chemistry=chemistry, settings=settings, seconds=time.monotonic() - began, **arrays)


@dataclass(frozen=True)
class _Within:
    """Exchange and correlation of several densities: energies ``[k]``, matrices ``[k, orbitals, orbitals]`` and slopes
    in the fitting functions ``[k, n]``."""

    energies: Array
    matrices: Array
    slopes: Array


def _exchange_correlation(field: Any, fitting: Any, densities: Sequence[Array]) -> _Within:
    """Evaluate all densities at once, so that the basis functions are evaluated only once."""
    mol, numint = field.mol, field._numint
    kind = numint._xc_type(field.xc)
    energies = np.zeros(len(densities))
    matrices = np.zeros((len(densities), mol.nao, mol.nao))
    slopes = np.zeros((len(densities), fitting.nao))
    for part, orbitals in orbitals_on_grid(field):
        functions = fitting.eval_gto("GTOval_sph_deriv1", field.grids.coords[part])
        for number, density in enumerate(densities):
            rho = numint.eval_rho(mol, orbitals if kind != "LDA" else orbitals[0], density, xctype=kind, hermi=1)
            energy, first, matrix = exchange_correlation(field, part, orbitals, rho)
            energies[number] += energy
            slopes[number] += np.einsum("xg,xgi->i", first, functions[: len(first)], optimize=True)
            matrices[number] += matrix
    return _Within(energies, matrices, slopes)
