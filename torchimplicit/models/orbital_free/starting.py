"""The linear parts of a functional, fitted in closed form: where training starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free.functional import ELEMENTS, OrbitalFree
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.response import response
from torchimplicit.models.orbital_free.second import linear_columns


@torch.no_grad()
def fit_linear(
    functional: OrbitalFree,
    molecules: Sequence[Molecule],
    metrics: Sequence[Metric],
    ridge: float = 1e-8,
    pair_ridge: float = 1e-5,
) -> None:
    """Set the linear term so that the reference densities are as nearly stationary as it can make them.

    To first order in its slope, the energy's minimum is away from the reference density by
    :math:`\\delta=-(PHP)^+P\\,S^{-1/2}(\\nabla E(p_{gs})+a)`, in the metric's coordinates and with the Hessian of the
    functional without the term (:func:`~torchimplicit.models.orbital_free.response.response`). What is minimized is
    :math:`\\sum_m\\lVert\\delta_m\\rVert^2/N_m`, a linear least-squares problem in the coefficients of all elements and
    s shells that the molecules have. Those of others become zero, and molecules with other elements are refused from
    then on.

    Args:
        metrics: the metrics of the molecules' overlaps.
        ridge: the weight of the squares of the atoms' coefficients, relative to the largest diagonal entry of the
            normal equations.
        pair_ridge: the same for the coefficients of the pairs, which are many more.
    """
    functional.reference.zero_()
    functional.elements.zero_()
    if functional.pairs is not None:
        functional.pairs.zero_()
    linearized = (
        Linearized.of(
            one.charges,
            one.electrons,
            response(functional, one.reference, one, metric),
            _slope(functional, one),
            linear_columns(functional, one),
        )
        for one, metric in zip(molecules, metrics, strict=True)
    )
    fit_linearized(functional, linearized, ridge, pair_ridge)


@dataclass(frozen=True, eq=False)
class Linearized:
    """The data of a molecule that :func:`fit_linear` needs, from the functional without linear terms.

    Attributes:
        charges: the molecule's.
        away: how far the minimum is from the reference density, over the root of the number of electrons, ``[n]``.
        coefficients: numbers of the linear coefficients that the molecule depends on, ``[k]``.
        columns: how ``away`` changes with them, ``[n, k]``.
    """

    charges: Tensor
    away: Tensor
    coefficients: Tensor
    columns: Tensor

    @classmethod
    def of(cls, charges: Tensor, electrons: Tensor, answer: Tensor, slope: Tensor, columns: Tensor) -> Self:
        """The linearized problem of one molecule.

        Args:
            charges, electrons: the molecule's.
            answer: the response at the reference density, ``[n, n]``.
            slope: the energy's there, ``[n]``.
            columns: change of the energy's slope with each linear coefficient, ``[n, coefficients]``.
        """
        answer, its = answer / electrons.sqrt(), columns.any(dim=0).nonzero()[:, 0]
        return cls(charges, answer @ slope, its, answer @ columns[:, its])


@torch.no_grad()
def fit_linearized(
    functional: OrbitalFree, molecules: Iterable[Linearized], ridge: float = 1e-8, pair_ridge: float = 1e-5
) -> None:
    """:func:`fit_linear` of what is known of the molecules already."""
    functional.elements.zero_()
    count = functional.reference.numel() + (0 if functional.pairs is None else functional.pairs.numel())
    matrix, right = functional.reference.new_zeros(count, count), functional.reference.new_zeros(count)
    known = torch.zeros_like(functional.elements)  # put in at the end: until then every molecule is taken
    for one in molecules:
        known[one.charges] = True
        matrix[one.coefficients[:, None], one.coefficients] += one.columns.T @ one.columns
        right[one.coefficients] -= one.columns.T @ one.away
    functional.elements.copy_(known)
    size = matrix.diagonal()
    used = size > 0
    atomic = functional.reference.numel()
    share = torch.full_like(size, pair_ridge)
    share[:atomic] = ridge
    matrix = (matrix + torch.diag(share * size.max()))[used][:, used]
    fitted = torch.zeros_like(size)
    fitted[used] = torch.linalg.solve(matrix, right[used])
    functional.reference.copy_(fitted[:atomic].reshape(functional.reference.shape))
    if functional.pairs is not None:
        functional.pairs.copy_(fitted[atomic:].reshape(functional.pairs.shape))


@torch.no_grad()
def fit_constants(
    functional: OrbitalFree, molecules: Sequence[Molecule], densities: Sequence[Tensor] | None = None
) -> None:
    """Set the elements' constants so that the energies are the Kohn-Sham ones, in the sense of least squares (of least
    norm, where the molecules do not tell the elements apart). No density depends on them.

    Args:
        densities: whose energies, ``[n]`` each; ``None``: the reference densities.
    """
    functional.constants.zero_()
    at = [m.reference for m in molecules] if densities is None else densities
    missing = torch.stack([m.energy - functional(p, m) for m, p in zip(molecules, at, strict=True)])
    functional.constants.copy_(torch.linalg.pinv(element_counts(molecules)) @ missing)


def element_counts(molecules: Sequence[Molecule]) -> Tensor:
    """How many atoms of each element each molecule has, ``[molecules, 37]``, double precision."""
    return torch.stack([torch.bincount(molecule.charges, minlength=ELEMENTS) for molecule in molecules]).double()


def _slope(functional: OrbitalFree, molecule: Molecule) -> Tensor:
    """The energy's gradient at the reference density, ``[n]``."""
    with torch.enable_grad():
        p = molecule.reference.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional(p, molecule), p)
    return slope
