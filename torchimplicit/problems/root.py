"""Roots of a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, final

from torch import Tensor

from torchimplicit.linear import MINRES, Dense, KrylovOrDense, LinearOperator, LinearSolver
from torchimplicit.problems.base import MapProblem
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.system import Point, System
from torchimplicit.state import Layout


@final
@dataclass(frozen=True)
class Root(MapProblem):
    """A root of a map: the state with ``f(z, *args) = 0``.

    The plain step of a solver is ``z - f(z)``; where that does not contract, take ``NewtonKrylov`` or ``Broyden``.

    Args:
        f: ``f(z, *args)``, returning a state with the structure, shapes and dtype of ``z``.
        batched, rowwise, has_aux, unpack: see :class:`FixedPoint`.

    Raises:
        TypeError: ``f`` is not callable.
    """

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        return RootSystem(fn=fn, row_params=row_params, leaves=layout.leaves)


@final
@dataclass(frozen=True, kw_only=True)
class RootSystem(System):
    """A root problem in flat coordinates, :math:`R = f(z)`, :math:`A = f_z`.

    Attributes:
        symmetric: whether every :math:`A` equals its transpose.
    """

    symmetric: bool = False

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        return Point(z, -(self.fn(z, *params) if value is None else value))

    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        return self.fn(z, *params)

    def in_units(self, state: float, size: float) -> Self:
        fn = self.fn
        return replace(self, fn=lambda z, *params: fn(z * state, *params) / size)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        return Linearization(self.fn, z, params, needs_grad, self.leaves)

    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        return self.jacobian(tape, transposed, symmetric=self.symmetric)

    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        return tape.vjp_params(-g)

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        if self.symmetric:
            return Dense() if dim <= 128 and batch * dim * dim <= 2**22 else KrylovOrDense(krylov=MINRES())
        return Dense() if dim <= 32 and batch * dim * dim <= 2**20 else KrylovOrDense()
