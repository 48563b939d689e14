"""The linear model of a residual: whether its matrix is assembled, its solution, and whether that is one."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.problems import System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solvers.base import Solver

ASSEMBLED = 128
"""Up to so many unknowns per sample, the Jacobian is assembled and factorized."""

ENTRIES = 2**22
"""The most entries of the Jacobians of a batch that are assembled."""

PATIENCE = 10
"""Steps that lower the residual by less than one in a thousand each, after which a sample breaks down."""


def solved_dense(matrix: Tensor, r: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The solutions of :math:`As=r`, and where they are such, equation by equation; where A is singular, the
    least-squares solution that is shortest in the units."""
    row = torch.linalg.vector_norm(matrix, dim=2)
    row = torch.where(row > 0, row, 1)  # an equation may have any unit
    found, info = torch.linalg.solve_ex(matrix / row[:, :, None], r / row)
    exact = (info == 0) & found.isfinite().all(dim=1) & meets(r, (matrix @ found[:, :, None])[:, :, 0])
    rows = (~exact & matrix.isfinite().all(dim=2).all(dim=1)).nonzero().squeeze(1)
    if len(rows):
        scaled = matrix[rows] * unit[rows, None, :]
        least = unit[rows] * (torch.linalg.pinv(scaled) @ r[rows, :, None])[:, :, 0]
        found = found.index_copy(0, rows, least)
    return found.nan_to_num(0, 0, 0), exact


def meets(r: Tensor, image: Tensor) -> Tensor:
    """bool ``[batch]``: whether ``image`` is what every equation asks for (``r``), to a tenth, or but for rounding:
    what is left of an equation is no less in doubt for being small beside another."""
    rounding = 1e3 * torch.finfo(r.dtype).eps
    return ((r - image).abs() <= 0.1 * r.abs() + rounding * image.abs()).all(dim=1)


def assembles(z: Tensor) -> bool:
    """Whether the Jacobians of the states ``z`` (``[batch, dim]``) are small enough to be assembled."""
    batch, dim = z.shape
    return dim <= ASSEMBLED and batch * dim * dim <= ENTRIES


def only_maps(solver: Solver, system: System) -> None:
    """Raise where ``solver``, which lowers the norm of a residual, cannot solve ``system``."""
    if not isinstance(system, MinimumSystem):
        return
    raise ValueError(
        f"{type(solver).__name__} lowers the norm of a residual, which at a maximum or a saddle of an energy is as "
        "small as at a minimum: for Minimum take LBFGS, NewtonCG or NewtonKrylov"
    )
