"""Terms of the loss that hold the Hessian of the energy, at the density, in a good range."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.constraints import project
from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.settings import OrbitalFreeTraining

REFINEMENTS = 3
"""Steps of refinement that track the eigenvector of the least eigenvalue from one iteration to the next."""


class Penalties:
    """Penalties on the size of the Hessian along a random vector (the Jacobian regularization of Bai et al. 2021), and
    on a least eigenvalue below a floor, through its eigenvector, which is tracked during training."""

    def __init__(self, config: OrbitalFreeTraining):
        self.config = config
        self._generator = torch.Generator().manual_seed(config.seed)
        self._lowest: dict[int, Tensor] = {}

    def __call__(self, number: int, case: Case, functional: OrbitalFree, p: Tensor) -> Tensor:
        """A scalar that is differentiable in the functional's weights, the density ``p`` (``[n]``) held fixed.

        Args:
            number: number of the case, by which its eigenvector is remembered.
        """
        config, total = self.config, p.new_zeros(())
        if not config.hessian_weight and not config.floor_weight:
            return total
        curvature = Curvature(case, functional, p)
        if config.hessian_weight:
            v = torch.randn(len(p), generator=self._generator, dtype=p.dtype)
            total = total + config.hessian_weight * curvature(v).square().sum() / len(p)
        if config.floor_weight:
            known = number in self._lowest
            start = self._lowest[number] if known else torch.randn(len(p), generator=self._generator, dtype=p.dtype)
            lowest = self._lowest[number] = curvature.lowest(start, REFINEMENTS if known else 10 * REFINEMENTS)
            least = lowest @ curvature(lowest)
            total = total + config.floor_weight * (1 - least / config.floor).clamp_min(0).square()
        return total


def floor_residual(
    config: OrbitalFreeTraining, case: Case, functional: OrbitalFree, p: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual whose half square is the penalty on a least eigenvalue, for optimizers of residuals.

    The eigenvector is that of the assembled Hessian, so that the residual is a function of the weights alone.

    Args:
        p: the density, ``[n]``.
        matrix: the case's ``curvature`` there.

    Returns:
        a scalar that is differentiable in the functional's weights, ``p`` held fixed; its derivative by ``p``, ``[n]``.
    """
    lowest = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    curvature = Curvature(case, functional, p)
    least = lowest @ curvature(lowest)
    residual = (2 * config.floor_weight) ** 0.5 * (1 - least / config.floor).clamp_min(0)
    (along,) = torch.autograd.grad(residual, curvature.p, retain_graph=True)
    return residual, along


class Curvature:
    """Products with the projected Hessian in the metric's coordinates, differentiable in the weights."""

    def __init__(self, case: Case, functional: OrbitalFree, p: Tensor):
        self.inverse, self.normal = case.plane
        self.p = p.detach().clone().requires_grad_()
        energy = functional(self.p, case.molecule)
        (self.slope,) = torch.autograd.grad(energy, self.p, create_graph=True)

    def __call__(self, v: Tensor) -> Tensor:
        """The product with ``v`` (``[n]``), projected."""
        inner = self.inverse @ self._projected(v)
        (image,) = torch.autograd.grad(self.slope, self.p, inner, create_graph=True, retain_graph=True)
        return self._projected(self.inverse @ image)

    def lowest(self, v: Tensor, steps: int) -> Tensor:
        """A unit vector nearer to the eigenvector of the least eigenvalue than ``v``, by the locally optimal steps of
        Knyazev (2001): in the span of the vector, of its residual and of the step before."""
        v = self._projected(v)
        v = v / v.norm()
        before = torch.zeros_like(v)
        for _ in range(steps):
            image = self(v).detach()
            residual = self._projected(image - (v @ image) * v)
            if float(residual.norm()) < 1e-6 * float(image.norm()):
                break  # what is left is rounding, which may point along the normal, where the Hessian is nought
            directions = [v, residual / residual.norm()] + ([before] if bool(before.any()) else [])
            basis = torch.linalg.qr(torch.stack([self._projected(d) for d in directions], dim=1)).Q
            small = basis.T @ torch.stack([self(column).detach() for column in basis.T], dim=1)
            vector = basis @ torch.linalg.eigh(0.5 * (small + small.T)).eigenvectors[:, 0]
            before = vector - (vector @ v) * v
            before = before / before.norm().clamp_min(1e-300)
            v = vector / vector.norm()
        return v

    def _projected(self, v: Tensor) -> Tensor:
        return project(v[None], self.normal)[0]
