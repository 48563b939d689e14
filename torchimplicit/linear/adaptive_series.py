"""The Neumann series with an optimal damping in every step."""

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
"""A step whose best damping would leave more than this share of the residual takes the last good damping instead."""


@dataclass(frozen=True)
class PhantomReport(Report):
    """The figures of an adaptive series: ``steps`` is the number of terms k, ``damping`` the mean :math:`\\lambda`.

    Attributes:
        damping: float ``[batch]``, the mean over the steps of each sample; NaN for a sample that took none.
    """

    damping: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class AdaptiveSeries(IterativeSolver):
    """The minimal residual iteration (Saad 2003, section 5.3.2): :math:`y\\leftarrow y+\\lambda r`, where
    :math:`\\lambda=\\langle r,Ar\\rangle/\\lVert Ar\\rVert^2` minimizes the next residual of each sample.

    Where even that leaves over 97 % of the residual, as happens for matrices that are far from normal, the step takes
    the sample's last good :math:`\\lambda` (at first 1): it gains little by itself, but may turn the residual so that
    the next step gains more. The report is a :class:`PhantomReport`. Preconditioners are not supported.

    Attributes:
        damping: a fixed :math:`\\lambda` for all steps; ``None``: the minimizing one.
    """

    damping: float | None = None

    def method(self, operator: LinearOperator) -> Method:
        return _MinimalResidualSteps(self.damping)


class _State(NamedTuple):
    """``damping`` belongs to the last step, and ``tally`` is the sum over all steps, ``[rows, 1]``."""

    norm: Tensor
    x: Tensor
    r: Tensor
    damping: Tensor
    tally: Tensor


class _MinimalResidualSteps(Method):
    kept = ("tally",)
    monotone = False  # with the last good damping, or a fixed one, the residual may grow
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
    """The damping ``[rows, 1]`` that minimizes the next residual; the one before where that gains next to nothing."""
    along = (state.r * image).sum(dim=1, keepdim=True)
    square = (image * image).sum(dim=1, keepdim=True)
    # the squared share of the residual that would remain: 1 - cos^2 of the angle between r and Ar
    left = 1 - along.square() / (square * state.norm.square()[:, None])
    return torch.where((along > 0) & (left <= STAGNATION**2), along / square, state.damping)
