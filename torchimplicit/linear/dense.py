"""Direct solution of assembled systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.linear.base import LinearSolution, LinearSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.options import check_vectors
from torchimplicit.precision import default_rtol, working_dtype
from torchimplicit.solution import Report, Status
from torchimplicit.validation import check_nonnegative


@final
@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Assembles the matrices from ``dim`` products and factorizes them by LU: exact, and best for small ``dim``.

    Takes memory for ``batch * dim**2`` entries and time for ``batch * dim**3``. With a null vector :math:`n` it solves
    the bordered (KKT) system :math:`\\begin{pmatrix}A & n\\\\ n^T & 0\\end{pmatrix}`, which is regular. A sample whose
    matrix is singular gets ``Status.BREAKDOWN`` and the least-squares solution of least norm. The residual is taken
    from the matrices; no starting point is needed, and ``x0`` is only checked.

    Attributes:
        rtol: relative residual up to which a sample counts as solved; ``None`` stands for ``eps(dtype)**(2/3)``.
        atol: absolute residual up to which it does.
    """

    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative(self, "rtol", optional=True)
        check_nonnegative(self, "atol")

    @torch.no_grad()
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for ``b`` (``[batch, dim]``). Runs without recording gradients.

        Raises:
            ValueError: if ``b`` or ``x0`` does not fit the operator.
        """
        check_vectors(operator, b, x0)
        dtype = working_dtype(b.dtype)
        rhs, matrix = operator.project(b.to(dtype)), (operator.unprojected or operator).dense().to(dtype)
        scale = torch.linalg.vector_norm(rhs, dim=-1)
        finite = matrix.isfinite().all(-1).all(-1) & (scale < torch.inf)
        eye = torch.eye(operator.dim, dtype=dtype, device=b.device)
        matrix = matrix.where(finite[:, None, None], eye)
        rhs = rhs.where(finite[:, None], 0.0)
        null = None if operator.null is None else operator.null.to(dtype).expand(operator.batch, -1)

        tolerance = self.atol + (default_rtol(b.dtype) if self.rtol is None else self.rtol) * scale
        full, extended = _bordered(matrix, rhs, null) if null is not None else (matrix, rhs)
        x, regular = _solve(full, extended)
        residual = _residual_norm(operator, matrix, rhs, x)
        solved = regular & (residual <= tolerance)
        failed = (~solved & finite).nonzero().squeeze(1)
        if len(failed):
            least = (torch.linalg.pinv(full[failed]) @ extended[failed].unsqueeze(-1)).squeeze(-1)
            other = x.index_copy(0, failed, least)
            size = _residual_norm(operator, matrix, rhs, other)
            better = ~(residual <= size)
            x, residual = other.where(better[:, None], x), size.where(better, residual)
        status = torch.where(solved, int(Status.CONVERGED), int(Status.BREAKDOWN))
        status = torch.where(finite, status, int(Status.NONFINITE))
        relative = (residual / scale.where(scale > 0, 1.0)).where(finite, torch.nan)
        report = Report(status, torch.ones_like(status), relative.to(b.dtype), float(operator.dim))
        return LinearSolution(x[:, : operator.dim].to(b.dtype), report)


def _bordered(matrix: Tensor, b: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """The system that also asks for a solution orthogonal to ``null``.

    The border takes the size of the matrix's entries, or the bordered system would be ill-conditioned.
    """
    size = matrix.abs().amax((-2, -1), keepdim=True)
    border = (null * size.where(size > 0, 1.0).squeeze(-1)).unsqueeze(-1)
    rows = torch.cat((matrix, border), -1), torch.cat((border.mT, torch.zeros_like(size)), -1)
    return torch.cat(rows, -2), torch.cat((b, torch.zeros_like(b[:, :1])), -1)


def _solve(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The solutions by LU, refined once, and whether they could be had; NaN where not."""
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    b = b.unsqueeze(-1)
    x = torch.linalg.lu_solve(lu, pivots, b)
    x = (x + torch.linalg.lu_solve(lu, pivots, b - matrix @ x)).squeeze(-1)
    regular = (info == 0) & x.isfinite().all(-1)
    return x.where(regular[:, None], torch.nan), regular


def _residual_norm(operator: LinearOperator, matrix: Tensor, b: Tensor, x: Tensor) -> Tensor:
    image = (matrix @ x[:, : operator.dim].unsqueeze(-1)).squeeze(-1)
    return torch.linalg.vector_norm(operator.project(b - image), dim=-1)
