"""A linear term in the density that knows where the neighbours of each atom are."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.harmonics import of_directions
from torchimplicit.models.orbital_free.molecule import Molecule

LARGEST_L = 2
SHELLS_OF_PAIRS = 12
WIDTHS = (1.5, 3.0)
"""Widths of the Gaussians in the distance, in bohr."""


def entries(molecule: Molecule, elements: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The term's dependence on its coefficients: :math:`a_i=\\sum_{t:\\,row_t=i}value_t\\,\\theta_{place_t}`.

    For a function of angular momentum l and shell s at atom A,
    :math:`a_{Aslm}=\\sum_{B\\ne A}\\sum_k\\theta_{Z_A,Z_B,l,s,k}\\,e^{-R^2/(2\\sigma_k^2)}\\,Y_{lm}(\\hat R_{AB})`:
    whatever way the molecule is turned, the energy :math:`\\langle a,p\\rangle` is the same.

    Returns:
        rows, places (into the coefficients ``[element, neighbour, l, shell, width]``, flat) and values, ``[t]`` each.
    """
    kinds = molecule.kinds(elements)
    rows, neighbours = _near(molecule, kinds)
    atoms, angular, shell = molecule.atom[rows], molecule.angular[rows], molecule.shell[rows]
    away = molecule.positions[neighbours] - molecule.positions[atoms]
    distance = away.norm(dim=1)
    every = torch.cat(of_directions(away / distance[:, None], LARGEST_L), dim=1)  # those of l begin at l²
    harmonics = every.gather(1, (angular.square() + molecule.order[rows])[:, None])[:, 0]
    widths = torch.tensor(WIDTHS).to(away)
    values = harmonics[:, None] * torch.exp(-0.5 * (distance[:, None] / widths) ** 2)
    place = ((kinds[atoms] * len(elements) + kinds[neighbours]) * (LARGEST_L + 1) + angular) * SHELLS_OF_PAIRS + shell
    places = place[:, None] * len(WIDTHS) + torch.arange(len(WIDTHS), device=place.device)
    return rows.repeat_interleave(len(WIDTHS)), places.reshape(-1), values.reshape(-1)


def shape(elements: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the coefficients."""
    return len(elements), len(elements), LARGEST_L + 1, SHELLS_OF_PAIRS, len(WIDTHS)


def _near(molecule: Molecule, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a basis function that has coefficients and of another atom, of known elements both."""
    has = (molecule.angular <= LARGEST_L) & (molecule.shell < SHELLS_OF_PAIRS) & (kinds[molecule.atom] >= 0)
    other = (molecule.atom[:, None] != torch.arange(len(kinds), device=kinds.device)) & (kinds >= 0)
    rows, neighbours = (has[:, None] & other).nonzero(as_tuple=True)
    return rows, neighbours
