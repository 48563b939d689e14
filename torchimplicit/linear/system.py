"""The part of a linear system that a solve works on, and the count of its products."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from torchimplicit.linear.operator import LinearOperator, Product
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner
from torchimplicit.precision import working_dtype


@dataclass
class RowCount:
    """The number of row products so far, including those that set up operators and preconditioners."""

    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearSystem:
    """An operator with its preconditioner, restricted to some of its samples.

    Attributes:
        operator: that of the samples in ``rows``.
        inverse: the preconditioner's inverse for them, consistent with the operator's null vector.
        cost: the count, shared by all restrictions of one system.
        root: the system of all samples; ``None`` if this is it.
        rows: int64 ``[operator.batch]``, where these samples stand in ``root``; ``None`` for all of them.
        dead: bool ``[operator.batch]``, samples that went non-finite. Their operators may make NaN even of zero, so
            their products are replaced by zero.
    """

    operator: LinearOperator
    inverse: PreparedPreconditioner | None
    cost: RowCount
    root: LinearSystem | None = None
    rows: Tensor | None = None
    dead: Tensor | None = None

    @classmethod
    def of(cls, operator: LinearOperator, preconditioner: Preconditioner | None, definite: bool) -> LinearSystem:
        """The system of all samples."""
        cost, inverse = RowCount(), None
        if preconditioner is not None:
            inverse = preconditioner.prepare(operator, definite)
            if operator.null is not None:
                inverse = inverse.orthogonal_to(operator.null.to(working_dtype(operator.dtype)))
            cost.rows += inverse.setup_rows
        return cls(operator=operator, inverse=inverse, cost=cost)

    def product(self, v: Tensor) -> Tensor:
        """``A v``."""
        return self._product(self.operator.product, v)

    def transposed_product(self, v: Tensor) -> Tensor:
        """``A^T v``."""
        operator = self.operator
        transposed = operator.product if operator.symmetric else operator.transposed_product
        assert transposed is not None
        return self._product(transposed, v)

    def precondition(self, v: Tensor) -> Tensor:
        """``M^-1 v``, or ``v`` itself without a preconditioner."""
        return v if self.inverse is None else self._mask(self.inverse.inverse(v))

    def precondition_transposed(self, v: Tensor) -> Tensor:
        """``M^-T v``, or ``v`` itself without a preconditioner."""
        return v if self.inverse is None else self._mask(self.inverse.transposed_inverse(v))

    def residual(self, b: Tensor, x: Tensor) -> Tensor:
        """``b - A x``, without its component along the null vector."""
        return self.operator.project(b - self.product(x))

    def restrict(self, rows: Tensor) -> LinearSystem:
        """The system of some of these samples (``rows``: int64 ``[k]``, into this system)."""
        root, rows = self.root or self, rows if self.rows is None else self.rows[rows]
        assert root.operator.restrict is not None
        operator = root.operator.restrict(rows)
        self.cost.rows += operator.setup_rows
        inverse = root.inverse and root.inverse.restrict(rows)
        return LinearSystem(operator=operator, inverse=inverse, cost=self.cost, root=root, rows=rows)

    def without(self, rows: Tensor) -> LinearSystem:
        """This system, with some samples (bool ``[operator.batch]``) read as zero."""
        return replace(self, dead=rows if self.dead is None else self.dead | rows)

    def _product(self, product: Product, v: Tensor) -> Tensor:
        self.cost.rows += self.operator.batch
        if v.dtype == self.operator.dtype:
            return self._mask(product(v))
        return self._mask(product(v.to(self.operator.dtype)).to(v.dtype))

    def _mask(self, v: Tensor) -> Tensor:
        return v if self.dead is None else v.masked_fill(self.dead[:, None], 0.0)
