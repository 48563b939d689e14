"""The data of one molecule that a density functional needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, final

import torch
from torch import Tensor

from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free.on_grid import OnGrid

EXACT = ("charges", "atom", "angular", "shell")
"""The fields that count or name: integers, whatever the precision of the rest."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Molecule:
    """A molecule in a density basis: :math:`\\rho(r)=\\sum_i p_i\\,\\omega_i(r)`, all in atomic units.

    Attributes:
        name: its name in tables and errors.
        charges: nuclear charges, ``[atoms]``, integers.
        positions: positions of the nuclei, ``[atoms, 3]``, in bohr.
        electrons: :math:`N`, the number of electrons in the density.
        overlap: :math:`S_{ij}=\\int\\omega_i\\omega_j`, ``[n, n]``.
        coulomb: :math:`J_{ij}=\\iint\\omega_i(r)\\omega_j(r')/|r-r'|`, ``[n, n]``.
        weight: :math:`w_i=\\int\\omega_i`, ``[n]``: the density holds :math:`\\langle w,p\\rangle` electrons.
        external: :math:`v_i=\\int\\omega_i v_{ext}`, ``[n]``: the nuclei's attraction, negative for s functions.
        atom: the atom of each basis function, ``[n]``.
        angular: the angular momentum l of each basis function, ``[n]``.
        shell: the number of its shell among those of the same l at the same atom, tightest exponent first, ``[n]``.
        basis: the functions on the grid.
        quadrature: the grid's weights, ``[points]``.
        points: positions of the grid's points, ``[points, 3]``, in bohr.
        reference: the fitted Kohn-Sham density, ``[n]``.
        guess: the fitted superposition of atomic densities (MINAO) that a minimization starts from, ``[n]``.
        energy: the Kohn-Sham total energy, the nuclei's repulsion included, in hartree; a scalar.
        repulsion: the nuclei's repulsion, in hartree; a scalar.
        kinetic: the Kohn-Sham kinetic energy of non-interacting electrons, in hartree; a scalar.
        exchange_correlation: the exchange-correlation energy, in hartree; a scalar.
    """

    name: str
    charges: Tensor
    positions: Tensor
    electrons: Tensor
    overlap: Tensor
    coulomb: Tensor
    weight: Tensor
    external: Tensor
    atom: Tensor
    angular: Tensor
    shell: Tensor
    basis: OnGrid
    quadrature: Tensor
    points: Tensor
    reference: Tensor
    guess: Tensor
    energy: Tensor
    repulsion: Tensor
    kinetic: Tensor
    exchange_correlation: Tensor

    @property
    def size(self) -> int:
        """How many basis functions there are, n."""
        return len(self.weight)

    @cached_property
    def metric(self) -> Metric:
        """Coordinates in which lengths are those of densities, of the overlap; made once."""
        return Metric(self.overlap)

    @cached_property
    def order(self) -> Tensor:
        """The number of each basis function within its shell, ``[n]``."""
        labels = torch.stack((self.atom, self.angular, self.shell), dim=1)
        _, counts = torch.unique_consecutive(labels, dim=0, return_counts=True)
        starts = counts.cumsum(0) - counts
        return torch.arange(len(labels), device=labels.device) - starts.repeat_interleave(counts)

    def kinds(self, elements: tuple[int, ...]) -> Tensor:
        """The number of each atom's element among these nuclear charges, ``[atoms]``; -1 for another element."""
        kinds = torch.full_like(self.charges, -1)
        for kind, element in enumerate(elements):
            kinds[self.charges == element] = kind
        return kinds

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those of the basis aside."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "basis")}

    def to(self, *, dtype: torch.dtype | None = None, device: Any = None) -> Self:
        """Return the same in another precision (integers stay) or on another device."""
        moved: dict[str, Any] = {
            key: value.to(device=device, dtype=None if key in EXACT else dtype) for key, value in self.tensors().items()
        }
        return replace(self, basis=self.basis.to(dtype=dtype, device=device), **moved)

    def fields(self, p: Tensor) -> Tensor:
        """:math:`\\rho` at the grid's points, and its derivatives in x, y, z, of the coefficients ``p`` (``[n]``):
        ``[4, points]``."""
        return self.basis(p)

    def density(self, p: Tensor) -> Tensor:
        """:math:`\\rho` at the grid's points, ``[points]``, of the coefficients ``p`` (``[n]``)."""
        return self.fields(p)[0]

    def slopes(self, p: Tensor) -> Tensor:
        """The density's derivatives in x, y, z at the grid's points, ``[3, points]``."""
        return self.fields(p)[1:]

    def count(self, p: Tensor) -> Tensor:
        """How many electrons ``p`` holds; a scalar."""
        return self.weight @ p
