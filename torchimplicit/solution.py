"""What a solve returns: the point, and how it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Status(IntEnum):
    """Why a sample stopped. Status tensors hold these integers: ``solution.status == Status.CONVERGED``."""

    CONVERGED = 0
    """The residual is within the tolerance."""
    MAX_STEPS = 1
    """The step budget ran out first; the value is the iterate of least residual. Also of an estimator that takes a
    given number of steps: its residual is then NaN, unknown."""
    NONFINITE = 2
    """The map gave NaN or infinity, or the residual grew without bound; the value is the last good iterate."""
    BREAKDOWN = 3
    """The method could not go on (a singular system, a line search without decrease); the value is the best iterate."""
    SADDLE = 4
    """Of an adjoint solve: the Hessian of the minimum has a negative eigenvalue, so the point is no minimum, and what
    was solved for is the derivative of a stationary point that no minimization would find. Of a minimization by
    :class:`~torchimplicit.NewtonKrylov`: it has come to such a point, and found no way down from it."""
    STEPS_TAKEN = 5
    """The solver was given a number of ``steps``, and has taken them: nothing was tested. The value is the last
    iterate."""


@dataclass(frozen=True)
class Report:
    """The figures of one iterative solve, per sample.

    Attributes:
        status: int64 ``[batch]``, members of :class:`Status`.
        steps: int64 ``[batch]``, the steps that each sample took.
        residual: float ``[batch]``, the relative residual of the returned value: of its leaves, the largest norm of the
            residual over the size of the terms that make it up (see :class:`~torchimplicit.solvers.Solver`); NaN where
            it is not known.
        evaluations: what the solve cost, in whole-batch equivalents: evaluating half of the rows counts one half, so
            the figure may be fractional. In :class:`Solution`, evaluations of the map in the forward pass, those that
            the estimator makes there (:class:`~torchimplicit.gradients.UnrolledPhantom`) among them; the one that is
            recorded at the solution for the backward pass is not counted. In
            ``solution.adjoint``, products with the Jacobian in the backward pass (for
            :class:`~torchimplicit.gradients.EquilibriumPropagation`, evaluations of the energy's gradient); the one
            pass through the map to its parameters, which every estimator makes, is not counted.
        curvature: of an adjoint solve at a minimum, float ``[batch]``: where the status is :attr:`Status.SADDLE`, a
            negative number that the Hessian's least eigenvalue does not exceed; NaN elsewhere. It is that eigenvalue
            after :class:`~torchimplicit.linear.Dense`; after :class:`~torchimplicit.linear.MINRES` the least curvature
            of a residual, with a preconditioner M that of :math:`M^{-1}H`; after other solvers, :math:`y^THy/y^Ty` of
            the solution y. ``None`` for a solve that says nothing of it.
        condition: of an adjoint solve, float ``[batch]``: what the condition number of the system is at least,
            :math:`\\lVert A\\rVert\\lVert y\\rVert/\\lVert b\\rVert` with the norm of A bounded from below; zero where
            the method knows nothing of it. The relative error of the derivative may be as large as the condition times
            the tolerances.
    """

    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: float
    curvature: Tensor | None = field(default=None, kw_only=True)
    condition: Tensor | None = field(default=None, kw_only=True)

    @property
    def converged(self) -> Tensor:
        """bool ``[batch]``: the samples that reached their tolerance."""
        return self.status == Status.CONVERGED

    @property
    def fell_short(self) -> Tensor:
        """bool ``[batch]``: the samples that did not do what was asked of them, be it a tolerance or a number of
        steps."""
        return _fell_short(self.status)

    def summary(self) -> str:
        """One line for people: how many samples stopped for which reason, and the worst residual that is known."""
        status, residual = self.status.flatten(), self.residual.flatten()
        unknown = residual.isnan()
        given = unknown & (status == Status.MAX_STEPS)  # so many steps were asked for, and no residual
        counts = torch.bincount(status[~given], minlength=len(Status)).tolist()
        reasons = [f"{counts[reason]} {reason.name}" for reason in Status if counts[reason]]
        if bool(given.any()):
            reasons.append(f"{int(given.sum())} after the steps that were asked for")
        known = residual[~unknown]
        worst = f"largest relative residual {float(known.max()):.2g}" if known.numel() else "residual unknown"
        if not residual.numel():
            worst = "largest relative residual 0"
        return f"{', '.join(reasons)}; {worst} after {self.evaluations:g} evaluations"


@dataclass
class AdjointRecord:
    """Where a backward pass leaves its report, so that :attr:`Solution.adjoint` shows it afterwards."""

    report: Report | None = None


@dataclass(frozen=True)
class Solution:
    """The solution of an implicit problem and the figures of the solve.

    Attributes:
        value: the solution, with the structure of ``z0``; carries the gradient.
        status, steps, residual, evaluations: see :class:`Report`; scalars where the problem is not batched.
        trajectory: the kept iterates, each with the structure of ``z0``, oldest first; empty unless the solver
            was told ``keep_trajectory=True``.
        problem, args: what was solved, as it was given to :func:`solve`: for a regularizer or a diagnostic at the
            solution, ``jacobian_frobenius(solution.problem, solution.value, *solution.args)``. An
            :class:`~torchimplicit.nn.Equilibrium` keeps neither in its attribute ``solution``, nor does a solution
            that was pickled and read again.
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: float
    trajectory: tuple[Any, ...] = ()
    problem: Any = field(default=None, repr=False, compare=False)
    args: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    _record: AdjointRecord = field(default_factory=AdjointRecord, repr=False, compare=False)
    _attach: Callable[[int], Any] | None = field(default=None, repr=False, compare=False)
    """Gives the iterate of that number the derivative that it would have as the solution."""

    @property
    def converged(self) -> Tensor:
        """bool ``[batch]`` (or a scalar): the samples that reached their tolerance."""
        return self.status == Status.CONVERGED

    @property
    def fell_short(self) -> Tensor:
        """Likewise: the samples that did not do what was asked of them, be it a tolerance or a number of steps."""
        return _fell_short(self.status)

    @property
    def adjoint(self) -> Report | None:
        """The figures of the backward pass, once it has run; ``None`` before.

        An estimator that takes a given number of steps reports :attr:`Status.MAX_STEPS`, and NaN for a residual that
        it does not know. :class:`~torchimplicit.gradients.UnrolledPhantom` and
        :class:`~torchimplicit.gradients.Unrolled` leave no report under ``torch.func``.
        """
        return self._record.report

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: values and figures. The graph and the problem, whose function is often none that
        could be pickled, stay behind."""
        cut = {"value": _cut(self.value), "trajectory": _cut(self.trajectory)}
        return {**self.__dict__, **cut, "problem": None, "args": (), "_attach": None}

    def figures(self) -> Solution:
        """The same figures without the state, its graph and the problem: to keep many of them. The ``adjoint`` is
        filled in here too, when the backward pass has run."""
        return replace(self, value=None, trajectory=(), problem=None, args=(), _attach=None)

    def summary(self) -> str:
        """One line for people: how many samples stopped for which reason, and the worst residual."""
        return Report(self.status, self.steps, self.residual, self.evaluations).summary()


def _fell_short(status: Tensor) -> Tensor:
    return (status != Status.CONVERGED) & (status != Status.STEPS_TAKEN)


def _cut(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
