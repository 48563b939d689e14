"""How the density of least energy answers to a change of the energy's slope."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.constraints import project, unit_normal
from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free.functional import OrbitalFree
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.second import hessian

FLOOR = 0.05
"""Hartree: eigenvalues that are less in size count as so much, so that no direction is without bounds."""


def response(functional: OrbitalFree, p: Tensor, molecule: Molecule, metric: Metric, floor: float = FLOOR) -> Tensor:
    """:math:`R=(PHP)^+P\\,S^{-1/2}`, ``[n, n]``, with the Hessian at ``p`` in the metric's coordinates.

    To first order, a functional whose slope at ``p`` is ``g`` has its minimum :math:`-Rg` away, in coordinates in which
    the square of a length is :math:`\\int\\Delta\\rho^2`: half the square of :math:`Rg` over the number of electrons is
    the implicit loss, linearized.

    Args:
        p: coefficients, ``[n]``.
        metric: ``Metric(molecule.overlap)``.
        floor: in hartree; see :data:`FLOOR`.
    """
    weight = metric.covector(molecule.weight[None])
    inverse, (normal, _) = metric.inverse[0].to(weight), unit_normal(weight, molecule.electrons.reshape(1, 1))
    curvature = project(project(inverse @ hessian(functional, p, molecule) @ inverse, normal).T, normal)
    values, vectors = torch.linalg.eigh(curvature)
    vectors = project(vectors.T, normal).T  # along the normal there is no answer
    return (vectors / values.abs().clamp_min(floor)) @ (vectors.T @ inverse)
