"""Real solid harmonics and their derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def solid_harmonics(r: Tensor, largest: int) -> list[Tensor]:
    """The real regular solid harmonics :math:`r^lY_{lm}` with their derivatives, by recursion in l.

    Helgaker, Jørgensen, Olsen, Molecular Electronic-Structure Theory (2000), eqs. 6.4.70-6.4.72, for harmonics of
    Racah's norm; here multiplied by :math:`\\sqrt{(2l+1)/4\\pi}`, so that they are orthonormal on the unit sphere.

    Args:
        r: ``[3, points]``.
        largest: the last l.

    Returns:
        for every l the values, then the derivatives in x, y and z: ``[4, 2l+1, points]``, m from -l to l, but for
        l=1, which is in the order x, y, z.
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
