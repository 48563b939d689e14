"""Direct solution of assembled systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver
from torchimplicit.linear.gmres import GMRES
from torchimplicit.linear.joined import OfRows
from torchimplicit.linear.operator import LinearOperator, without_null
from torchimplicit.linear.options import check_block, check_vectors
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner
from torchimplicit.precision import UnitRows, default_rtol, safe_norm, working_dtype
from torchimplicit.solution import Report, Status
from torchimplicit.validation import check_nonnegative

JOINED_ENTRIES = 2**24
"""The most entries of a matrix that is assembled for a whole batch as one system."""


@final
@dataclass(frozen=True, kw_only=True)
class Dense(BlockSolver):
    """Assembles the matrices by ``dim`` products and factorizes them (LU): exact, and best for small ``dim``.

    Takes memory for ``batch * dim**2`` entries and time proportional to ``batch * dim**3``. With a null vector
    :math:`n` it solves the bordered (KKT) system :math:`\\begin{pmatrix}A & n\\\\ n^T & 0\\end{pmatrix}`, which is
    regular.

    A sample whose matrix is singular after equilibration of its rows and columns gets the least-squares solution of
    minimum norm: with ``Status.CONVERGED`` and an infinite ``condition`` if that solves the system, and with
    ``Status.BREAKDOWN`` otherwise. For a symmetric operator, the report's ``curvature`` holds the smallest eigenvalue
    of each matrix that has a negative one. Residuals are computed from the matrices; ``x0`` is checked but not used.

    Attributes:
        rtol: the relative residual up to which a sample counts as solved; ``None`` stands for ``eps(dtype)**(2/3)``. A
            residual no larger than both the rounding of :math:`Ay` and ``eps**(1/2)`` counts as solved too: the
            solution is then as accurate as the condition of the matrix allows.
        atol: the absolute residual up to which a sample counts as solved.

    Raises:
        ValueError: a tolerance is negative.
    """

    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative(self, "rtol", optional=True)
        check_nonnegative(self, "atol")

    def init(self) -> FactorizedOnce:
        return FactorizedOnce(self)

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        return default_rtol(dtype) if self.rtol is None else self.rtol, self.atol

    def joined(self, operator: LinearOperator, joined: LinearOperator) -> LinearSolver:
        """Itself, or, where the joined matrix is too large, GMRES preconditioned by the matrices of single samples."""
        if joined.batch * joined.dim**2 <= JOINED_ENTRIES:
            return self
        rtol, atol = self.tolerances(joined.dtype)
        return GMRES(rtol=rtol, atol=atol, max_steps=1000, preconditioner=OfRows(_Matrices(), operator))

    @torch.no_grad()
    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for ``b`` (``[batch, dim]``). Records no gradients.

        Raises:
            ValueError: ``b`` or ``x0`` does not fit the operator.
        """
        check_vectors(operator, b, x0)
        solution = self.substitute(Factorization.of(operator), b[None])
        return LinearSolution(solution.value[0], solution.report)

    @torch.no_grad()
    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        check_block(operator, b)
        return self.substitute(Factorization.of(operator), b)

    def substitute(self, factors: Factorization, b: Tensor, transposed: bool = False) -> LinearSolution:
        """Solve for a block ``[k, batch, dim]`` with given factors, or with the transposed matrices."""
        rtol, atol = self.tolerances(b.dtype)
        whole = UnitRows.of(b.to(factors.matrix.dtype))
        finite = factors.finite & whole.finite.squeeze(-1)
        rhs = factors.project(whole.unit).where(finite[..., None], 0.0)
        scale = torch.linalg.vector_norm(rhs, dim=-1)
        tolerance = rtol * scale + atol * whole.factor.squeeze(-1)
        x, regular = factors.solve(rhs, transposed)
        residual = factors.residual_norm(rhs, x, transposed)
        solved, limit, suspect = regular & (residual <= tolerance), tolerance, factors.suspect & factors.finite

        def failing(solved: Tensor) -> Tensor:
            """The samples that need a closer look, int64."""
            return ((~solved & finite).any(0) | suspect).nonzero().squeeze(1)

        failed = failing(solved)
        if len(failed):
            # no residual can be smaller than the rounding of the product with the solution (Wilkinson 1963); accepted
            # as long as half of the digits are left
            eps, norm = torch.finfo(x.dtype).eps, safe_norm(factors.matrix.flatten(1))
            rounding = (eps * norm * safe_norm(x)).nan_to_num(0.0).minimum(eps**0.5 * scale)
            limit = tolerance.maximum(rounding)
            solved = regular & (residual <= limit)
            failed = failing(solved)
        singular = torch.zeros_like(factors.finite)
        if len(failed):
            singular = singular.index_copy(0, failed, factors.singular(failed))
            other = x.index_copy(1, failed, factors.least_squares(rhs, failed, transposed))
            size = factors.residual_norm(rhs, other, transposed)
            # a consistent singular system has many solutions: the one of minimum norm is returned, even where LU found
            # another
            better = ~(residual <= size) | (singular & (size <= tolerance))
            x, residual = other.where(better[..., None], x), size.where(better, residual)
            solved = (solved | singular) & (residual <= torch.where(singular, tolerance, limit))
        status = torch.where(solved, int(Status.CONVERGED), int(Status.BREAKDOWN))
        status = torch.where(finite, status, int(Status.NONFINITE)).amax(0)
        unit = scale.where(scale > 0, 1.0)
        relative = (residual / unit).where(finite, torch.nan).amax(0)
        report = Report(
            status,
            torch.ones_like(status),
            relative.to(b.dtype),
            float(factors.products),
            curvature=None if factors.curvature is None else factors.curvature.to(b.dtype),
            condition=(factors.size * torch.linalg.vector_norm(x, dim=-1) / scale.where(scale > 0, 1.0))
            .amax(0)
            .masked_fill(singular, torch.inf)
            .to(b.dtype),
        )
        return LinearSolution(whole.restored(x).to(b.dtype), report)


