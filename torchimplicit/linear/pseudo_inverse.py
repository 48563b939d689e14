"""Products with the pseudo-inverse of linear maps that need not be square."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchimplicit.coupling import Coupling
from torchimplicit.linear.base import LinearSolution, LinearSolver
from torchimplicit.linear.confirmed import separated, solve_any
from torchimplicit.linear.dense import Dense
from torchimplicit.linear.lsmr import LSMR
from torchimplicit.linear.operator import LinearOperator, Product
from torchimplicit.precision import UnitRows, safe_norm, working_dtype
from torchimplicit.solution import Report, Status


@dataclass(frozen=True, kw_only=True)
class RectangularOperator:
    """Linear maps :math:`A_i`, one per sample, from ``[batch, inner]`` to ``[batch, outer]``.

    Attributes:
        product, transposed_product: products with :math:`A_i` and with :math:`A_i^T`.
        batch, inner, outer, dtype, device: shapes, dtype and device of the vectors.
        coupling: see :class:`~torchimplicit.linear.LinearOperator`.
    """

    product: Product
    transposed_product: Product
    batch: int
    inner: int
    outer: int
    dtype: torch.dtype
    device: torch.device
    coupling: Coupling | None = None

    def flipped(self) -> RectangularOperator:
        """:math:`A_i^T`."""
        return replace(
            self, product=self.transposed_product, transposed_product=self.product, inner=self.outer, outer=self.inner
        )

    def square(self) -> LinearOperator:
        """The maps padded with zeros to square ones; their pseudo-inverses are the padded pseudo-inverses."""
        dim = max(self.inner, self.outer)

        def padded(product: Product, width: int) -> Product:
            return lambda v: filled(product(v[..., :width].contiguous()), dim)

        return self._operator(padded(self.product, self.inner), padded(self.transposed_product, self.outer), dim)

    def normal(self) -> LinearOperator:
        """:math:`A_i^TA_i`."""

        def product(v: Tensor) -> Tensor:
            return self.transposed_product(self.product(v))

        return replace(self._operator(product, product, self.inner), symmetric=True)

    def _operator(self, product: Product, transposed: Product, dim: int) -> LinearOperator:
        return LinearOperator(
            product=product,
            transposed_product=transposed,
            batch=self.batch,
            dim=dim,
            dtype=self.dtype,
            device=self.device,
            coupling=self.coupling,
        )


def filled(v: Tensor, dim: int) -> Tensor:
    """``v`` (``[..., k]``) padded with zeros to ``[..., dim]``."""
    return torch.nn.functional.pad(v, (0, dim - v.shape[-1]))


@torch.no_grad()
def pseudo_solve(solver: LinearSolver, operator: RectangularOperator, b: Tensor) -> LinearSolution:
    """The minimum-norm least-squares solutions :math:`A_i^+b_i` for ``b`` (``[batch, outer]``).

    :class:`Dense` uses the singular values, :class:`LSMR` the map itself, and any other method the normal equations of
    the smaller side, whose condition number is the square of the map's; or those of the other side where the first ones
    are inconsistent, as they may be without full rank. A sample counts as solved where the residual is within the
    tolerance, or where it is orthogonal to the range: :math:`\\lVert A^Tr\\rVert\\le rtol\\,\\lVert A^Tb\\rVert`, or no
    more than rounding.
    """
    whole = UnitRows.as_they_are(b)  # not scaled row by row, since rows may depend on each other
    right = whole.unit
    if isinstance(solver, Dense):
        value, steps, cost = _by_singular_values(operator, right)
    elif isinstance(solver, LSMR):
        square = operator.square()
        solution = solve_any(solver, square, filled(right, square.dim))
        value, steps, cost = solution.value[:, : operator.inner], solution.report.steps, solution.report.evaluations
    else:
        value, steps, cost = _by_normal_equations(solver, operator, right)
    rtol, atol = solver.tolerances(b.dtype)
    rest = right - operator.product(value)
    turned, first = operator.transposed_product(rest), operator.transposed_product(right)
    size, gap, moved, scale = safe_norm(rest), safe_norm(turned), safe_norm(first), safe_norm(right)
    # a lower bound of the norm of A from the products that were taken anyway
    stretch = torch.maximum(moved / scale.clamp_min(torch.finfo(b.dtype).tiny), _stretch(right, value, rest))
    eps = torch.finfo(b.dtype).eps
    within = size <= rtol * scale + atol
    least = gap <= 1.25 * rtol * moved + 32 * eps * stretch * (scale + stretch * safe_norm(value))
    relative = torch.where(within, size / scale.where(scale > 0, 1), gap / moved.where(moved > 0, 1))
    finite = whole.finite.squeeze(-1)
    spent = steps >= getattr(solver, "max_steps", torch.inf)
    failure = torch.where(spent, int(Status.MAX_STEPS), int(Status.BREAKDOWN))
    status = torch.where(within | least, int(Status.CONVERGED), failure)
    status = status.masked_fill(~finite, int(Status.NONFINITE))
    relative = torch.where(within | (gap > 0), relative, 0).masked_fill(~finite, torch.nan)
    return LinearSolution(whole.restored(value), Report(status, steps, relative.to(b.dtype), cost + 3))


def _by_normal_equations(
    solver: LinearSolver, operator: RectangularOperator, b: Tensor
) -> tuple[Tensor, Tensor, float]:
    """The value, the steps of each sample, and the products taken, by the normal equations."""
    steps, cost, value = torch.zeros(operator.batch, dtype=torch.int64, device=b.device), 0.0, None
    left = torch.ones_like(steps, dtype=torch.bool)
    if operator.inner > operator.outer:
        solution = solve_any(solver, operator.flipped().normal(), b)
        value, steps, cost = (
            operator.transposed_product(solution.value),
            solution.report.steps,
            solution.report.evaluations,
        )
        left = ~solution.report.converged
        if not bool(left.any()) or solver.preconditioned:
            return value, steps, cost
    solution = solve_any(solver, operator.normal(), operator.transposed_product(b))
    value = solution.value if value is None else torch.where(left[:, None], solution.value, value)
    return value, steps + torch.where(left, solution.report.steps, 0), cost + solution.report.evaluations


def _stretch(right: Tensor, value: Tensor, rest: Tensor) -> Tensor:
    """:math:`\\lVert Ay\\rVert/\\lVert y\\rVert` for ``value``, ``[batch]``."""
    length = safe_norm(value)
    return safe_norm(right - rest) / length.where(length > 0, torch.inf)


def _by_singular_values(operator: RectangularOperator, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """The value, the steps of each sample (one), and the products taken, by the pseudo-inverse of the matrix."""
    square, rows = separated(operator.square())
    dtype = working_dtype(b.dtype)
    matrix = square.dense().to(dtype)
    finite = matrix.isfinite().all(dim=2).all(dim=1)
    matrix = matrix.where(finite[:, None, None], 0)
    right = filled(b, square.dim // rows).reshape(len(matrix), square.dim, 1).to(dtype)
    inverse = torch.linalg.pinv(matrix, rtol=square.dim * torch.finfo(operator.dtype).eps)
    value = (inverse @ right)[:, :, 0].where(finite[:, None], torch.nan)
    value = value.reshape(operator.batch, square.dim // rows)[:, : operator.inner].to(b.dtype)
    steps = torch.ones(operator.batch, dtype=torch.int64, device=b.device)
    return value, steps, float(square.dim)
