"""How good is an estimate? The exact gradient beside it, on the same minibatch and at the same weights.

The adjoint vector ``g`` of *any* estimator is what it gives for a constant added to the cell's output: with
``f(z) = cell(z, x) + s``, the gradient in ``s`` is ``f_sᵀ g = g``. The exact one solves ``(I − Jᵀ) g = u``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.diagnostics import spectral_radius
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.digits.history import Audit
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson, Solver

EXACT_SOLVER = Anderson(memory=8, rtol=1e-6, max_steps=150)
EXACT_GRADIENT = Implicit(linear_solver=GMRES(rtol=1e-6, max_steps=150))
"""Tight for float32: an error of 1e-5 in a gradient moves its cosine by 5e-11."""


@dataclass(frozen=True)
class Probe:
    """One gradient and the equilibrium at which it was taken.

    Attributes:
        gradient: in all parameters up to the equilibrium, flat.
        adjoint_residual: see :class:`Audit`.
        x, z: the injection and the equilibrium.
    """

    gradient: Tensor
    adjoint_residual: float
    x: Tensor
    z: Tensor


def audit(
    classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient, step: int
) -> Audit:
    """Compare ``gradient`` with the exact one. Touches no ``.grad`` and no weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimate = probe(classifier, images, labels, solver, gradient)
        exact = probe(classifier, images, labels, EXACT_SOLVER, EXACT_GRADIENT)
        with torch.no_grad():
            problem = FixedPoint(classifier.equilibrium.cell, rowwise=True)
            radius = spectral_radius(problem, exact.z, exact.x, subspace=16, restarts=2)
    return Audit(
        step=step,
        cosine=float(functional.cosine_similarity(estimate.gradient, exact.gradient, dim=0)),
        norm_ratio=float(estimate.gradient.norm() / exact.gradient.norm()),
        adjoint_residual=estimate.adjoint_residual,
        exact_residual=exact.adjoint_residual,
        spectral_radius=float(radius.median()),
        spectral_radius_max=float(radius.max()),
    )


def probe(classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient) -> Probe:
    """The loss's gradient, and the adjoint vector behind it."""
    cell = classifier.equilibrium.cell
    parameters = [p for part in (classifier.stem, cell) for p in part.parameters() if p.requires_grad]

    def shifted(z: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        return cell(z, x) + shift

    x = classifier.stem(images)
    shift = torch.zeros_like(x, requires_grad=True)
    problem = FixedPoint(shifted, rowwise=True)
    z = solve(problem, torch.zeros_like(x), x, shift, solver=solver, gradient=gradient).value
    loss = functional.cross_entropy(classifier.head(z), labels)
    u, g, *rest = torch.autograd.grad(loss, [z, shift, *parameters])
    return Probe(_flat(rest), adjoint_residual(cell, z.detach(), x.detach(), u, g), x.detach(), z.detach())


def adjoint_residual(cell: torch.nn.Module, z: Tensor, x: Tensor, u: Tensor, g: Tensor) -> float:
    """``‖u − (I − Jᵀ)g‖ / ‖u‖`` over all samples together."""
    z = z.requires_grad_()
    (transposed,) = torch.autograd.grad(cell(z, x), z, g)
    return float((u - g + transposed).norm() / u.norm())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).double()
