"""The basis of a density: Gaussians times real solid harmonics, evaluated anywhere.

The functions are those of PySCF, in its order, so that a data file needs to hold their exponents only: their values on
a grid, along a line or on a plane are made here, without PySCF.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, final

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

    def to(self, *, dtype: torch.dtype | None = None, device: Any = None) -> Self:
        """Return the same in another precision (integers stay) or on another device."""
        real = {name: getattr(self, name).to(device=device, dtype=dtype) for name in ("centres", "exponent")}
        return replace(self, atom=self.atom.to(device), angular=self.angular.to(device), **real)

    @property
    def sizes(self) -> Tensor:
        """How many functions each shell has, ``[shells]``."""
        return 2 * self.angular + 1

    def spread(self, of_shells: Tensor) -> Tensor:
        """A figure of every shell as one of every function, ``[n]``."""
        return of_shells.repeat_interleave(self.sizes)

    def numbers(self) -> Tensor:
        """Number of every shell among those of the same l at the same atom, the tightest being 0, ``[shells]``."""
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
        every = self.some(torch.arange(len(self.atom), device=points.device))
        jets = self.jets(points, every)[every.functions.argsort()]
        return jets[:, 0].T, jets[:, 1:].permute(1, 2, 0)

    def some(self, shells: Tensor) -> Shells:
        """Some of the shells, ``[shells]``, integers, for :meth:`jets`."""
        l, atom, starts = self.angular[shells], self.atom[shells], self.sizes.cumsum(0) - self.sizes
        highest = l.new_full((len(self.centres),), -1).scatter_reduce(0, atom, l, "amax")
        near = highest.argsort(descending=True)[: int((highest >= 0).sum())]
        place = torch.empty_like(highest)
        place[near] = torch.arange(len(near), device=near.device)
        degrees, functions = [], [shells[:0]]
        for degree in range(int(highest.max()) + 1):
            mine = l == degree
            a = self.exponent[shells[mine]][:, None]
            degrees.append(
                Degree(
                    count=int((highest >= degree).sum()),
                    place=place[atom[mine]],
                    exponent=a,
                    norm=_norm(a, degree),
                )
            )
            functions.append(
                (starts[shells[mine]][:, None] + torch.arange(2 * degree + 1, device=near.device)).flatten()
            )
        return Shells(near, torch.cat(functions), degrees)

    def jets(self, points: Tensor, shells: Shells, out: Tensor | None = None) -> Tensor:
        """Functions, and their derivatives in x, y and z.

        Args:
            points: ``[points, 3]``, in bohr.
            shells: see :meth:`some`.
            out: where to write them; without it the result is differentiable in the points and the centres.

        Returns:
            ``[functions, 4, points]``, in the order of ``shells.functions``.
        """
        r = points.T - self.centres[shells.atoms][:, :, None]  # [atoms, 3, points]
        square = r.square().sum(dim=1)
        harmonics = solid_harmonics(r, len(shells.degrees) - 1, [one.count for one in shells.degrees])
        sizes = [len(one.place) * (2 * l + 1) for l, one in enumerate(shells.degrees)]
        places: Sequence[Tensor | None] = [None] * len(sizes) if out is None else out.split(sizes)
        pieces = [points.new_zeros(0, 4, len(points))]
        for l, (one, S, place) in enumerate(zip(shells.degrees, harmonics, places, strict=True)):
            radial = one.norm * torch.exp(-one.exponent * square[one.place])
            place = None if place is None else place.unflatten(0, (-1, 2 * l + 1))
            piece = torch.index_select(S, 0, one.place, out=place).mul_(radial[:, None, None])
            falling = -2 * one.exponent[..., None] * piece[:, :, 0]
            piece[:, :, 1:].addcmul_(falling[:, :, None], r[one.place][:, None])
            pieces.append(piece.flatten(0, 1))
        return torch.cat(pieces) if out is None else out

    def reaching(self, distances: Tensor, least: float) -> Tensor:
        """Find the shells whose values or derivatives exceed ``least`` somewhere.

        Args:
            distances: distance of each atom from the nearest point, ``[..., atoms]``.

        Returns:
            bool ``[..., shells]``.
        """
        l, a = self.angular, self.exponent
        r = torch.maximum(distances[..., self.atom], (l / (2 * a)).sqrt())  # beyond its maximum, a shell falls
        value = (
            torch.cat([_norm(one, int(k)) for one, k in zip(a.split(1), l, strict=True)])
            * ((2 * l + 1) / (4 * math.pi)).sqrt()
            * r**l
            * torch.exp(-a * r.square())
        )
        return value * (1 + l / r.clamp_min(1e-3) + 2 * a * r) > least


@dataclass(frozen=True, eq=False)
class Degree:
    """Shells of one angular momentum.

    Attributes:
        count: number of atoms with shells of this angular momentum or a larger one.
        place: place of each shell's atom among those, ``[shells]``.
        exponent, norm: exponent and normalization of each shell, ``[shells, 1]``.
    """

    count: int
    place: Tensor
    exponent: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False)
class Shells:
    """A selection of the shells of a basis.

    Attributes:
        atoms: the atoms that have one, those with the largest angular momenta first.
        functions: numbers of the shells' functions, lowest angular momentum first, ``[functions]``.
        degrees: the shells, grouped by angular momentum.
    """

    atoms: Tensor
    functions: Tensor
    degrees: list[Degree]


def _norm(exponent: Tensor, l: int) -> Tensor:
    """So that :math:`\\int_0^\\infty r^{2l+2}N^2e^{-2ar^2}dr=1`."""
    return torch.sqrt(2 * (2 * exponent) ** (l + 1.5) / math.gamma(l + 1.5))
