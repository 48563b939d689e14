"""The extreme eigenvalues of symmetric operators."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.precision import widened, working_dtype
from torchimplicit.state import row_norm


@torch.no_grad()
def extreme_eigenvalues(operator: LinearOperator, subspace: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The least and the largest eigenvalue, ``[batch]`` each, on the complement of the operator's null vector.

    Exact up to ``subspace`` dimensions; beyond, the extreme Ritz values of so many Lanczos steps, fully
    reorthogonalized (Saad 2011, section 6.3), which approach the eigenvalues from inside.

    Args:
        operator: symmetric.
        subspace: the most products that are taken.
        seed: of the first vector.
    """
    return _dense(operator) if operator.dim <= subspace else _lanczos(operator, subspace, seed)


def _dense(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    values = torch.linalg.eigvalsh(operator.spectrum_matrix(working_dtype(operator.dtype)))
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
        # rounding along the null vector would be blown up where little else is left
        v = operator.project(_orthogonal(w, basis[:, : j + 1]))
        length = row_norm(v)
        if j + 1 == size:
            break
        # where the space is exhausted, another begins, orthogonal to it
        done = length <= 100 * torch.finfo(w.dtype).eps * scale
        tridiagonal[:, j, j + 1] = tridiagonal[:, j + 1, j] = torch.where(done, 0, length)
        fresh = torch.randn(operator.batch, operator.dim, generator=generator).to(operator.device, operator.dtype)
        fresh = operator.project(_orthogonal(widened(operator.project(fresh)), basis[:, : j + 1]))
        v = torch.where(done[:, None], fresh, v)
        length = row_norm(v)
    values = torch.linalg.eigvalsh(tridiagonal)
    return values[:, 0], values[:, -1]


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """``w`` (``[batch, dim]``) without its components along the rows of ``basis`` (``[batch, k, dim]``)."""
    for _ in range(2):  # twice is enough (Kahan)
        w = w - torch.bmm(torch.bmm(w[:, None], basis.mT), basis)[:, 0]
    return w
