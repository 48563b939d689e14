"""How good is an estimate? The exact gradient beside it, on the same minibatch and at the same weights."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.diagnostics import GradientProbe, probe_gradient, spectral_radius
from torchimplicit.diagnostics.compare import compared
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


def audit(
    classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient, step: int
) -> Audit:
    """Compare ``gradient`` with the exact one. Touches no ``.grad`` and no weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimate, _, _ = probe(classifier, images, labels, solver, gradient)
        exact, x, z = probe(classifier, images, labels, EXACT_SOLVER, EXACT_GRADIENT)
        problem = FixedPoint(classifier.equilibrium.cell, rowwise=True)
        radius = spectral_radius(problem, z, x, subspace=16, restarts=2)
    found = compared(estimate, exact)
    return Audit(
        step=step,
        cosine=found.cosine,
        norm_ratio=found.norm_ratio,
        adjoint_residual=found.adjoint_residual,
        exact_residual=found.exact_residual,
        spectral_radius=float(radius.median()),
        spectral_radius_max=float(radius.max()),
    )


def probe(
    classifier: ConvDEQClassifier, images: Tensor, labels: Tensor, solver: Solver, gradient: Gradient
) -> tuple[GradientProbe, Tensor, Tensor]:
    """The loss's gradient in all parameters up to the equilibrium, the injection, and the equilibrium."""
    cell = classifier.equilibrium.cell
    stem, own = ([p for p in part.parameters() if p.requires_grad] for part in (classifier.stem, cell))
    problem = FixedPoint(cell, rowwise=True)
    x = classifier.stem(images)
    with torch.no_grad():
        z = solve(problem, torch.zeros_like(x), x, solver=solver).value

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(classifier.head(z), labels)

    found = probe_gradient(problem, z, x, gradient=gradient, cotangent=loss, wrt=(x, *own))
    of_x, *of_cell = found.gradients
    of_stem = torch.autograd.grad(x, stem, of_x)
    return replace(found, gradients=(*of_stem, *of_cell)), x.detach(), z
