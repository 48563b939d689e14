"""The extreme eigenvalues of symmetric operators."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner
from torchimplicit.linear.system import LinearSystem
from torchimplicit.precision import widened, working_dtype
from torchimplicit.state import row_norm

LEAST_ERROR, LARGEST_ERROR = 1e-2, 3e-2
"""Where Davidson's method stops: the residual of a Ritz pair over its value. The value's own error is of the square."""
ZERO = 1e-3
"""Of the largest eigenvalue: a least one of smaller modulus is sought as if it were so large."""
SMALL = 16
"""Dimensions up to which a dense matrix is as cheap as anything."""


@torch.no_grad()
def extreme_eigenvalues(
    operator: LinearOperator, subspace: int = 128, seed: int = 0, preconditioner: Preconditioner | None = None
) -> tuple[Tensor, Tensor]:
    """The least and the largest eigenvalue, ``[batch]`` each, on the complement of the operator's null vector; NaN for
    a sample whose products are not finite.

    Exact up to ``subspace`` dimensions; beyond, the extreme Ritz values of so many Lanczos steps, fully
    reorthogonalized (Saad 2011, section 6.3), which approach the eigenvalues from inside.

    With a preconditioner they are found to a few digits, by Davidson's method (Morgan and Scott 1986; Saad 2011,
    section 8.4), likewise from inside: near a Hessian that is kept, some ten products do.

    Args:
        operator: symmetric.
        subspace: the most products that are taken.
        seed: of the first vector.
        preconditioner: of systems with this operator.
    """
    if preconditioner is not None and operator.dim > SMALL:
        free = operator.dim - (operator.null is not None)
        return _davidson(operator, min(subspace, free), seed, preconditioner)
    return _dense(operator) if operator.dim <= subspace else _lanczos(operator, subspace, seed)


def _dense(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    return _ends(operator.spectrum_matrix(working_dtype(operator.dtype)))


def _ends(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest eigenvalue of symmetric matrices; NaN for one that is not finite."""
    sound = matrix.isfinite().all(dim=2).all(dim=1)
    values = torch.linalg.eigvalsh(torch.where(sound[:, None, None], matrix, 0)).masked_fill(~sound[:, None], torch.nan)
    return values[:, 0], values[:, -1]


def _lanczos(operator: LinearOperator, size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v = widened(_random(operator, generator))
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
        fresh = _orthogonal(widened(_random(operator, generator)), basis[:, : j + 1])
        v = torch.where(done[:, None], operator.project(fresh), v)
        length = row_norm(v)
    return _ends(tridiagonal)


def _davidson(operator: LinearOperator, size: int, seed: int, preconditioner: Preconditioner) -> tuple[Tensor, Tensor]:
    """The space grows by the preconditioned residual of the least Ritz pair and by that of the largest itself."""
    system = LinearSystem.of(operator, preconditioner, definite=True)
    generator = torch.Generator().manual_seed(seed)
    first, second = _random(operator, generator), _random(operator, generator)
    wanted = [system.precondition(first), second]
    basis = images = widened(first).new_zeros(operator.batch, 0, operator.dim)
    while True:
        for v in wanted[: size - basis.shape[1]]:
            length = row_norm(widened(v))
            v = _orthogonal(widened(operator.project(v)), basis)
            spent = row_norm(v) <= 100 * torch.finfo(v.dtype).eps * length
            v = torch.where(spent[:, None], _orthogonal(widened(_random(operator, generator)), basis), v)
            v = widened(operator.project((v / row_norm(v)[:, None]).to(operator.dtype)))
            basis = torch.cat([basis, v[:, None]], dim=1)
            images = torch.cat([images, widened(operator.product(v.to(operator.dtype)))[:, None]], dim=1)
        small = torch.bmm(basis, images.mT)
        sound = small.isfinite().all(dim=2).all(dim=1)[:, None]
        values, vectors = torch.linalg.eigh(torch.where(sound[..., None], 0.5 * (small + small.mT), 0))
        ends, pairs = values[:, [0, -1]].masked_fill(~sound, torch.nan), vectors[:, :, [0, -1]].mT
        residuals = torch.bmm(pairs, images) - ends[:, :, None] * torch.bmm(pairs, basis)
        largest = ends.abs().amax(dim=1)
        least = ends[:, 0].abs().maximum(ZERO * largest)
        bounds = torch.stack([LEAST_ERROR * least, LARGEST_ERROR * largest], dim=1)
        done = (~sound | (torch.linalg.vector_norm(residuals, dim=2) <= bounds)).all(dim=0).tolist()
        if basis.shape[1] >= size or all(done):
            return ends[:, 0], ends[:, 1]
        first, second = residuals.to(operator.dtype).unbind(dim=1)
        wanted = [v for v, there in zip((system.precondition(first), second), done, strict=True) if not there]


def _random(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """Vectors ``[batch, dim]`` without a component along the null vector."""
    drawn = torch.randn(operator.batch, operator.dim, generator=generator)
    return operator.project(drawn.to(operator.device, operator.dtype))


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """``w`` (``[batch, dim]``) without its components along the rows of ``basis`` (``[batch, k, dim]``)."""
    for _ in range(2):  # twice is enough (Kahan)
        w = w - torch.bmm(torch.bmm(w[:, None], basis.mT), basis)[:, 0]
    return w
