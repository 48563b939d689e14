"""A linear system as a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from torchimplicit.problems.base import Problem
from torchimplicit.problems.root import RootSystem
from torchimplicit.problems.system import System
from torchimplicit.state import Layout


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LinearEquations(Problem):
    """The solution y of ``operator(y, *args) = b``, for :func:`~torchimplicit.linear_solve`.

    Attributes:
        operator: linear in y.
        range: the layout of ``b`` and of the operator's result.
        b: in flat form, ``[batch, m]``.
        square: whether there are as many equations as unknowns, and they are solved as a square system.
        symmetric: see :func:`~torchimplicit.linear_solve`.
    """

    operator: Callable[..., Any]
    range: Layout
    b: Tensor
    square: bool
    symmetric: bool
    batched: bool = True
    rowwise: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        return self.operator

    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        flat = self.range.flatten(output, "the result of the operator", cast)
        if flat.shape[0] != rows:
            raise ValueError(
                f"the operator was given {rows} samples and returned {flat.shape[0]}: it must keep the batch"
            )
        return flat

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        """``b`` for a square system, whose derivative in it is then that in any parameter."""
        return (self.b,) if self.square else ()

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        def residual(z: Tensor, *params: Tensor) -> Tensor:
            return fn(z, *params) - params[constraint.start]

        return RootSystem(
            fn=residual if self.square else fn,
            row_params=row_params,
            leaves=layout.leaves,
            symmetric=self.symmetric,
        )
