"""A phantom gradient that chooses its own number of steps and damping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearSolution
from torchimplicit.linear.adaptive_series import AdaptiveSeries, PhantomReport
from torchimplicit.linear.confirmed import solve_any
from torchimplicit.notices import notice
from torchimplicit.problems.linearization import Linearization
from torchimplicit.validation import check_count, check_fraction, check_positive

__all__ = ["AdaptivePhantom", "PhantomReport"]

TOLERANCE = 0.1
"""The default tolerance on the relative residual."""


@final
@dataclass(frozen=True, kw_only=True)
class AdaptivePhantom(LinearEstimate):
    """A Neumann phantom gradient that chooses the number of terms and the damping of each by itself.

    The truncated series of :class:`NeumannPhantom` is the iteration :math:`g\\leftarrow g+\\lambda r`,
    :math:`r\\leftarrow r-\\lambda(I-J)^{T}r`, whose residual :math:`r=u-(I-J)^{T}g` is known without a further
    product. So each sample stops when its residual is small enough, and each step takes the :math:`\\lambda` that
    minimizes the next residual, :math:`\\langle r,(I-J)^{T}r\\rangle/\\lVert(I-J)^{T}r\\rVert^2`, which may exceed 1.
    No constant :math:`\\lambda` has a better bound: the residual falls at least as fast as
    :math:`\\min_\\lambda\\lVert B_\\lambda\\rVert^k`. Where even the best step leaves over 97 % of the residual, as
    happens for Jacobians that are far from normal, the step takes the sample's last good :math:`\\lambda` (at first 1).
    Nothing is carried from one backward pass to the next, so there is no state to checkpoint. Memory does not grow with
    the steps. Reverse and forward mode, first order.

    ``solution.adjoint`` is a :class:`PhantomReport` with the steps, the mean damping and the residual of each sample.

    Args:
        tolerance: on the relative residual of the adjoint system; with ``contraction``, on the relative *error* of its
            solution, :math:`\\lVert g-(I-J)^{-T}u\\rVert/\\lVert(I-J)^{-T}u\\rVert`. ``None``: 0.1, or as ``condition``
            requires.
        condition: the condition number :math:`\\kappa=\\sigma_{max}/\\sigma_{min}` of :math:`f_\\theta`, from
            :func:`~torchimplicit.diagnostics.ascent_condition`, or a bound of it. The relative error is kept below
            :math:`1/\\kappa`, so that the estimate is an ascent direction, as in eq. 8 of Geng et al. (2021), but for
            the given cotangent. Needs ``contraction``.
        contraction: a bound :math:`L<1` of :math:`\\lVert J\\rVert_2`, as for a spectrally normalized cell.
        max_steps: the most steps of a sample.
        damping: a fixed :math:`\\lambda` in (0, 1] for all steps; ``None``: the minimizing one.

    Raises:
        ValueError: both ``tolerance`` and ``condition`` are given, or the latter without ``contraction``, or a value is
            out of range.

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
                "map's Jacobian, and only a bound below 1 turns a residual into a bound of the error"
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

        With ``contraction`` L it is :math:`(1-L)/(1+L)` times the allowed error, since the singular values of
        :math:`I-J` lie in :math:`[1-L,1+L]`.
        """
        allowed = 1 / self.condition if self.condition is not None else self.tolerance or TOLERANCE
        if self.contraction is None:
            return allowed
        return allowed * (1 - self.contraction) / (1 + self.contraction)

    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        series = AdaptiveSeries(rtol=self.residual_tolerance, max_steps=self.max_steps, damping=self.damping)
        solution = solve_any(series, task.system.operator(tape, transposed), b)
        report = solution.report
        if not bool(report.converged.all()):
            notice(
                "AdaptivePhantom ended above its tolerance",
                f"AdaptivePhantom ended above its tolerance {self.residual_tolerance:.2g}: {report.summary()}. Allow "
                "more max_steps or a larger tolerance, or take Implicit()",
                ConvergenceWarning,
            )
        return solution
