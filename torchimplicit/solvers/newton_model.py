"""The linear model of a residual: when its matrix is assembled, and its solution with a test of it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.problems import System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solvers.base import Solver

ASSEMBLED = 128
"""The Jacobian is assembled and factorized up to this many unknowns per sample."""

ENTRIES = 2**22
"""The most entries of the assembled Jacobians of a batch."""

PATIENCE = 10
"""A sample breaks down after this many steps in a row without progress."""


def solved_dense(matrix: Tensor, r: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Solve :math:`As=r`; where A is singular, take the least-squares solution that is shortest in the given units.

    Args:
        matrix: A, ``[batch, dim, dim]``.
        r: ``[batch, dim]``.
        unit: the unit of each unknown, ``[batch, dim]``.

    Returns:
        s ``[batch, dim]``; and bool ``[batch]``, where it satisfies every equation.
    """
    # rows of unit length: equations in other units must not decide which pivots the factorization takes
    row = torch.linalg.vector_norm(matrix, dim=2)
    row = torch.where(row > 0, row, 1)
    s, info = torch.linalg.solve_ex(matrix / row[:, :, None], r / row)
    exact = (info == 0) & s.isfinite().all(dim=1) & meets(r, (matrix @ s[:, :, None])[:, :, 0])
    rows = (~exact & matrix.isfinite().all(dim=2).all(dim=1)).nonzero().squeeze(1)
    if len(rows):
        scaled = matrix[rows] * unit[rows, None, :]
        least = unit[rows] * (torch.linalg.pinv(scaled) @ r[rows, :, None])[:, :, 0]
        s = s.index_copy(0, rows, least)
    return s.nan_to_num(0, 0, 0), exact


def meets(r: Tensor, image: Tensor) -> Tensor:
    """bool ``[batch]``: whether ``image`` (``[batch, dim]``) equals ``r`` to a tenth, or up to rounding, in every
    equation by itself. Beside a large equation, the norm would not show a small one that is unsolved."""
    rounding = 1e3 * torch.finfo(r.dtype).eps
    return ((r - image).abs() <= 0.1 * r.abs() + rounding * image.abs()).all(dim=1)


def assembles(z: Tensor) -> bool:
    """Return whether the Jacobians of the states ``z`` (``[batch, dim]``) are small enough to be assembled."""
    batch, dim = z.shape
    return dim <= ASSEMBLED and batch * dim * dim <= ENTRIES


def only_maps(solver: Solver, system: System) -> None:
    """Raise ``ValueError`` for a minimum, which ``solver`` cannot solve since it lowers the norm of a residual."""
    if not isinstance(system, MinimumSystem):
        return
    raise ValueError(
        f"{type(solver).__name__} lowers the norm of a residual, which at a maximum or a saddle of an energy is as "
        "small as at a minimum: for Minimum take LBFGS, NewtonCG or NewtonKrylov"
    )
