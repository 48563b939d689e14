"""Approximate inverses that make a linear system easier to solve.

A preconditioner stands for a matrix :math:`M_i \\approx A_i` per sample whose inverse is cheap. Once a solve, the
solver calls :meth:`~Preconditioner.prepare` with the operator. The result multiplies by :math:`M_i^{-1}`, can be
restricted to the rows that a solve still works on, and has a transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator, Product
from torchimplicit.precision import working_dtype


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPreconditioner:
    """The inverse of a preconditioner, made for one operator.

    Attributes:
        inverse: ``[batch, dim] -> [batch, dim]``, :math:`M_i^{-1}` times row i.
        transposed_inverse: the same with :math:`M_i^{-T}`.
        restrict: ``rows -> PreparedPreconditioner`` of those samples only (rows: int64 ``[k]``, into this batch).
        setup_rows: the row products that making it cost.
    """

    inverse: Product
    transposed_inverse: Product
    restrict: Callable[[Tensor], PreparedPreconditioner]
    setup_rows: int = 0

    def transpose(self) -> PreparedPreconditioner:
        """The preconditioner of the transposed operator."""
        return PreparedPreconditioner(
            inverse=self.transposed_inverse,
            transposed_inverse=self.inverse,
            restrict=lambda rows: self.restrict(rows).transpose(),
            setup_rows=self.setup_rows,
        )

    def orthogonal_to(self, null: Tensor) -> PreparedPreconditioner:
        """This preconditioner made consistent with a null vector :math:`w` (``[batch or 1, dim]``) of the operator.

        :math:`M^{-1} - M^{-1}w\\,w^T M^{-1} / (w^T M^{-1} w)` maps into the complement of :math:`w` and inverts
        :math:`M` there. Without it, a preconditioned method would leave the space on which the operator is regular.
        """

        def projected(inverse: Product) -> Product:
            u = inverse(null)
            u = u / (null * u).sum(-1, keepdim=True)

            def apply(v: Tensor) -> Tensor:
                y = inverse(v)
                return torch.addcmul(y, (y * null).sum(-1, keepdim=True), u, value=-1)

            return apply

        return PreparedPreconditioner(
            inverse=projected(self.inverse),
            transposed_inverse=projected(self.transposed_inverse),
            restrict=lambda rows: self.restrict(rows).orthogonal_to(null[rows]),
            setup_rows=self.setup_rows,
        )


class Preconditioner(ABC):
    """Base class of the preconditioners: matrices close to the system's whose inverse is cheap to apply."""

    @abstractmethod
    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        """Make the inverse for one operator, in float32 at least.

        Args:
            operator: the system to be solved. Where it is ``transposed``, a non-symmetric preconditioner is too.
            definite: whether the inverse has to be symmetric positive definite (as ``CG`` and ``MINRES`` need).
        """

    def init(self) -> Preconditioner:
        """Return the same preconditioner with a memory for a sequence of solves; itself where there is nothing to
        remember.

        A preconditioner is frozen, and a solve does not depend on earlier ones. Anything that is carried from one solve
        to the next lives in an object that the user makes with this method and passes to the solvers that share it.
        """
        return self

    def outlived(self, steps: int) -> bool:
        """Return whether it should be made anew after a minimization has taken ``steps`` steps with it."""
        return False

    def refresh(self) -> None:
        """Forget what was remembered, if anything was."""

    def after_solve(self, steps: Tensor) -> None:
        """Called at the end of a linear solve with the steps of its samples, int64 ``[batch]``."""


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Preconditioner):
    """Division by a known diagonal.

    Attributes:
        values: the diagonal of A, ``[dim]`` or ``[batch, dim]``, without zeros. Where a positive definite
            preconditioner is needed, the absolute values are taken.

    Raises:
        ValueError: ``values`` has another shape, or holds zeros or numbers that are not finite.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.dim() not in (1, 2):
            raise ValueError("Diagonal(values): values must be a tensor [dim] or [batch, dim], the diagonal of A.")
        if not bool((self.values.isfinite() & (self.values != 0)).all()):
            raise ValueError("Diagonal(values): values has entries that are zero or not finite, which have no inverse.")

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        values = self.values.detach().to(operator.device, working_dtype(operator.dtype))
        values = values if values.dim() == 2 else values[None]
        _check_shape("Diagonal(values)", values, operator, 1)
        return _multiplication((values.abs() if definite else values).reciprocal())


@final
@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Division by the exact diagonal of A, from ``dim`` products (that of H where A is PHP and the operator has H).

    Every solve costs as much as assembling A, which pays on ill-conditioned systems of moderate size. Where several
    systems share a diagonal, compute :meth:`diagonal` once and pass it as ``Diagonal(values)``. Zeros on the diagonal
    are replaced by the mean absolute value of the other entries.
    """

    @torch.no_grad()
    def diagonal(self, operator: LinearOperator) -> Tensor:
        """The diagonals, ``[batch, dim]``, by ``dim`` products."""
        operator = operator.unprojected or operator
        batch, dim = operator.batch, operator.dim
        diagonal = torch.empty(batch, dim, dtype=operator.dtype, device=operator.device)
        eye = torch.eye(dim, dtype=operator.dtype, device=operator.device)
        # in blocks, so that the memory is not that of the assembled matrix
        width = max(1, _BLOCK_ENTRIES // max(1, batch * dim)) if operator.block_product is not None else 1
        for start in range(0, dim, width):
            columns = torch.arange(start, min(start + width, dim), device=operator.device)
            basis = eye[columns, None, :].expand(len(columns), batch, dim).contiguous()
            block = operator.block_product
            images = operator.product(basis[0])[None] if block is None else block(basis)
            diagonal[:, columns] = images.gather(2, columns[:, None, None].expand(-1, batch, 1)).squeeze(2).T
        return diagonal

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        values = self.diagonal(operator).to(working_dtype(operator.dtype))
        size = values.abs()
        # what is below rounding of the largest entry may be a zero, whose inverse would swamp the others
        usable = size > torch.finfo(values.dtype).eps * size.amax(-1, keepdim=True)
        mean = (size * usable).sum(-1, keepdim=True) / usable.sum(-1, keepdim=True)
        values = torch.where(usable, size if definite else values, torch.where(mean > 0, mean, 1.0))
        return _multiplication(values.reciprocal(), setup_rows=operator.batch * operator.dim)


@final
@dataclass(frozen=True, eq=False)
class Factorized(Preconditioner):
    """A symmetric positive definite reference matrix, factorized by Cholesky once, on construction.

    Attributes:
        matrix: ``[dim, dim]``, or ``[batch, dim, dim]`` with one for each sample: for instance the Hessian at a
            nearby point.

    Raises:
        ValueError: ``matrix`` has another shape, or is not positive definite.
    """

    matrix: Tensor
    factor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        matrix = self.matrix
        if not isinstance(matrix, Tensor) or matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError("Factorized(matrix): matrix must be a tensor [dim, dim] or [batch, dim, dim].")
        matrix = matrix.detach()
        factor, info = torch.linalg.cholesky_ex(matrix.to(working_dtype(matrix.dtype)))
        if not bool(((info == 0) & factor.isfinite().all(-1).all(-1)).all()):
            raise ValueError(
                "Factorized(matrix): matrix is not positive definite, so it has no Cholesky factor; add a multiple of "
                "the identity, or take the absolute values of its eigenvalues."
            )
        object.__setattr__(self, "factor", factor)

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        factor = self.factor.to(operator.device, working_dtype(operator.dtype))
        if factor.dim() == 2:
            _check_shape("Factorized(matrix)", factor[:1], operator, 1)
            return shared(lambda v: torch.cholesky_solve(v.T, factor).T)
        _check_shape("Factorized(matrix)", factor, operator, 2)
        return _factorized(factor)


@final
@dataclass(frozen=True)
class Inverse(Preconditioner):
    """A preconditioner from a function that multiplies by :math:`M^{-1}`; a plain callable is wrapped in it.

    Attributes:
        apply: linear, ``[batch, dim] -> [batch, dim]``, always called with the whole batch.
        apply_transposed: the same with :math:`M^{-T}`. ``None``: derived from ``apply`` by ``torch.func.vjp`` where
            it is needed (for transposed systems, and for ``LSMR``), except on symmetric operators.
    """

    apply: Product
    apply_transposed: Product | None = None

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        def vjp(v: Tensor) -> Tensor:
            return torch.func.vjp(self.apply, torch.zeros_like(v))[1](v)[0]

        def whole(function: Product, rows: Tensor | None) -> Product:
            if rows is None:
                return lambda v: function(v.to(operator.dtype)).to(v.dtype)

            # the function expects the whole batch: the rows that have left are zeros
            def scattered(v: Tensor) -> Tensor:
                full = torch.zeros(operator.batch, operator.dim, dtype=operator.dtype, device=v.device)
                return function(full.index_copy_(0, rows, v.to(operator.dtype)))[rows].to(v.dtype)

            return scattered

        def make(rows: Tensor | None) -> PreparedPreconditioner:
            return PreparedPreconditioner(
                inverse=whole(self.apply, rows),
                transposed_inverse=whole(transposed, rows),
                restrict=lambda kept: make(kept if rows is None else rows[kept]),
            )

        transposed = self.apply_transposed or (self.apply if operator.symmetric else vjp)
        return make(None).transpose() if operator.transposed and not operator.symmetric else make(None)


_BLOCK_ENTRIES = 1 << 22
"""The most entries of a block of products with unit vectors."""


def as_preconditioner(value: object) -> Preconditioner | None:
    """The preconditioner for what a solver was given: a :class:`Preconditioner`, a plain callable, or ``None``.

    Raises:
        TypeError: it is none of these.
    """
    if value is None or isinstance(value, Preconditioner):
        return value
    if callable(value):
        return Inverse(value)
    raise TypeError(
        f"preconditioner={value!r} is a {type(value).__name__}; give a Preconditioner such as Jacobi() or "
        "Diagonal(values), a function v -> M^-1 v, or None."
    )


def _check_shape(title: str, values: Tensor, operator: LinearOperator, dims: int) -> None:
    if values.shape[0] not in (1, operator.batch) or values.shape[1:] != (operator.dim,) * dims:
        raise ValueError(
            f"{title} is {tuple(values.shape)}, which does not fit an operator of batch {operator.batch} and "
            f"dim {operator.dim}."
        )


def _multiplication(inverse: Tensor, setup_rows: int = 0) -> PreparedPreconditioner:
    def apply(v: Tensor) -> Tensor:
        return v * inverse

    return PreparedPreconditioner(
        inverse=apply,
        transposed_inverse=apply,
        restrict=lambda rows: _multiplication(inverse if inverse.shape[0] == 1 else inverse[rows]),
        setup_rows=setup_rows,
    )


def _factorized(factor: Tensor) -> PreparedPreconditioner:
    def apply(v: Tensor) -> Tensor:
        return torch.cholesky_solve(v.unsqueeze(-1), factor).squeeze(-1)

    return PreparedPreconditioner(
        inverse=apply, transposed_inverse=apply, restrict=lambda rows: _factorized(factor[rows])
    )


def shared(apply: Product) -> PreparedPreconditioner:
    """A symmetric inverse that all samples share."""
    return PreparedPreconditioner(inverse=apply, transposed_inverse=apply, restrict=lambda rows: shared(apply))
