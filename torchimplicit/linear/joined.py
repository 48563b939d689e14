"""The preconditioner of single rows for rows that are solved as one system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner
from torchimplicit.precision import working_dtype


@final
@dataclass(frozen=True, eq=False)
class OfRows(Preconditioner):
    """A block-diagonal preconditioner of the joined system, with the preconditioners of the rows as its blocks.

    Attributes:
        each: the preconditioner of the rows.
        operator: the operator of the rows before they were joined.
    """

    each: Preconditioner
    operator: LinearOperator

    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        rows = self.operator
        prepared = self.each.prepare(rows, definite)
        if rows.null is not None:
            prepared = prepared.orthogonal_to(rows.null.to(working_dtype(rows.dtype)).expand(rows.batch, -1))

        def whole(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: product(v.reshape(rows.batch, rows.dim)).reshape(v.shape)

        def restrict(_: Tensor) -> PreparedPreconditioner:
            raise AssertionError("systems that were joined are not taken apart")

        return PreparedPreconditioner(
            inverse=whole(prepared.inverse),
            transposed_inverse=whole(prepared.transposed_inverse),
            restrict=restrict,
            setup_rows=prepared.setup_rows * operator.batch // rows.batch,
        )

    def after_solve(self, steps: Tensor) -> None:
        self.each.after_solve(steps)
