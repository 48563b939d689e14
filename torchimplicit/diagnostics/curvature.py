"""The extreme eigenvalues of a minimum's Hessian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear import LinearOperator
from torchimplicit.precision import widened
from torchimplicit.problems import Minimum
from torchimplicit.solve import flat_system
from torchimplicit.state import row_norm
from torchimplicit.validation import at_least


class Curvature(NamedTuple):
    """The least and the largest eigenvalue, each ``[batch]`` (a scalar if the problem is not batched)."""

    least: Tensor
    largest: Tensor

    @property
    def condition(self) -> Tensor:
        """The condition number; infinite where the Hessian is not positive definite."""
        return torch.where(self.least > 0, self.largest / self.least, torch.inf)


@torch.compiler.disable
def curvature(problem: Minimum, z: Any, *args: Any, subspace: int = 128, seed: int = 0) -> Curvature:
    """The extreme eigenvalues of the Hessian of the energy on the constraint, :math:`PHP` on the range of :math:`P`.

    A least eigenvalue that is negative says that the point is a saddle, where an adjoint solve gives a gradient of the
    wrong sign; one near zero, that the solution's derivative is about to grow without bound. Up to ``subspace``
    dimensions both are exact, from a dense Hessian; beyond, they are the extreme Ritz values of as many Lanczos steps,
    fully reorthogonalized (Saad 2011, section 6.3), which approach the eigenvalues from inside: a negative Ritz value
    proves a negative eigenvalue. Not differentiable.

    Args:
        problem, z, args: as for :func:`solve`; usually the solution's value.
        subspace: the most products that are taken.
        seed: of the first vector.
    """
    if not isinstance(problem, Minimum):
        raise TypeError(f"curvature looks at the Hessian of a Minimum, and it was given a {type(problem).__name__}")
    at_least("curvature", "subspace", subspace, 2)
    with torch.no_grad():
        system, flat, params = flat_system(problem, z, args)
        operator = system.operator(system.linearize(flat, params), False)
        least, largest = _dense(operator) if operator.dim <= subspace else _lanczos(operator, subspace, seed)
    least, largest = least.to(flat.dtype), largest.to(flat.dtype)
    return Curvature(least, largest) if problem.batched else Curvature(least[0], largest[0])


def _dense(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    matrix = widened(operator.dense())
    matrix = 0.5 * (matrix + matrix.mT)
    if operator.null is not None:
        # an eigenvalue in the midst of the others takes the place of the zero along the null vector
        null = operator.null.to(matrix.dtype).expand(operator.batch, -1)
        mean = matrix.diagonal(dim1=1, dim2=2).sum(dim=1) / max(1, operator.dim - 1)
        matrix = matrix + mean[:, None, None] * null[:, :, None] * null[:, None, :]
    values = torch.linalg.eigvalsh(matrix)
    return values[:, 0], values[:, -1]


def _lanczos(operator: LinearOperator, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.batch, operator.dim, generator=generator)
    v = widened(operator.project(start.to(operator.device, operator.dtype)))
    basis = v.new_zeros(operator.batch, size, operator.dim)
    tridiagonal = v.new_zeros(operator.batch, size, size)
    length = row_norm(v)
    for j in range(size):
        v = v / length.clamp_min(torch.finfo(v.dtype).tiny)[:, None]
        basis[:, j] = v
        w = widened(operator.product(v.to(operator.dtype)))
        tridiagonal[:, j, j] = (v * w).sum(dim=1)
        scale = row_norm(w)
        v = _orthogonal(w, basis[:, : j + 1])
        length = row_norm(v)
        if j + 1 == size:
            break
        # where the space is exhausted, another begins, orthogonal to it
        done = length <= 100 * torch.finfo(w.dtype).eps * scale
        tridiagonal[:, j, j + 1] = tridiagonal[:, j + 1, j] = torch.where(done, 0, length)
        fresh = torch.randn(operator.batch, operator.dim, generator=generator).to(operator.device, operator.dtype)
        v = torch.where(done[:, None], _orthogonal(widened(operator.project(fresh)), basis[:, : j + 1]), v)
        length = row_norm(v)
    values = torch.linalg.eigvalsh(tridiagonal)
    return values[:, 0], values[:, -1]


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """``w`` (``[batch, dim]``) without its components along the rows of ``basis`` (``[batch, k, dim]``)."""
    for _ in range(2):  # twice is enough (Kahan)
        w = w - torch.bmm(torch.bmm(w[:, None], basis.mT), basis)[:, 0]
    return w
