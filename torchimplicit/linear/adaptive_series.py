"""The Neumann series with the damping that suits each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.system import LinearSystem
from torchimplicit.solution import GROWTH_LIMIT, Report

STAGNATION = 0.97
"""A step that would leave more than this share of the residual goes by the last good damping instead."""


@dataclass(frozen=True)
class PhantomReport(Report):
    """The figures of an adaptive series: ``steps`` is the k and ``damping`` the :math:`\\lambda` it chose.

    Attributes:
        damping: float ``[batch]``, mean over the steps of each sample; NaN for a sample that took none.
    """

    damping: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveSeries(IterativeSolver):
    """The minimal residual iteration (Saad 2003, section 5.3.2): :math:`y\\leftarrow y+\\lambda r` with the
    :math:`\\lambda` of least next residual, :math:`\\langle r,Ar\\rangle/\\lVert Ar\\rVert^2`, for each sample.

    Where even that leaves over 97 % of the residual, as happens for matrices that are far from normal, it goes by the
    sample's last good :math:`\\lambda` (at first 1): a step that hardly gains by itself may still turn the residual to
    where the next one does. Its report is a :class:`PhantomReport`. It takes no preconditioner.

    Attributes:
        damping: a :math:`\\lambda` for all steps, in place of the best one.
    """

    damping: float | None = None

    def method(self, operator: LinearOperator) -> Method:
        return _MinimalResidualSteps(self.damping)


class _State(NamedTuple):
    """``damping`` is that of the last step, and ``tally`` the sum of those of all steps, ``[rows, 1]``."""

    norm: Tensor
    x: Tensor
    r: Tensor
    damping: Tensor
    tally: Tensor


class _MinimalResidualSteps(Method):
    kept = ("tally",)
    monotone = False  # by the last good damping, or by a given one, the residual may grow
    growth = GROWTH_LIMIT

    def __init__(self, damping: float | None) -> None:
        self.damping = damping

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        first = torch.full_like(norm[:, None], 1.0 if self.damping is None else self.damping)
        return _State(norm, x, r, first, torch.zeros_like(first))

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        image = system.operator.project(system.product(state.r))
        damping = state.damping if self.damping is not None else _least(state, image)
        x = torch.addcmul(state.x, damping, state.r)
        r = torch.addcmul(state.r, damping, image, value=-1)
        return _State(torch.linalg.vector_norm(r, dim=-1), x, r, damping, state.tally + damping)

    def figures(self, report: Report, tally: Tensor) -> PhantomReport:
        damping = (tally / report.steps).to(report.residual.dtype)
        return PhantomReport(**vars(report), damping=damping)


def _least(state: _State, image: Tensor) -> Tensor:
    """The damping ``[rows, 1]`` for which the next residual is least; the one before where that is hardly less."""
    along = (state.r * image).sum(dim=1, keepdim=True)
    square = (image * image).sum(dim=1, keepdim=True)
    # the square of the share of the residual that would remain
    left = 1 - along.square() / (square * state.norm.square()[:, None])
    return torch.where((along > 0) & (left <= STAGNATION**2), along / square, state.damping)
