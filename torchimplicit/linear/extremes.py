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
"""Davidson's method stops where the residual of a Ritz pair, relative to its value, is this small. The error of the
value itself is of the order of the square."""
ZERO = 1e-3
"""A least eigenvalue below this share of the largest is sought to the accuracy of one of this size."""
SMALL = 16
"""Up to this many dimensions a dense matrix is always the cheapest."""


@torch.no_grad()
def extreme_eigenvalues(
    operator: LinearOperator, subspace: int = 128, seed: int = 0, preconditioner: Preconditioner | None = None
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of a symmetric operator, on the complement of its null vector.

    They are exact up to ``subspace`` dimensions. Beyond, they are the extreme Ritz values of ``subspace`` Lanczos steps
    with full reorthogonalization (Saad 2011, section 6.3), which lie within the spectrum and approach its ends. With a
    preconditioner they are found to a few digits by Davidson's method (Morgan and Scott 1986; Saad 2011, section 8.4),
    from within the spectrum as well; near a reference Hessian some ten products are enough.

    Args:
        operator: symmetric.
        subspace: the most products that are taken.
        seed: seed of the random first vector.
        preconditioner: for systems with this operator.

    Returns:
        Two tensors ``[batch]``; NaN for a sample whose products are not finite.
    """
    if preconditioner is not None and operator.dim > SMALL:
        free = operator.dim - (operator.null is not None)
        return _davidson(operator, min(subspace, free), seed, preconditioner)
    return _dense(operator) if operator.dim <= subspace else _lanczos(operator, subspace, seed)


def _dense(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    return _ends(operator.spectrum_matrix(working_dtype(operator.dtype)))


def _ends(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of symmetric matrices; NaN for one that is not finite."""
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
        # projected again: where little is left of v, normalization would amplify rounding along the null vector
        v = operator.project(_orthogonal(w, basis[:, : j + 1]))
        length = row_norm(v)
        if j + 1 == size:
            break
        # an invariant subspace is exhausted: go on with a random vector orthogonal to it, decoupled by a zero
        done = length <= 100 * torch.finfo(w.dtype).eps * scale
        tridiagonal[:, j, j + 1] = tridiagonal[:, j + 1, j] = torch.where(done, 0, length)
        fresh = _orthogonal(widened(_random(operator, generator)), basis[:, : j + 1])
        v = torch.where(done[:, None], operator.project(fresh), v)
        length = row_norm(v)
    return _ends(tridiagonal)


def _davidson(operator: LinearOperator, size: int, seed: int, preconditioner: Preconditioner) -> tuple[Tensor, Tensor]:
    """Davidson's method for both ends. The space grows by the preconditioned residual of the smallest Ritz pair, and by
    the plain residual of the largest, which needs no preconditioner to converge."""
    system = LinearSystem.of(operator, preconditioner, definite=True)
    generator = torch.Generator().manual_seed(seed)
    first, second = _random(operator, generator), _random(operator, generator)
    expansions = [system.precondition(first), second]
    basis = images = widened(first).new_zeros(operator.batch, 0, operator.dim)
    while True:
        for v in expansions[: size - basis.shape[1]]:
            length = row_norm(widened(v))
            v = _orthogonal(widened(operator.project(v)), basis)
            spent = row_norm(v) <= 100 * torch.finfo(v.dtype).eps * length  # it lies in the space already
            v = torch.where(spent[:, None], _orthogonal(widened(_random(operator, generator)), basis), v)
            v = widened(operator.project((v / row_norm(v)[:, None]).to(operator.dtype)))
            basis = torch.cat([basis, v[:, None]], dim=1)
            images = torch.cat([images, widened(operator.product(v.to(operator.dtype)))[:, None]], dim=1)
        # Rayleigh-Ritz: the extreme eigenvalues within the space, and the residuals of their vectors
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
        expansions = [v for v, there in zip((system.precondition(first), second), done, strict=True) if not there]


def _random(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """Random vectors ``[batch, dim]`` orthogonal to the null vector."""
    drawn = torch.randn(operator.batch, operator.dim, generator=generator)
    return operator.project(drawn.to(operator.device, operator.dtype))


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """``w`` (``[batch, dim]``) without its components along the rows of ``basis`` (``[batch, k, dim]``)."""
    for _ in range(2):  # twice is enough (Kahan)
        w = w - torch.bmm(torch.bmm(w[:, None], basis.mT), basis)[:, 0]
    return w
