"""The plane in which a molecule's density is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 3.0
"""Margin beyond the outermost atoms, in bohr."""


def line(centres: Tensor, count: int = 401) -> tuple[Tensor, Tensor, Tensor]:
    """Points along the line through the first two atoms, or along z through a single one.

    Args:
        centres: centres of the atoms, ``[atoms, 3]``.
        count: number of points.

    Returns:
        points ``[count, 3]``, how far they are from the first atom ``[count]``, and the places of the two atoms.
    """
    direction = centres[1] - centres[0] if len(centres) > 1 else centres.new_tensor([0.0, 0.0, 1.0])
    length = float(direction.norm())
    unit = direction / length
    atoms = centres.new_tensor([0.0, length] if len(centres) > 1 else [0.0])
    places = torch.linspace(-MARGIN, float(atoms[-1]) + MARGIN, count, dtype=centres.dtype)
    return centres[0] + places[:, None] * unit, places, atoms


def plane(centres: Tensor, count: int = 81) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """The plane through the first two atoms and the one farthest from their line; any plane through a linear
    molecule.

    Args:
        centres: centres of the atoms, at least two, ``[atoms, 3]``.
        count: number of points in each direction.

    Returns:
        points ``[count², 3]``, the second coordinate being the slower; the coordinates in both directions; the atoms'
        coordinates ``[atoms, 2]``, those outside the plane projected.
    """
    first = centres[1] - centres[0]
    first = first / first.norm()
    rest = centres - centres[0]
    across = rest - (rest @ first)[:, None] * first
    second = across[across.norm(dim=1).argmax()]
    if float(second.norm()) < 1e-6:
        axis = torch.zeros(3, dtype=centres.dtype)
        axis[first.abs().argmin()] = 1
        second = axis - (axis @ first) * first
    second = second / second.norm()
    atoms = torch.stack((rest @ first, rest @ second), dim=1)
    low, high = atoms.amin(dim=0) - MARGIN, atoms.amax(dim=0) + MARGIN
    x, y = (torch.linspace(float(a), float(b), count, dtype=centres.dtype) for a, b in zip(low, high, strict=True))
    points = centres[0] + y[:, None, None] * second + x[None, :, None] * first
    return points.reshape(-1, 3), (x, y), atoms
