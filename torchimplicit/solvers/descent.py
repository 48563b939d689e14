"""Descent directions from the Hessian of an energy, where it may be indefinite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear import LinearOperator, LinearSolution
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point
from torchimplicit.solution import Status
from torchimplicit.solvers.base import Evaluator

DENSE, PROBES = 64, 24
"""The least eigenvalue is computed exactly up to ``DENSE`` unknowns, and by ``PROBES`` Lanczos steps beyond."""


class Descent(NamedTuple):
    """A descent direction.

    Attributes:
        direction: ``[batch, dim]``.
        exact: bool ``[batch]``, where it is Newton's step.
        negative: bool ``[batch]``, where the Hessian has a negative eigenvalue; ``None`` where that is not known, or
            where none has.
        downward: ``[batch, dim]``, the unit eigenvector of that eigenvalue; ``None`` as for ``negative``.
    """

    direction: Tensor
    exact: Tensor
    negative: Tensor | None = None
    downward: Tensor | None = None


def modified(operator: LinearOperator, residual: Tensor) -> Descent:
    """:math:`|H|^{-1}r` by the modulus of the eigenvalues of the assembled Hessian (Nocedal and Wright 2006, section
    3.4; Dauphin et al. 2014).

    Directions in which the Hessian is flat and the gradient nothing but rounding are left out of the step.

    Args:
        operator: the Hessian, symmetric.
        residual: minus the gradient, ``[batch, dim]``.
    """
    dtype = working_dtype(operator.dtype)
    matrix = operator.spectrum_matrix(dtype)
    r = operator.project(residual).to(dtype)
    finite = matrix.isfinite().all(dim=2).all(dim=1) & r.isfinite().all(dim=1)
    matrix = matrix.where(finite[:, None, None], torch.eye(operator.dim, dtype=dtype, device=matrix.device))
    # Cholesky first: near a minimum the Hessian is positive definite, and the eigenvalues, some ten times as expensive,
    # are computed for the other samples alone
    factor, info = torch.linalg.cholesky_ex(matrix)
    d = torch.cholesky_solve(r[:, :, None], factor)[:, :, 0]
    odd = (info > 0) | ~d.isfinite().all(dim=1)
    rows = odd.nonzero().squeeze(1)
    negative = downward = singular = None
    if len(rows):
        values, vectors = torch.linalg.eigh(matrix[rows])
        parts = (vectors.mT @ r[rows, :, None])[:, :, 0]
        flat = operator.dim * torch.finfo(operator.dtype).eps
        modulus, rounding = values.abs(), flat * values.abs().amax(dim=1, keepdim=True)
        nothing = (modulus <= rounding) & (parts.abs() <= 4 * flat * parts.norm(dim=1, keepdim=True))
        steps = torch.where(nothing | (rounding == 0), 0, parts / torch.maximum(modulus, rounding))
        # a Hessian of zeros: step along the gradient itself
        steps = torch.where(rounding == 0, parts, steps)
        d = d.index_copy(0, rows, (vectors @ steps[:, :, None])[:, :, 0])
        least = values[:, 0] < -rounding[:, 0]
        negative = torch.zeros_like(odd).index_copy(0, rows, least)
        lost = (modulus <= rounding) & ~nothing  # a gradient along a flat direction: Newton's equation has no solution
        singular = torch.zeros_like(odd).index_copy(0, rows, lost.any(dim=1))
        downward = torch.zeros_like(d).index_copy(0, rows, vectors[:, :, 0])
        downward = operator.project(downward.to(operator.dtype))
    d = d.where(finite[:, None], torch.nan)
    exact = finite if negative is None else finite & ~singular  # type: ignore[operator]
    return Descent(operator.project(d.to(operator.dtype)), exact | (residual == 0).all(dim=1), negative, downward)


def downhill(operator: LinearOperator, residual: Tensor, newton: LinearSolution) -> Descent:
    """A descent direction by products with the Hessian (Nocedal and Wright 2006, algorithm 7.1).

    It is the solution of Newton's equation where that descends and its solver met no negative curvature; elsewhere the
    iterate of conjugate gradients before they meet negative curvature.

    Args:
        operator: the Hessian.
        residual: minus the gradient, ``[batch, dim]``.
        newton: the linear solver's solution of Newton's equation.
    """
    d = newton.value
    bad = ~((d * residual).sum(dim=1) > 0) | (newton.report.status == Status.SADDLE)
    bad = bad & (residual != 0).any(dim=1)
    if not bool(bad.any()):
        return Descent(d, newton.report.converged)
    r = operator.project(residual)
    x, p, rr = torch.zeros_like(r), r, (r * r).sum(dim=1)
    first, live = rr, bad
    for step in range(min(operator.dim, 100)):
        image = operator.product(p)
        curvature, square = (p * image).sum(dim=1), (p * p).sum(dim=1)
        ahead = live & (curvature > torch.finfo(r.dtype).eps * square)
        if step == 0:  # negative curvature at once: step along the gradient, by the modulus of the curvature
            bent = torch.where(curvature != 0, rr / curvature.abs(), 1)
            x = torch.where((live & ~ahead)[:, None], bent[:, None] * r, x)
        live = ahead
        alpha = torch.where(live, rr / torch.where(live, curvature, 1), 0)[:, None]
        x, r = x + alpha * p, r - alpha * image
        after = (r * r).sum(dim=1)
        live = live & (after > 1e-4 * first)  # to a hundredth: far from a minimum a better direction brings no more
        if not bool(live.any()):
            break
        p = r + torch.where(live, after / rr, 0)[:, None] * p
        rr = after
    return Descent(torch.where(bad[:, None], x, d), newton.report.converged & ~bad)


def lowest(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    """The least eigenvalue of a symmetric operator, if negative, and a direction of negative curvature.

    Beyond ``DENSE`` dimensions these are Ritz values and vectors of ``PROBES`` Lanczos steps from a fixed random
    vector: a negative Ritz value proves a negative eigenvalue, but one may be missed.

    Returns:
        The eigenvalue ``[batch]``, zero where it is not negative beyond rounding; and the normalized sum of the unit
        eigenvectors of all negative eigenvalues, ``[batch, dim]``.
    """
    dtype, eps = working_dtype(operator.dtype), torch.finfo(operator.dtype).eps
    if operator.dim == 0:
        nothing = torch.zeros(operator.batch, operator.dim, dtype=operator.dtype, device=operator.device)
        return nothing.sum(dim=1).to(dtype), nothing
    basis = None
    if operator.dim <= DENSE:
        matrix = operator.spectrum_matrix(dtype)
    else:
        start = torch.randn(operator.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v = operator.project(start.to(operator.device, operator.dtype).expand(operator.batch, -1)).to(dtype)
        basis = images = v.new_zeros(operator.batch, operator.dim, 0)
        for _ in range(PROBES):
            for _ in range(2):  # orthogonalize twice: once leaves rounding behind ("twice is enough", Parlett 1998)
                v = v - (basis @ (basis.mT @ v[:, :, None]))[:, :, 0]
            v = torch.nn.functional.normalize(v, dim=1)
            image = operator.product(v.to(operator.dtype)).to(dtype)
            basis, images = (torch.cat((t, c[:, :, None]), dim=2) for t, c in ((basis, v), (images, image)))
            v = image
        matrix = basis.mT @ images
        matrix = 0.5 * (matrix + matrix.mT)
    finite = matrix.isfinite().all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eigh(matrix.where(finite[:, None, None], 0))
    rounding = operator.dim * eps * values.abs().amax(dim=1, keepdim=True)
    negative = values < -rounding
    vector = torch.nn.functional.normalize((vectors * negative[:, None, :]).sum(dim=2), dim=1)
    if basis is not None:
        vector = (basis.nan_to_num(0, 0, 0) @ vector[:, :, None])[:, :, 0]
    return torch.where(negative[:, 0], values[:, 0], 0), operator.project(vector.to(operator.dtype))


def leave(
    evaluate: Evaluator, point: Point, rest: Point, downward: Tensor, chosen: Tensor, trials: int
) -> tuple[Point, Tensor]:
    """Move samples off a saddle, along a direction of negative curvature, to where the energy is lower.

    Args:
        evaluate: evaluates the energy.
        point: where the ``chosen`` samples are stationary.
        rest: the points of the other samples.
        downward: unit directions of negative curvature, ``[batch, dim]``.
        chosen: bool ``[batch]``, the samples to move.
        trials: the most distances to try, beginning with the size of the state, each a quarter of the one before.

    Returns:
        ``rest`` with the ``chosen`` samples moved; and bool ``[batch]``, those for which no trial lowered the energy.
    """
    assert point.energy is not None
    size = torch.linalg.vector_norm(point.z, dim=1, keepdim=True)
    way = downward * torch.where(size > 0, size, 1)
    # both sides go down: take the one that the gradient, if any is left, prefers
    way = torch.where((way * point.residual).sum(dim=1, keepdim=True) < 0, -way, way)
    left = chosen
    for _ in range(trials):
        tried = evaluate(evaluate.project(torch.where(left[:, None], point.z + way, rest.z)))
        assert tried.energy is not None
        lower = left & (tried.energy < point.energy)
        rest = tried.select(lower, rest)
        left = left & ~lower
        if not bool(left.any()):
            break
        way = 0.25 * way
    return rest, left
