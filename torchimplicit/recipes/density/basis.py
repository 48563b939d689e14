"""The basis of a density: Gaussians times real solid harmonics, evaluated anywhere.

The functions are those of PySCF, in its order, so that a data file needs to hold their exponents only: their values on
a grid, along a line or on a plane are made here, without PySCF.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


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
