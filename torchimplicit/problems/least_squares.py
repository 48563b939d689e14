"""Least-squares problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.problems.base import Problem, check_function
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.problems.system import System
from torchimplicit.state import Layout


@final
@dataclass(frozen=True)
class LeastSquares(Problem):
    """A minimum of :math:`\\tfrac12\\lVert r\\rVert^2`, where :math:`r` are the residuals ``residual(z, *args)``.

    It can be solved and differentiated by everything that suits a :class:`Minimum` of that energy;
    :class:`LevenbergMarquardt`, the default solver, and :class:`GaussNewton` exploit that it is a sum of squares. The
    derivative of the solution uses the whole Hessian :math:`J^TJ+\\sum_ir_i\\nabla^2r_i` with :class:`Implicit`, and
    :math:`J^TJ` alone with :class:`GaussNewton`; the two agree where the residuals vanish.

    Args:
        residual: ``residual(z, *args)``, returning a tensor or a pytree of tensors, of any size and of the state's
            dtype; with the batch in dim 0 if batched.
        batched, rowwise: see :class:`FixedPoint`.

    Raises:
        TypeError: ``residual`` is not callable.
    """

    residual: Callable[..., Any]
    batched: bool = True
    rowwise: bool = False
    by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_function(self.residual, "residual")

    @property
    def function(self) -> Callable[..., Any]:
        return self.residual

    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        parts = []
        for leaf in pytree.tree_leaves(output):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"residual must return tensors, but it returned {type(leaf).__name__}")
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf.resolve_conj())
            if layout.batched and (leaf.ndim == 0 or leaf.shape[0] != rows):
                raise ValueError(
                    f"residual returned shape {tuple(leaf.shape)}, but dim 0 must be the batch, {rows}: return the "
                    "residuals of each sample, or pass batched=False if the whole state is one system"
                )
            if leaf.dtype != layout.dtype and not (cast and leaf.is_floating_point()):
                raise ValueError(f"residual returned {leaf.dtype} for a state of {layout.dtype}: keep the dtype")
            parts.append(leaf.to(layout.dtype).reshape(rows, -1) if leaf.numel() else leaf.reshape(rows, 0))
        if not parts:
            raise ValueError("residual returned no tensors: there is nothing to minimize")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        return MinimumSystem(fn=half_square(fn), residuals=fn, row_params=row_params, leaves=layout.leaves)


def half_square(residuals: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The energies ``[batch]`` of a function that returns residuals ``[batch, m]``."""

    def energies(z: Tensor, *params: Tensor) -> Tensor:
        return 0.5 * residuals(z, *params).square().sum(dim=1)

    return energies
