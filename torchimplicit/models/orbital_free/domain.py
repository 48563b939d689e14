"""How far a molecule is from those that a functional was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.molecule import Molecule

CENTRES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
WIDTHS = (0.3, 0.3, 0.3, 0.3, 0.4, 0.8, 1.0)
WEIGHTS = (2.0, 1.5, 1.0, 1.0, 0.7, 0.3, 0.2)
"""Parameters of the Gaussians in the distance of a neighbour, in bohr. A bond that is too short counts most, because
that is where energies fail first; second neighbours count least."""

SHARE = 0.9
"""The share of training molecules that are no farther from the others than the limit."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """The surroundings of the atoms of a training set.

    An atom's surroundings are, for each element, how many neighbours it has at about each of :data:`CENTRES`, times a
    weight; the distance between those of two atoms of one element is Euclidean: an atom with one bond more or less is
    about one away. A molecule is as far from the set as its strangest atom is from the nearest atom there.

    Attributes:
        elements: nuclear charges that occur, ``[elements]``.
        charges: nuclear charge of each atom, ``[atoms]``.
        surroundings: surroundings of each atom, ``[atoms, elements * 7]``.
        limit: farther away, a molecule is strange to the set: the distance from one training molecule to the others
            that nine in ten do not exceed; zero for a set of a single one.
    """

    elements: Tensor
    charges: Tensor
    surroundings: Tensor
    limit: float

    @classmethod
    def of(cls, molecules: Sequence[Molecule]) -> Self:
        """The domain of one or more molecules."""
        charges = torch.cat([molecule.charges for molecule in molecules])
        elements = charges.unique()
        around = [_surroundings(molecule, elements) for molecule in molecules]
        of = torch.repeat_interleave(torch.tensor([len(molecule.charges) for molecule in molecules]))
        alike = (charges[:, None] == charges) & (of[:, None] != of)
        nearest = _distances(torch.cat(around), torch.cat(around), alike)
        nearest = torch.where(
            nearest.isfinite(), nearest, -torch.inf
        )  # an atom of an element that no other molecule has
        worst = torch.stack([nearest[of == number].max() for number in range(len(molecules))])
        limit = float(worst[worst >= 0].quantile(SHARE)) if bool((worst >= 0).any()) else 0.0
        return cls(elements=elements, charges=charges, surroundings=torch.cat(around), limit=limit)

    def distances(self, molecule: Molecule) -> Tensor:
        """The distance of each atom from the nearest of its element, ``[atoms]``; infinite where the set has none."""
        alike = molecule.charges[:, None] == self.charges
        return _distances(_surroundings(molecule, self.elements), self.surroundings, alike)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors for a file; ``Domain(**state)`` restores it."""
        return {name: getattr(self, name) for name in ("elements", "charges", "surroundings", "limit")}


def _surroundings(molecule: Molecule, elements: Tensor) -> Tensor:
    """``[atoms, elements * 7]``."""
    distance = torch.cdist(molecule.positions, molecule.positions)
    centres, widths, weights = distance.new_tensor((CENTRES, WIDTHS, WEIGHTS))
    near = weights * torch.exp(-0.5 * ((distance[..., None] - centres) / widths).square())
    near = near * ~torch.eye(len(distance), dtype=torch.bool)[..., None]
    kinds = (molecule.charges[:, None] == elements).to(near)
    return torch.einsum("abk,be->aek", near, kinds).flatten(1)


def _distances(of: Tensor, to: Tensor, alike: Tensor) -> Tensor:
    """The least distance from each of some surroundings to those that count for it; infinite where none does."""
    return torch.where(alike, torch.cdist(of, to), torch.inf).amin(dim=1)
