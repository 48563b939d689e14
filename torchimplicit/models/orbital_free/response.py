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


def plane(molecule: Molecule, metric: Metric) -> tuple[Tensor, Tensor]:
    """:math:`S^{-1/2}`, ``[n, n]``, and the unit normal of the constraint on the number of electrons in the metric's
    coordinates, ``[1, n]``."""
    weight = metric.covector(molecule.weight[None])
    return metric.inverse[0].to(weight), unit_normal(weight, molecule.electrons.reshape(1, 1))[0]


def projected_hessian(
    functional: OrbitalFree, p: Tensor, molecule: Molecule, on_plane: tuple[Tensor, Tensor]
) -> Tensor:
    """:math:`PHP` at ``p``, ``[n, n]``, in the metric's coordinates; ``on_plane`` is what :func:`plane` gives."""
    inverse, normal = on_plane
    return project(project(inverse @ hessian(functional, p, molecule) @ inverse, normal).T, normal)


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
    inverse, normal = plane(molecule, metric)
    values, vectors = torch.linalg.eigh(projected_hessian(functional, p, molecule, (inverse, normal)))
    vectors = project(vectors.T, normal).T  # along the normal there is no answer
    return (vectors / values.abs().clamp_min(floor)) @ (vectors.T @ inverse)
