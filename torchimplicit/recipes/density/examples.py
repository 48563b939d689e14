"""Training data of one molecule for a network of density coefficients, without the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.constraints import project
from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free import CoefficientNetwork, Molecule, OrbitalFree, element_counts
from torchimplicit.models.orbital_free.network import Graph
from torchimplicit.models.orbital_free.response import plane, response
from torchimplicit.models.orbital_free.second import linear_columns
from torchimplicit.models.orbital_free.starting import Linearized, fit_linearized
from torchimplicit.recipes.density.labels import Labels
from torchimplicit.recipes.density.record import Record


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Missing:
    """A molecule's densities, with the energies and slopes that the fixed part of the functional lacks.

    Attributes:
        molecule: without its grid.
        coefficients: coefficients of the densities, ``[labels, n]``; the first is the reference.
        energies: that the functional lacks, in hartree, ``[labels]``.
        slopes: likewise, ``[labels, n]``, up to multiples of the functions' integrals.
        answer: :func:`~torchimplicit.models.orbital_free.response` at the reference, ``[n, n]``.
        plain: the same without the Hessian, :math:`PS^{-1/2}`, ``[n, n]``.
        inverse: :math:`S^{-1/2}`, ``[n, n]``.
        columns: columns of the linear terms, ``[n, coefficients]``.
    """

    molecule: Molecule
    coefficients: Tensor
    energies: Tensor
    slopes: Tensor
    answer: Tensor
    plain: Tensor
    inverse: Tensor
    columns: Tensor

    @classmethod
    def of(cls, bare: OrbitalFree, learned: OrbitalFree, record: Record, labels: Labels | None) -> Missing:
        """The data that a functional without learned terms leaves to be learned.

        Args:
            bare: that functional.
            learned: one with the linear terms that are to be fitted, whatever their coefficients.
            record: record of the molecule.
            labels: labels of the molecule; ``None``: its reference density alone, where the exact energy's slope is
                nought.
        """
        molecule = record.molecule()
        metric = Metric(molecule.overlap)
        if labels is None:
            coefficients = molecule.reference[None]
            energies, slopes = molecule.energy[None], torch.zeros_like(coefficients)
        else:
            coefficients = labels.coefficients
            energies = labels.learned + labels.hartree + labels.attraction + molecule.repulsion
            slopes = labels.slope + coefficients @ molecule.coulomb + molecule.external
        have = [_with_slope(bare, p, molecule) for p in coefficients]
        inverse, normal = plane(molecule, metric)
        return cls(
            molecule=record.molecule_without_grid(),
            coefficients=coefficients,
            energies=energies - torch.stack([energy for energy, _ in have]),
            slopes=slopes - torch.stack([slope for _, slope in have]),
            answer=response(bare, molecule.reference, molecule, metric),
            plain=project(inverse, normal).T,  # the rows of the transposed, which is what is projected
            inverse=inverse,
            columns=linear_columns(learned, molecule),
        )


def fit_start(functional: OrbitalFree, examples: Sequence[Missing]) -> None:
    """Fit the linear terms and the elements' constants in closed form, as
    :func:`~torchimplicit.models.orbital_free.fit_linear` and ``fit_constants`` do.

    The constants are those with the right energies at the minima, to second order; before a network of the density,
    which is trained at given densities, at the references.
    """
    fit_linearized(
        functional,
        [
            Linearized.of(one.molecule.charges, one.molecule.electrons, one.answer, -one.slopes[0], one.columns)
            for one in examples
        ],
    )
    with torch.no_grad():
        missing = torch.stack([_lacking(functional, one) for one in examples])
        counts = element_counts([one.molecule for one in examples])
        functional.constants.copy_(torch.linalg.pinv(counts) @ missing)


def _lacking(functional: OrbitalFree, one: Missing) -> Tensor:
    """The energy that the linear terms leave to the constants; see :func:`fit_start`."""
    linear = functional.linear(one.molecule)
    lacking = one.energies[0] - linear @ one.coefficients[0]
    if functional.config.network_at == "density":
        return lacking
    slope = linear - one.slopes[0]
    return lacking + 0.5 * (one.plain @ slope) @ (one.answer @ slope)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A molecule as the network sees it, in the precision of training.

    Attributes:
        name: name of the molecule.
        electrons: how many.
        graph: graph of the molecule.
        rows: rows of the densities, ``[labels, atoms, length]``.
        guess: coefficients of the superposition of atoms, ``[1, atoms, length]``.
        place: place of each coefficient in a flat row.
        answer: how far the minimum moves by a slope in the rows' coordinates, ``[n, n]``.
        plain: the slope in the metric's coordinates, likewise.
        wanted: how far it should move, ``[labels, n]``.
        plainly: the slope that is wanted, in the metric's coordinates and projected, ``[labels, n]``.
        energies: that the network should have, ``[labels]``.
        shift: shift of the rows by a displacement in the metric's coordinates, ``[n, n]``.
        start: displacement of the superposition of atoms from the reference, in the metric's coordinates, ``[n]``.
        soft: a displacement in the metric's coordinates by a random vector, the soft directions more, ``[n, n]``.
    """

    name: str
    electrons: float
    graph: Graph
    rows: Tensor
    guess: Tensor
    place: Tensor
    answer: Tensor
    plain: Tensor
    wanted: Tensor
    plainly: Tensor
    energies: Tensor
    shift: Tensor
    start: Tensor
    soft: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, functional: OrbitalFree, bare: Missing, dtype: torch.dtype = torch.float32) -> Example:
        """The example, given the functional's linear terms and constants."""
        assert functional.network is not None
        molecule = bare.molecule
        graph, rows = functional.network.known(molecule)
        linear = functional.linear(molecule)
        slopes = bare.slopes - linear
        energies = bare.energies - bare.coefficients @ linear - functional.constants[molecule.charges].sum()
        start = torch.linalg.solve(bare.inverse, molecule.guess - molecule.reference)
        tensors = {
            "rows": rows(bare.coefficients),
            "guess": rows(molecule.guess[None]),
            "answer": bare.answer @ rows.root,
            "plain": bare.plain @ rows.root,
            "wanted": slopes @ bare.answer.T,
            "plainly": slopes @ bare.plain.T,
            "energies": energies,
            "shift": bare.inverse @ rows.root,
            "start": start,
            "soft": bare.answer @ torch.linalg.inv(bare.inverse),
        }
        return cls(
            name=molecule.name,
            electrons=float(molecule.electrons),
            graph=graph.to(dtype),
            place=rows.place,
            **{name: tensor.to(dtype) for name, tensor in tensors.items()},
        )

    def gradient(self, labels: list[int]) -> Tensor:
        """The target slope at some labels, as displacements in the metric's coordinates, ``[k, n]``."""
        return self.plainly[labels]

    def moved(self, rows: Tensor, displacement: Tensor) -> Tensor:
        """Rows ``[k, atoms, length]`` moved by ``[k, n]`` in the metric's coordinates."""
        flat = torch.zeros_like(rows).flatten(1).index_copy(1, self.place, displacement @ self.shift)
        return rows + flat.view_as(rows)


