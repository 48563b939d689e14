"""Terms of the loss that hold the Hessian of the energy, at the density, in a good range."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.constraints import project
from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.settings import OrbitalFreeTraining


def penalty(
    config: OrbitalFreeTraining, case: Case, functional: OrbitalFree, p: Tensor, generator: torch.Generator
) -> Tensor:
    """The penalties on the size of the Hessian along a random vector (the Jacobian regularization of Bai et al. 2021),
    and on a least eigenvalue below a floor.

    Args:
        config: with their weights.
        case: the molecule.
        functional: in whose weights the penalty is differentiable.
        p: the density, ``[n]``. If it depends on the weights, as a minimum does, the penalty's gradient contains that
            dependence too: a third derivative of the energy, through the minimum.
        generator: of the random vectors.

    Returns:
        a scalar.
    """
    total = p.new_zeros(())
    if config.hessian_weight:
        v = torch.randn(len(p), generator=generator, dtype=p.dtype)
        image = Curvature(case, functional, p)(v)
        total = total + config.hessian_weight * image.square().sum() / len(p)
    if config.floor_weight:
        lacking, _ = floor_residual(config, case, functional, p, case.curvature(functional, p))
        total = total + 0.5 * lacking.square()
    return total


def floor_residual(
    config: OrbitalFreeTraining, case: Case, functional: OrbitalFree, p: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual whose half square is the penalty on a least eigenvalue :math:`\\lambda`,
    :math:`\\sqrt{2w}\\,(1-\\lambda/\\lambda_0)_+`.

    The eigenvector :math:`v` is that of the assembled Hessian, so that the residual is a function of the weights and of
    the density; to first order :math:`\\lambda=v^THv` changes with either as if it were fixed (Hellmann and Feynman).

    Args:
        p: see :func:`penalty`.
        matrix: the case's ``curvature`` at ``p``.

    Returns:
        a scalar that is differentiable in the functional's weights; ``p`` as it is differentiable in it too, ``[n]``.
    """
    lowest = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    curvature = Curvature(case, functional, p)
    least = lowest @ curvature(lowest)
    return (2 * config.floor_weight) ** 0.5 * (1 - least / config.floor).clamp_min(0), curvature.p


class Curvature:
    """Products with the projected Hessian in the metric's coordinates, differentiable in the weights and the
    density."""

    def __init__(self, case: Case, functional: OrbitalFree, p: Tensor):
        self.inverse, self.normal = case.plane
        self.p = p if p.requires_grad else p.detach().clone().requires_grad_()
        energy = functional(self.p, case.molecule)
        (self.slope,) = torch.autograd.grad(energy, self.p, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        """The product with ``v`` (``[n]``), projected."""
        inner = self.inverse @ self._projected(v)
        (image,) = torch.autograd.grad(self.slope, self.p, inner, create_graph=True, retain_graph=True)
        return self._projected(self.inverse @ image)

    def _projected(self, v: Tensor) -> Tensor:
        return project(v[None], self.normal)[0]
