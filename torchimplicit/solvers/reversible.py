"""A fixed-point iteration whose steps can be inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.problems import Point, System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_positive


class ReversibleState(NamedTuple):
    """The pair of states, and the record that inverting its steps needs.

    Attributes:
        y, z: ``[batch, dim]``, in double precision where the device has it: the state, rounded, is ``z``.
        told: ``[batch]``, the norm of the map's value at ``y``, to check that the map is the same in the backward pass.
        moved: for each step, the samples that took it, bool ``[batch]``; ``None`` for all.
        kept: the pairs that are stored, the start first.
    """

    y: Tensor
    z: Tensor
    told: Tensor
    moved: tuple[Tensor | None, ...]
    kept: tuple[tuple[Tensor, Tensor], ...]


@final
@dataclass(frozen=True, kw_only=True)
class ReversibleIteration(Solver):
    """Damped iteration on a pair of states (McCallum, Arora and Foster 2025, "Reversible deep equilibrium models"):
    :math:`y\\leftarrow(1-\\beta)y+\\beta f(z)`, then :math:`z\\leftarrow(1-\\beta)z+\\beta f(y)`, from
    :math:`y=z=z_0`; the solution is z.

    Each half of a step can be inverted, so that :class:`~torchimplicit.Reversible` recomputes the iterates in the
    backward pass instead of storing them. A step takes two evaluations and gains about as much as two steps of
    ``FixedPointIteration(damping=β)``.

    Inverse steps amplify rounding errors. For a map with the eigenvalue :math:`\\lambda` the linear step has the
    determinant :math:`(1-\\beta)^2`, so that an inverse step multiplies errors by :math:`1/|1-\\beta|` where
    :math:`\\lambda=0`, and by :math:`1/(1-\\beta)^2` where :math:`\\lambda` approaches 1. Two things limit
    that: the pair is kept in double precision, whatever the dtype of the state and the precision of the map (autocast);
    and a pair is stored every ``keep_every`` steps, from which the inverse steps continue.

    Args:
        damping: :math:`\\beta` in (0, 2) except 1, for which a step has no inverse.
        keep_every: number of steps between stored pairs. ``None``: as many as amplify the rounding of the pair by at
            most :math:`\\epsilon^{-3/8}` (7e5: 9 steps for :math:`\\beta=.5`, 4 for .8); where the state has a lower
            precision than the pair, :math:`\\epsilon^{-1/4}` (8e3: 6 and 2), before it may differ in a bit.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see :class:`Solver`. A
            sample is returned at its last iterate, the only one from which its steps can be inverted.
    """

    damping: float = 0.5
    keep_every: int | None = None
    return_last: bool = True

    def check(self) -> None:
        check_positive(self, "damping")
        if self.damping == 1:
            raise ValueError(
                "ReversibleIteration.damping is 1: such a step has no inverse. Take another number in (0, 2), such as "
                ".5 or .8; for the plain iteration, FixedPointIteration()"
            )
        if self.damping >= 2:
            raise ValueError(f"ReversibleIteration.damping is {self.damping}, and must lie in (0, 2)")
        if self.keep_every is not None:
            check_count(self, "keep_every")

    def supports(self, system: System) -> None:
        if not isinstance(system, FixedPointSystem):
            raise ValueError(
                "ReversibleIteration iterates the map of a FixedPoint: state the problem as one (for a root, "
                "FixedPoint(lambda z: z - step * f(z))), or take another solver"
            )

    def span(self, pair: torch.dtype, state: torch.dtype) -> int:
        """Number of steps between stored pairs, for these dtypes."""
        if self.keep_every is not None:
            return self.keep_every
        share = 0.375 if pair == state else 0.25
        return max(1, int(share * math.log(torch.finfo(pair).eps) / (2 * math.log(abs(1 - self.damping)))))

    def start(self, point: Point) -> ReversibleState:
        begun = point.z.to(torch.float32 if point.z.device.type == "mps" else torch.float64, copy=True)
        return ReversibleState(begun, begun, point.growth_norm(), (), ((begun, begun),))

    def step(self, evaluate: Evaluator, point: Point, state: ReversibleState, progress: Progress) -> Move:
        assert point.image is not None
        active, (y, z, _, moved, kept) = progress.active, state
        if active is not None:  # a sample that has stopped may hold values that the map fails on
            y = torch.where(active[:, None] | y.isfinite(), y, z)
        y = self._half(y, point.image, active)
        image = evaluate.image(y.to(point.z.dtype))
        z = self._half(z, image, active)
        moved = (*moved, active)
        if len(moved) % self.span(z.dtype, point.z.dtype) == 0:
            kept = (*kept, (y, z))
        return Move(z.to(point.z.dtype), ReversibleState(y, z, row_norm(image), moved, kept))

    def _half(self, one: Tensor, image: Tensor, active: Tensor | None) -> Tensor:
        stepped = torch.add((1 - self.damping) * one, image, alpha=self.damping)
        return stepped if active is None else torch.where(active[:, None], stepped, one)