def slopes_of(
    network: CoefficientNetwork, examples: Sequence[Example], rows: Sequence[Tensor], recorded: bool
) -> list[tuple[Tensor, Tensor]]:
    """The network's energies ``[k]`` of the rows (``[k, atoms, length]``) of each example, and their slopes at the
    place of each coefficient, ``[k, n]``."""
    graphs = [example.graph for example, one in zip(examples, rows, strict=True) for _ in one]
    every = torch.cat([one.detach().flatten(0, 1) for one in rows]).requires_grad_()
    with torch.enable_grad():
        energies = network.of_rows(every, Graph.joined(graphs))
        (slopes,) = torch.autograd.grad(energies.sum(), every, create_graph=recorded)
    sizes = [one.shape[0] * one.shape[1] for one in rows]
    return [
        (energy.view(len(one), -1).sum(dim=1), slope.reshape(len(one), -1)[:, example.place])
        for example, one, energy, slope in zip(examples, rows, energies.split(sizes), slopes.split(sizes), strict=True)
    ]


def _with_slope(functional: OrbitalFree, p: Tensor, molecule: Molecule) -> tuple[Tensor, Tensor]:
    p = p.detach().clone().requires_grad_()
    with torch.enable_grad():
        energy = functional(p, molecule)
        (slope,) = torch.autograd.grad(energy, p)
    return energy.detach(), slope