class FactorizedOnce(BlockSolver):
    """:class:`Dense` for the operators of one point: factorizes once for :math:`A` and :math:`A^T`."""

    def __init__(self, dense: Dense):
        self.dense = dense
        self._factors: dict[int, tuple[Factorization, bool]] = {}

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        return self.dense.tolerances(dtype)

    def joined(self, operator: LinearOperator, joined: LinearOperator) -> LinearSolver:
        solver = self.dense.joined(operator, joined)
        return self if solver is self.dense else solver

    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        solution = self.solve_block(operator, b[None])
        return LinearSolution(solution.value[0], solution.report)

    @torch.no_grad()
    def solve_block(self, operator: LinearOperator, b: Tensor) -> LinearSolution:
        if operator.batch not in self._factors:  # by batch size: the samples, and the batch as one system
            self._factors[operator.batch] = Factorization.of(operator), operator.transposed
        factors, flipped = self._factors[operator.batch]
        return self.dense.substitute(factors, b, transposed=operator.transposed != flipped)


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """The matrices of an operator with their LU factors, for any number of right-hand sides, transposed or not.

    Attributes:
        matrix: ``[batch, dim, dim]``, in the working precision; the identity for a sample that is not finite.
        null: ``[batch, dim]``, see :class:`LinearOperator`; the factors are then those of the bordered matrices.
        full: the factorized matrices: ``matrix``, bordered where there is a null vector.
        lu, pivots, info: the factors.
        finite: bool ``[batch]``, whether the assembled matrix is finite.
        curvature: ``[batch]``, the smallest eigenvalue on the complement of ``null`` where it is negative, else NaN;
            ``None`` where the operator is not symmetric.
        products: the number of products that assembling took.
    """

    matrix: Tensor
    null: Tensor | None
    full: Tensor
    lu: Tensor
    pivots: Tensor
    info: Tensor
    finite: Tensor
    curvature: Tensor | None
    products: int

    @classmethod
    def of(cls, operator: LinearOperator) -> Factorization:
        """Assemble and factorize the matrices of ``operator``."""
        dtype = working_dtype(operator.dtype)
        matrix = (operator.unprojected or operator).dense().to(dtype)
        finite = (matrix.amax((-2, -1)) < torch.inf) & (matrix.amin((-2, -1)) > -torch.inf)  # false where there is NaN
        if not bool(finite.all()):
            matrix = matrix.where(finite[:, None, None], torch.eye(operator.dim, dtype=dtype, device=matrix.device))
        null = None if operator.null is None else operator.null.to(dtype).expand(operator.batch, -1)
        full = matrix if null is None else _bordered(matrix, null)
        lu, pivots, info = torch.linalg.lu_factor_ex(full)
        return cls(
            matrix=matrix,
            null=null,
            full=full,
            lu=lu,
            pivots=pivots,
            info=info,
            finite=finite,
            curvature=_negative_curvature(matrix, null, operator.dtype) if operator.symmetric else None,
            products=operator.dim,
        )

    @property
    def size(self) -> Tensor:
        """A lower bound of the norm of each matrix, ``[batch]``: that of its largest column."""
        return torch.linalg.vector_norm(self.matrix, dim=-2).amax(-1)

    @property
    def suspect(self) -> Tensor:
        """bool ``[batch]``, where the smallest pivot is rounding beside the largest: the matrix is singular, or only
        badly scaled."""
        pivots = self.lu.diagonal(dim1=-2, dim2=-1).abs()
        if not pivots.shape[-1]:
            return torch.zeros_like(self.finite)
        return pivots.amin(-1) <= self._rounding * pivots.amax(-1)

    @property
    def _rounding(self) -> float:
        return self.lu.shape[-1] * torch.finfo(self.lu.dtype).eps

    def singular(self, rows: Tensor) -> Tensor:
        """bool ``[len(rows)]``, which of the samples ``rows`` are singular after equilibration."""
        matrix = self.full[rows]
        for dim in (-1, -2, -1, -2):  # Ruiz's scaling (2001): units of equations and unknowns do not count
            size = matrix.abs().amax(dim, keepdim=True).sqrt()
            matrix = matrix / torch.where(size > 0, size, 1)
        values = torch.linalg.svdvals(matrix)
        return values[:, -1] <= self._rounding * values[:, 0]

    def project(self, v: Tensor) -> Tensor:
        """``[..., batch, dim]`` without its component along ``null``."""
        return v if self.null is None else v - (v * self.null).sum(-1, keepdim=True) * self.null

    def solve(self, rhs: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """The solutions ``[k, batch, dim]``, refined once, NaN where the factorization fails; and bool ``[k, batch]``,
        where it does not."""
        b = self._columns(rhs)
        matrix = self.full.mT if transposed else self.full
        # one step of refinement makes Gaussian elimination stable for badly scaled rows as well (Skeel 1980)
        x = torch.linalg.lu_solve(self.lu, self.pivots, b, adjoint=transposed)
        x = x + torch.linalg.lu_solve(self.lu, self.pivots, b - matrix @ x, adjoint=transposed)
        x = self._rows(x)
        regular = (self.info == 0) & x.isfinite().all(-1)
        return x.where(regular[..., None], torch.nan), regular

    def least_squares(self, rhs: Tensor, rows: Tensor, transposed: bool) -> Tensor:
        """The least-squares solutions of minimum norm for the samples ``rows`` only: ``[k, len(rows), dim]``."""
        matrix = self.full.mT if transposed else self.full
        return self._rows(torch.linalg.pinv(matrix[rows]) @ self._columns(rhs)[rows])

    def residual_norm(self, rhs: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """The norms of ``rhs - A x`` (projected), ``[k, batch]``."""
        matrix = self.matrix.mT if transposed else self.matrix
        image = (matrix @ x.permute(1, 2, 0)).permute(2, 0, 1)
        return torch.linalg.vector_norm(self.project(rhs - image), dim=-1)

    def _columns(self, rhs: Tensor) -> Tensor:
        """Right-hand sides ``[k, batch, dim]`` as the columns of the system, ``[batch, dim or dim + 1, k]``."""
        columns = rhs.permute(1, 2, 0)
        return columns if self.null is None else torch.nn.functional.pad(columns, (0, 0, 0, 1))

    def _rows(self, columns: Tensor) -> Tensor:
        return columns[:, : self.matrix.shape[-1]].permute(2, 0, 1)


@final
@dataclass(frozen=True)
class _Matrices(Preconditioner):
    """The factorized matrices of the operator as a preconditioner; a singular one leaves its row as it is."""

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        factors = Factorization.of(operator)

        def solved(v: Tensor, transposed: bool) -> Tensor:
            x, regular = factors.solve(v[None].to(factors.matrix.dtype), transposed)
            return torch.where(regular[0][:, None], x[0].to(v.dtype), v)

        def restrict(rows: Tensor) -> PreparedPreconditioner:
            raise AssertionError("used for a whole batch only")

        return PreparedPreconditioner(
            inverse=lambda v: solved(v, False),
            transposed_inverse=lambda v: solved(v, True),
            restrict=restrict,
            setup_rows=operator.batch * operator.dim,
        )


def _bordered(matrix: Tensor, null: Tensor) -> Tensor:
    """The matrix of the system that also asks for a solution orthogonal to ``null``.

    The border is scaled to the size of the matrix's entries, or the bordered system would be ill-conditioned.
    """
    size = matrix.abs().amax((-2, -1), keepdim=True)
    border = (null * size.where(size > 0, 1.0).squeeze(-1)).unsqueeze(-1)
    return torch.cat((torch.cat((matrix, border), -1), torch.cat((border.mT, torch.zeros_like(size)), -1)), -2)


def _negative_curvature(matrix: Tensor, null: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The smallest eigenvalues of symmetric matrices on the complement of ``null``, NaN where they are not negative
    beyond the rounding of products in ``dtype``; ``[batch]``."""
    compressed = without_null(matrix, null)
    # a Cholesky factorization that succeeds proves the matrix positive definite at a fraction of the eigenvalues' cost
    _, info = torch.linalg.cholesky_ex(compressed)
    least = matrix.new_full((len(matrix),), torch.nan)
    rows = info.nonzero().squeeze(1)
    if len(rows):
        values = torch.linalg.eigvalsh(compressed[rows])
        rounding = matrix.shape[-1] * torch.finfo(dtype).eps * values.abs().amax(dim=1)
        least[rows] = values[:, 0].masked_fill(values[:, 0] >= -rounding, torch.nan)
    return least
