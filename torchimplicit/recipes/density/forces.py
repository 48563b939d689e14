"""Forces on the nuclei at the density of least energy, by the envelope theorem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchimplicit.models.orbital_free import CoefficientNetwork, Molecule, OrbitalFree
from torchimplicit.recipes.density.compute import unsolved
from torchimplicit.recipes.density.integrals import density_basis, made
from torchimplicit.recipes.density.record import Record

STEP = 1e-3
"""Step of the central differences of a fit, in bohr."""


def forces(functional: OrbitalFree, p: Tensor, record: Record) -> Tensor:
    """:math:`-dE/dR`, ``[atoms, 3]``, in hartree per bohr.

    At the minimum the energy does not change with the density to first order, and the number of electrons that the
    coefficients hold does not depend on where the nuclei are, so that the derivative at fixed coefficients is the whole
    one. The functions move with their atoms. The grid stays: what its points and weights would add, were they to move
    too, vanishes as it gets finer, and is left out, as is usual for densities on grids.

    A learned external potential changes with the superposition of atoms too, whose change with the nuclei is taken by
    central differences of its fit, two a coordinate.

    Args:
        p: coefficients of the density of least energy, ``[n]``.
        record: record of the molecule.

    Raises:
        UserError: PySCF, whose integrals these are, is missing.
        NotComputedError: PySCF fails.
    """
    molecule, p = record.molecule(), p.detach()
    positions = molecule.positions.clone().requires_grad_()
    moved = replace(molecule, positions=positions)
    energy = _repulsion(moved) + functional.linear(moved).mul(p).sum()
    if functional.network is not None:
        energy = energy + functional.learned(p, moved)
    (slope,) = torch.autograd.grad(energy, positions)
    for place in molecule.basis.places:
        jets = replace(record.basis, centres=positions).jets(record.points[place.points], place.shells)
        fields = torch.einsum("icp,i->cp", jets, p[place.shells.functions])
        local = functional.local(fields[0], fields[1:])
        energy = record.quadrature[place.points] @ torch.stack(list(local.values())).sum(dim=0)
        slope = slope + torch.autograd.grad(energy, positions)[0]
    if functional.network is not None and functional.config.network_at == "guess":
        slope = slope + _through_guess(functional.network, p, record)
    return -(slope + _coulomb(p, record))


def _through_guess(network: CoefficientNetwork, p: Tensor, record: Record) -> Tensor:
    """Of the network's tangent at the superposition of atoms, by what that superposition changes, ``[atoms, 3]``."""
    molecule, geometry = record.molecule_without_grid(), record.geometry
    guess = molecule.guess.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(guess, molecule), guess, create_graph=True)
    (felt,) = torch.autograd.grad(slope @ (p - molecule.guess), guess)  # the value's derivative and -slope cancel

    def guess_at(positions: Tensor) -> Tensor:
        places: Any = tuple(map(tuple, positions.tolist()))
        return unsolved(replace(geometry, positions=places), replace(record.settings, grid=0)).guess

    forces = torch.zeros_like(molecule.positions)
    for atom in range(len(forces)):
        for axis in range(3):
            step = torch.zeros_like(forces)
            step[atom, axis] = STEP
            ahead, behind = (guess_at(molecule.positions + sign * step) for sign in (1, -1))
            forces[atom, axis] = felt @ (ahead - behind) / (2 * STEP)
    return forces


def _repulsion(molecule: Molecule) -> Tensor:
    """Derivative of the nuclei's repulsion."""
    pairs = torch.combinations(torch.arange(len(molecule.charges)))
    if not len(pairs):
        return molecule.positions.sum() * 0
    first, second = pairs.unbind(dim=1)
    distance = (molecule.positions[first] - molecule.positions[second]).norm(dim=1)
    return (molecule.charges[first] * molecule.charges[second] / distance).sum()


def _coulomb(p: Tensor, record: Record) -> Tensor:
    """The derivative of the Coulomb energy and of the nuclei's attraction, ``[atoms, 3]``."""
    from pyscf import gto

    mol = made(record.geometry, record.settings.orbital_basis)
    fitting = density_basis(mol, record.settings)
    nuclei = gto.fakemol_for_charges(mol.atom_coords())
    charges = torch.tensor(record.geometry.charges, dtype=torch.float64)
    # (grad i | j), the gradient being that of the electron's place, which is minus that of the function's
    hartree = torch.from_numpy(fitting.intor("int2c2e_ip1")) @ p
    attraction = torch.from_numpy(gto.intor_cross("int2c2e_ip1", fitting, nuclei))  # [3, n, atoms]
    of_functions = p * (attraction @ charges - hartree)  # [3, n]
    slope = -charges * (p @ attraction)  # [3, atoms], of the nuclei
    atoms = record.basis.spread(record.basis.atom)
    return slope.index_add(1, atoms, of_functions).T
