"""The linear parts of a functional, fitted in closed form: where training starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.constraints import project, unit_normal
from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free.functional import ELEMENTS, SHELLS, OrbitalFree
from torchimplicit.models.orbital_free.molecule import Molecule


@torch.no_grad()
def fit_linear(
    functional: OrbitalFree, molecules: Sequence[Molecule], metrics: Sequence[Metric], ridge: float = 1e-6
) -> None:
    """Set the linear term so that the reference densities are as nearly stationary as it can make them.

    Minimizes :math:`\\sum_m\\lVert P\\,S^{-1/2}(\\nabla E(p_{gs})+a)\\rVert^2/N_m`, one linear least-squares problem in
    the coefficients of all elements and s shells that the molecules have. Coefficients of others stay as they are.

    Args:
        metrics: of the overlaps.
        ridge: the weight of :math:`\\lVert a\\rVert^2`, relative to the largest diagonal entry of the normal equations.
    """
    functional.reference.zero_()
    size = ELEMENTS * SHELLS
    matrix, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for molecule, metric in zip(molecules, metrics, strict=True):
        normal, _ = unit_normal(metric.covector(molecule.weight[None]), molecule.electrons.reshape(1, 1))
        slope = project(metric.covector(_slope(functional, molecule)[None]), normal)[0]
        place = molecule.charges[molecule.atom] * SHELLS + molecule.shell
        scalar = (molecule.angular == 0).to(slope)
        columns = metric.inverse[0].to(slope) * scalar  # those of p, shells that are no s shells left out
        columns = project(columns.T, normal).T
        gathered = torch.zeros(len(slope), size, dtype=torch.float64).index_add_(1, place, columns)
        matrix += gathered.T @ gathered / molecule.electrons
        right -= gathered.T @ slope / molecule.electrons
    matrix += ridge * matrix.diagonal().max() * torch.eye(size, dtype=torch.float64)
    functional.reference.copy_(torch.linalg.solve(matrix, right).reshape(ELEMENTS, SHELLS))


@torch.no_grad()
def fit_constants(functional: OrbitalFree, molecules: Sequence[Molecule]) -> None:
    """Set the elements' constants so that the energies of the reference densities are the Kohn-Sham ones, in the sense
    of least squares (of least norm, where the molecules do not tell the elements apart)."""
    functional.constants.zero_()
    counts = torch.stack([torch.bincount(m.charges, minlength=ELEMENTS).double() for m in molecules])
    missing = torch.stack([m.energy - functional(m.reference, m) for m in molecules])
    functional.constants.copy_(torch.linalg.pinv(counts) @ missing)


def _slope(functional: OrbitalFree, molecule: Molecule) -> Tensor:
    """The energy's gradient at the reference density, ``[n]``."""
    with torch.enable_grad():
        p = molecule.reference.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional(p, molecule), p)
    return slope
