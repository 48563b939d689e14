"""A phantom gradient that chooses its own number of steps and damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients.base import Task
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearOperator, LinearSolution
from torchimplicit.linear.confirmed import confirmed
from torchimplicit.notices import notice
from torchimplicit.precision import UnitRows, working_dtype
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Report, Status
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_fraction, check_positive

STAGNATION = 0.97
"""A step that would leave more than this share of the residual goes by the last good damping instead."""

GROWTH_LIMIT = 1e6
"""A residual this many times the cotangent counts as growing without bound."""

TOLERANCE = 0.1
"""Of the residual, where nothing is asked for."""


@dataclass(frozen=True)
class PhantomReport(Report):
    """The figures of an :class:`AdaptivePhantom`: ``steps`` is the k and ``damping`` the :math:`\\lambda` it chose.

    Attributes:
        damping: float ``[batch]``, mean over the steps of each sample; NaN for a sample that took none.
    """

    damping: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class AdaptivePhantom(LinearEstimate):
    """A Neumann phantom gradient that is as long as it has to be, with the damping that suits each step.

    The truncated series of :class:`NeumannPhantom` is the iteration :math:`g\\leftarrow g+\\lambda r`,
    :math:`r\\leftarrow r-\\lambda(I-J)^{T}r`, whose residual :math:`r=u-(I-J)^{T}g` is known without a further
    product. So every sample goes on until its residual is small enough, and every step takes the :math:`\\lambda` for
    which the next residual is least, :math:`\\langle r,(I-J)^{T}r\\rangle/\\lVert(I-J)^{T}r\\rVert^2`, which may
    exceed 1. No constant :math:`\\lambda` has a better bound: the residual falls at least as fast as
    :math:`\\min_\\lambda\\lVert B_\\lambda\\rVert^k`. Where even the best step leaves over 97 % of the residual, as
    happens for Jacobians that are far from normal, it goes by the sample's last good :math:`\\lambda` (at first 1).
    Nothing is remembered from one backward pass to the next, so there is nothing to checkpoint; all is chosen anew, as
    the Jacobian changes. Memory does not grow with the steps. First order, reverse and forward mode.

    ``solution.adjoint`` is then a :class:`PhantomReport` with the steps, the mean damping and the residual of each
    sample; a sample that has not reached its tolerance within ``max_steps`` is marked and warned of.

    Args:
        tolerance: of the relative residual of the adjoint system; with ``contraction``, of the relative *error* of its
            solution, :math:`\\lVert g-(I-J)^{-T}u\\rVert/\\lVert(I-J)^{-T}u\\rVert`. ``None``: 0.1, or what
            ``condition`` asks for.
        condition: the condition number :math:`\\kappa=\\sigma_{max}/\\sigma_{min}` of :math:`f_\\theta`, from
            :func:`~torchimplicit.diagnostics.ascent_condition` or a bound: the relative error is held below
            :math:`1/\\kappa`, so that the estimate is an ascent direction, as in eq. 8 of Geng et al. (2021), but for
            the cotangent at hand. Needs ``contraction``.
        contraction: a bound :math:`L<1` of :math:`\\lVert J\\rVert_2`, as of a spectrally normalized cell.
        max_steps: the most steps of a sample.
        damping: a :math:`\\lambda` in (0, 1] for all steps in place of the best one.

    Raises:
        ValueError: both ``tolerance`` and ``condition``, or the latter without ``contraction``, or a value out of
            range.

    Warns:
        ConvergenceWarning: a sample ended above its tolerance.
    """

    tolerance: float | None = None
    condition: float | None = None
    contraction: float | None = None
    max_steps: int = 50
    damping: float | None = None

    def __post_init__(self) -> None:
        check_count(self, "max_steps")
        for name in ("tolerance", "condition"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self.damping is not None:
            check_fraction(self, "damping")
        if self.contraction is not None and not 0 <= self.contraction < 1:
            raise ValueError(
                f"AdaptivePhantom.contraction is {self.contraction}, and must lie in [0, 1): it bounds the norm of the "
                "map's Jacobian, and only below 1 does a residual bound an error"
            )
        if self.condition is None:
            return
        if self.tolerance is not None:
            raise ValueError("AdaptivePhantom takes tolerance or condition, which implies a tolerance, not both")
        if self.contraction is None:
            raise ValueError("AdaptivePhantom.condition needs contraction, to tell the error from the residual")
        if self.condition < 1:
            raise ValueError(f"AdaptivePhantom.condition is {self.condition}, and a condition number is at least 1")

    @property
    def residual_tolerance(self) -> float:
        """The relative residual at which a sample stops.

        With ``contraction`` L it is :math:`(1-L)/(1+L)` times the error that is allowed, since the singular values of
        :math:`I-J` lie in :math:`[1-L,1+L]`.
        """
        allowed = 1 / self.condition if self.condition is not None else self.tolerance or TOLERANCE
        if self.contraction is None:
            return allowed
        return allowed * (1 - self.contraction) / (1 + self.contraction)

    def apply(self, task: Task, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        operator = task.system.operator(tape, transposed)
        found = confirmed(self._series, operator, b, (self.residual_tolerance, 0.0))
        report = found.report
        if not bool(report.converged.all()):
            notice(
                "AdaptivePhantom ended above its tolerance",
                f"AdaptivePhantom ended above its tolerance {self.residual_tolerance:.2g}: {report.summary()}. Allow "
                "more max_steps or a larger tolerance, or take Implicit()",
                ConvergenceWarning,
            )
        return found

    @torch.no_grad()
    def _series(self, operator: LinearOperator, given: Tensor) -> LinearSolution:
        whole = UnitRows.of(given.to(working_dtype(given.dtype)))
        b = operator.project(whole.unit)
        scale = row_norm(b)
        target = self.residual_tolerance * scale
        running = scale > 0
        failed = ~whole.finite.squeeze(1)
        now = _State(torch.zeros_like(b), b, scale)
        best = now._replace(norm=torch.full_like(scale, torch.inf))
        good = torch.full_like(scale, 1.0 if self.damping is None else self.damping)
        steps = torch.zeros_like(running, dtype=torch.int64)
        total = torch.zeros_like(scale)
        products = 0
        while products < self.max_steps and bool(running.any()):
            turned = operator.project(operator.product(now.r.to(given.dtype)).to(b.dtype))
            products += 1
            if self.damping is None:
                good = _least(now, turned, good)
            chosen = good[:, None]
            r = now.r - chosen * turned
            after = _State(now.x + chosen * now.r, r, row_norm(r))
            finite = after.norm < torch.inf
            best = _select(running & finite & (after.norm < best.norm), after, best)
            steps, total = steps + running, total + good.where(running & finite, 0)
            failed |= running & ~(after.norm < GROWTH_LIMIT * scale)
            now = _select(running & finite, after, now)
            running = running & ~failed & (now.norm > target)
        nothing = scale == 0
        norm = best.norm.where(~nothing, 0)
        status = torch.where(norm <= target, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(failed & ~((norm <= target) & whole.finite.squeeze(1)), int(Status.NONFINITE), status)
        figures = PhantomReport(
            status,
            steps,
            (norm / scale.where(~nothing, 1)).to(given.dtype),
            float(products),
            (total / steps).to(given.dtype),
        )
        return LinearSolution(whole.restored(best.x).to(given.dtype), figures)


class _State(NamedTuple):
    """The series so far ``[batch, dim]``, its residual, and the residual's norm ``[batch]``."""

    x: Tensor
    r: Tensor
    norm: Tensor


def _least(now: _State, turned: Tensor, before: Tensor) -> Tensor:
    """The damping ``[batch]`` for which the next residual is least; the one before where that is hardly less."""
    along = (now.r * turned).sum(dim=1)
    square = (turned * turned).sum(dim=1)
    left = 1 - along.square() / (square * now.norm.square())  # square of the share of the residual that would remain
    return torch.where((along > 0) & (left <= STAGNATION**2), along / square, before)


def _select(mask: Tensor, new: _State, old: _State) -> _State:
    column = mask[:, None]
    return _State(new.x.where(column, old.x), new.r.where(column, old.r), new.norm.where(mask, old.norm))
