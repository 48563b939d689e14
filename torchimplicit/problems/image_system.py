"""The base class of systems that are fixed points of a map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchimplicit.linear import KrylovOrDense, LinearOperator, LinearSolver
from torchimplicit.precision import widened
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.system import Point, System


@dataclass(frozen=True, kw_only=True)
class ImageSystem(System):
    """:math:`R = z - T(z)`, :math:`A = I - J` with the Jacobian :math:`J` of :math:`T`."""

    @abstractmethod
    def image(self, z: Tensor, *params: Tensor) -> Tensor:
        """:math:`T(z)`, ``[batch, dim]``; differentiable to any order by composable transforms."""

    @abstractmethod
    def advanced(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        """:math:`T(z)` as :meth:`at` evaluates it, without the residual and what judges it."""

    def residual(self, z: Tensor, *params: Tensor) -> Tensor:
        return z - self.image(z, *params)

    def linearize(self, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool] | None = None) -> Linearization:
        return Linearization(self.image, z, params, needs_grad, self.leaves)

    def operator(self, tape: Linearization, transposed: bool) -> LinearOperator:
        def products(of_j: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: v - of_j(v)

        plain, flipped = products(tape.jvp), products(tape.vjp)
        return LinearOperator(
            product=flipped if transposed else plain,
            transposed_product=plain if transposed else flipped,
            block_product=products(tape.vjp_block if transposed else tape.jvp_block),
            batch=tape.z.shape[0],
            dim=tape.z.shape[1],
            dtype=tape.z.dtype,
            device=tape.z.device,
            transposed=transposed,
            restrict=self._restricted(tape, transposed),
            coupling=self.coupling,
        )

    def on_tape(self, tape: Linearization) -> Tensor:
        return tape.z - tape.out

    def vjp_params(self, tape: Linearization, g: Tensor) -> list[Tensor | None]:
        return tape.vjp_params(g)

    def weights(self, point: Point, before: Tensor, residual: Tensor) -> Tensor:
        """``[batch, leaves]``, what the leaves of residuals are multiplied by where they are compared, so that none
        counts for more because of its unit: one over the size of the leaf of the map's value; 1 for a leaf without any,
        which has not shown its unit yet. Differentiable, so that an unrolled solve has its whole derivative.

        Args:
            point: the second one.
            before, residual: state and residual of the first one, ``[batch, dim]``.
        """
        assert self.leaves is not None
        assert point.image is not None
        sizes = self.leaves.sizes
        parts = zip(widened(point.image).split(sizes, dim=1), widened(point.residual).split(sizes, dim=1), strict=True)
        norms = [torch.linalg.vector_norm(a, dim=1) + torch.linalg.vector_norm(r, dim=1) for a, r in parts]
        size = torch.stack(norms, dim=1)
        number = torch.finfo(size.dtype)
        return 1 / torch.where((size > number.tiny) & (size < number.max), size, 1)

    def default_linear_solver(self, dim: int, batch: int) -> LinearSolver:
        return KrylovOrDense()
