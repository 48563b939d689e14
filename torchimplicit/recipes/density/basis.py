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

from torchimplicit.models.orbital_free.harmonics import solid_harmonics


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
