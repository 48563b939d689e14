"""Fixed points of a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, final

from torch import Tensor

from torchimplicit.problems.base import MapProblem
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.problems.system import Point, System, largest
from torchimplicit.state import Layout


@final
@dataclass(frozen=True)
class FixedPoint(MapProblem):
    """A fixed point of a map: the state with ``z = f(z, *args)``.

    Args:
        f: ``f(z, *args)``, returning a state with the structure, shapes and dtype of ``z``.
        batched: whether dim 0 of every leaf of the state is a batch of separate problems, each solved to its own
            tolerance. ``False``: the whole state is one system.
        rowwise: a promise that row i of the result depends only on row i of the state and of the batched arguments,
            and that ``f`` captures nothing batched. Samples that have converged then leave the batch that ``f``
            sees. Arguments that carry the batch are the tensors (not parameters) whose dim 0 has its size.
        has_aux: whether ``f`` returns a pair ``(state, aux)``, where ``aux`` is any pytree: attention weights, logits,
            a cache. ``solution.aux`` is its value at the solution, and is differentiable, also through the solution;
            see :attr:`Solution.aux`.
        unpack: whether ``f`` takes the entries of a tuple or list as separate arguments, ``f(*z, *args)``. It may
            return them as a tuple or a list.

    Raises:
        TypeError: ``f`` is not callable.
    """

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        return FixedPointSystem(fn=fn, row_params=row_params, leaves=layout.leaves)


@final
@dataclass(frozen=True, kw_only=True)
class FixedPointSystem(ImageSystem):
    """A fixed-point problem in flat coordinates, :math:`R = z - f(z)`."""

    def at(self, z: Tensor, params: Sequence[Tensor], value: Tensor | None = None) -> Point:
        image = self.fn(z, *params) if value is None else value
        residual, norms = image - z, self.norms
        return Point(z, residual, scale=norms(image), image=image, error=norms(residual))

    def advanced(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return self.fn(z, *params)

    def image(self, z: Tensor, *params: Tensor) -> Tensor:
        return self.fn(z, *params)

    def sizes(self, point: Point, params: Sequence[Tensor], first: Tensor | None = None) -> tuple[float, float]:
        assert point.image is not None
        size = max(largest(point.z), largest(point.image))
        return size, size

    def in_units(self, state: float, size: float) -> Self:
        fn = self.fn
        return replace(self, fn=lambda z, *params: fn(z * state, *params) / state)
