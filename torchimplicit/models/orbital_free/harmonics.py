"""Real solid harmonics and their derivatives."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor


def solid_harmonics(r: Tensor, largest: int, counts: Sequence[int] | None = None) -> list[Tensor]:
    """The real regular solid harmonics :math:`r^lY_{lm}` with their derivatives, orthonormal on the unit sphere.

    Args:
        r: ``[centres, 3, points]``.
        largest: the last l.
        counts: for each l, the number of leading centres that get its harmonics, not rising with l; ``None``: all.

    Returns:
        for every l the values, then the derivatives in x, y and z: ``[centres, 2l+1, 4, points]``, m from -l to l, but
        for l=1, which is in the order x, y, z.
    """
    x, y, z = (r[:, i : i + 1] for i in range(3))
    below, monomials = torch.zeros_like(x), torch.ones_like(x)
    harmonics = []
    for l in range(largest + 1):
        count = len(r) if counts is None else counts[l]
        x, y, z, below, monomials = (one[:count] for one in (x, y, z, below, monomials))
        values, slopes = (matrix.to(r) for matrix in _coefficients(l))
        harmonics.append(torch.cat(((values @ monomials)[:, :, None], (slopes @ below).unflatten(1, (-1, 3))), dim=2))
        below = monomials
        monomials = torch.cat((x * below, y * below[:, -l - 1 :], z * below[:, -1:]), dim=1)
    return harmonics


def of_directions(unit: Tensor, largest: int) -> list[Tensor]:
    """The real harmonics of unit vectors ``[t, 3]``, ``[t, 2l+1]`` for each l, in the order of
    :func:`solid_harmonics`; of Racah's norm: their squares sum to one."""
    solid = solid_harmonics(unit.T[None], largest)
    return [math.sqrt(4 * math.pi / (2 * l + 1)) * one[0, :, 0].T for l, one in enumerate(solid)]


Polynomial = dict[tuple[int, int, int], float]
"""Coefficients by the powers of x, y and z."""


@cache
def _coefficients(l: int) -> tuple[Tensor, Tensor]:
    """Coefficients of the harmonics in the monomials of degree l, ``[2l+1, (l+1)(l+2)/2]``, and of their derivatives in
    those of degree l-1, ``[(2l+1) 3, l(l+1)/2]``. Monomials with more x come first, then those with more y."""
    values = torch.zeros(2 * l + 1, (l + 1) * (l + 2) // 2, dtype=torch.float64)
    slopes = torch.zeros(2 * l + 1, 3, max(1, l * (l + 1) // 2), dtype=torch.float64)

    def place(powers: Sequence[int]) -> int:
        return sum(powers[1:]) * (sum(powers[1:]) + 1) // 2 + powers[2]

    for row, m in enumerate((1, -1, 0) if l == 1 else range(-l, l + 1)):
        for powers, c in _harmonics(l)[m].items():
            values[row, place(powers)] += c
            for i, power in enumerate(powers):
                if power:
                    slopes[row, i, place([k - (i == j) for j, k in enumerate(powers)])] += power * c
    scale = math.sqrt((2 * l + 1) / (4 * math.pi))
    return scale * values, scale * slopes.flatten(0, 1)


@cache
def _harmonics(l: int) -> dict[int, Polynomial]:
    """Harmonics of Racah's norm, by m, from a recursion in l (Helgaker, Jørgensen, Olsen, Molecular
    Electronic-Structure Theory (2000), eqs. 6.4.70-6.4.72)."""
    x, y, z, square = (
        {(1, 0, 0): 1.0},
        {(0, 1, 0): 1.0},
        {(0, 0, 1): 1.0},
        {(2, 0, 0): 1.0, (0, 2, 0): 1.0, (0, 0, 2): 1.0},
    )
    if l == 0:
        return {0: {(0, 0, 0): 1.0}}
    if l == 1:
        return {1: x, -1: y, 0: z}
    last, before, c = _harmonics(l - 1), _harmonics(l - 2), math.sqrt((2 * l - 1) / (2 * l))
    polynomials = {
        l: _sum((c, x, last[l - 1]), (-c, y, last[1 - l])),
        -l: _sum((c, y, last[l - 1]), (c, x, last[1 - l])),
    }
    for m in range(1 - l, l):
        root = math.sqrt((l + m) * (l - m))
        terms = [((2 * l - 1) / root, z, last[m])]
        if abs(m) < l - 1:
            terms.append((-math.sqrt((l - 1 + m) * (l - 1 - m)) / root, square, before[m]))
        polynomials[m] = _sum(*terms)
    return polynomials


def _sum(*terms: tuple[float, Polynomial, Polynomial]) -> Polynomial:
    """Sum of products of two polynomials, each times a number."""
    total: Polynomial = defaultdict(float)
    for c, one, other in terms:
        for (p, a), (q, b) in product(one.items(), other.items()):
            total[p[0] + q[0], p[1] + q[1], p[2] + q[2]] += c * a * b
    return total
