"""The result of a solve: the solution and its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.validation import at_least


class Status(IntEnum):
    """Why a sample stopped. Status tensors hold these integers: ``solution.status == Status.CONVERGED``."""

    CONVERGED = 0
    """The residual is within the tolerance."""
    MAX_STEPS = 1
    """The steps ran out first; the value is the iterate with the smallest residual."""
    NONFINITE = 2
    """The map gave NaN or infinity, or the residual grew without bound; the value is the last good iterate."""
    BREAKDOWN = 3
    """The method could not go on (a singular system, a line search without decrease); the value is the best iterate."""
    SADDLE = 4
    """In an adjoint solve: the Hessian has a negative eigenvalue, so the point is not a minimum, and the derivative is
    that of a stationary point which no minimization would find. In a minimization: the solver has reached such a point,
    and has not found a lower one from there."""
    STEPS_TAKEN = 5
    """A prescribed number of ``steps`` was taken, and nothing was tested; the value is the last iterate. In an adjoint:
    the estimator takes a prescribed number of steps or products."""


GROWTH_LIMIT = 1e6
"""A residual of more than this many times the first one (plus its scale) counts as diverged: NONFINITE."""


@dataclass(frozen=True)
class Report:
    """The figures of one iterative solve, per sample.

    Attributes:
        status: int64 ``[batch]``, members of :class:`Status`.
        steps: int64 ``[batch]``, the steps that each sample took.
        residual: float ``[batch]``, the relative residual of the returned value: the largest over its leaves of the
            norm of the residual divided by the size of its terms (see :class:`~torchimplicit.solvers.Solver`); NaN
            where it is not known.
        evaluations: the cost of the solve in evaluations of the whole batch. Evaluating half of the rows counts one
            half, so the number may be fractional. In :class:`Solution` it counts evaluations of the map in the forward
            pass, including those that the estimator makes there (:class:`~torchimplicit.gradients.UnrolledPhantom`),
            but not the one that is recorded at the solution for the backward pass. In ``solution.adjoint`` it counts
            products with the Jacobian in the backward pass (for
            :class:`~torchimplicit.gradients.EquilibriumPropagation`, evaluations of the energy's gradient), but not the
            pass through the map to its parameters, which every estimator makes.
        curvature: for an adjoint solve at a minimum, float ``[batch]``: where the status is :attr:`Status.SADDLE`, a
            negative upper bound of the Hessian's smallest eigenvalue; NaN elsewhere. It is that eigenvalue after
            :class:`~torchimplicit.linear.Dense`; after :class:`~torchimplicit.linear.MINRES` the smallest curvature
            along a residual, and after :class:`~torchimplicit.linear.CG` along a direction (of :math:`M^{-1}H` with a
            preconditioner M); after other solvers, the smallest on the span of the solution and the right-hand side.
            ``None`` for a solve that does not look for it.
        condition: for an adjoint solve, float ``[batch]``: a lower bound of the condition number of the system,
            :math:`\\lVert A\\rVert\\lVert y\\rVert/\\lVert b\\rVert` with a lower bound of the norm of A; zero where
            the method has none. The relative error of the derivative may be as large as the condition number times the
            tolerances.
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
        """bool ``[batch]``: the samples that reached neither their tolerance nor a prescribed number of steps."""
        return fell_short(self.status)

    def summary(self) -> str:
        """One line of text: how many samples stopped for which reason, and the largest known residual."""
        status, residual = self.status.flatten(), self.residual.flatten()
        unknown = residual.isnan()
        counts = torch.bincount(status, minlength=len(Status)).tolist()
        reasons = [f"{counts[reason]} {reason.name}" for reason in Status if counts[reason]]
        known = residual[~unknown]
        worst = f"largest relative residual {float(known.max()):.2g}" if known.numel() else "residual unknown"
        if not residual.numel():
            worst = "largest relative residual 0"
        return f"{', '.join(reasons)}; {worst} after {self.evaluations:g} evaluations"


class Trace(NamedTuple):
    """The residuals of every iterate, the start first: float ``[steps + 1, batch]``, or ``[steps + 1]`` for a problem
    that is not batched.

    A sample that has stopped repeats its last residual. After a prescribed number of steps the last iterate is missing,
    since it is not evaluated.

    Attributes:
        relative: as in :attr:`Solution.residual`; NaN where the size of the terms is not known yet, as at the start of
            a root or a minimum.
        absolute: as in :attr:`Solution.absolute_residual`.
    """

    relative: Tensor
    absolute: Tensor


class Turn(NamedTuple):
    """One solver's part in a solve by several.

    Attributes:
        solver: its name.
        tried: the number of samples that it was tried for.
        solved: the number of these that it solved.
    """

    solver: str
    tried: int
    solved: int


def turned(turns: Sequence[Turn]) -> str:
    """The part of a summary about several solvers; empty if there was only one."""
    if len(turns) < 2:
        return ""
    return "; " + ", then ".join(f"{name} solved {solved} of {tried}" for name, tried, solved in turns)


@dataclass
class AdjointRecord:
    """The place where a backward pass leaves its report for :attr:`Solution.adjoint`.

    Attributes:
        report: that of the latest backward pass; ``None`` before.
        coming: the report that a backward pass will leave, if it is known beforehand.
    """

    report: Report | None = None
    coming: Report | None = None


@dataclass(frozen=True)
class Solution:
    """The solution of an implicit problem and the figures of the solve.

    Attributes:
        value: the solution, with the structure of ``z0``; carries the gradient.
        status, steps, residual, evaluations: see :class:`Report`; scalars where the problem is not batched.
        trajectory: the iterates, each with the structure of ``z0``, oldest first; empty unless the solver has
            ``keep_trajectory=True``. If the solver keeps selected iterates, ``None`` stands for the others.
        aux: for a map with ``has_aux=True``, its auxiliary value at ``value``; ``None`` otherwise. It is
            differentiable, directly and through ``value``. It comes from an evaluation that is made anyway; where
            autograd records steps (:class:`~torchimplicit.gradients.UnrolledPhantom`; after a prescribed number of
            steps :class:`~torchimplicit.gradients.OneStep` and :class:`~torchimplicit.gradients.Unrolled`), from the
            last of these, as in a loop written by hand. If there was no evaluation at ``value``, one more is made and
            counted: under ``torch.func`` transforms; and without gradients if the last iterate is not the one returned,
            or was not evaluated (``steps=n`` with :class:`~torchimplicit.gradients.Implicit`).
        turns: for a solve by several solvers in turn (:class:`~torchimplicit.Polyalgorithm`, the default), which ones
            took part, and how many samples they solved.
        problem, args: as they were given to :func:`solve`, for a regularizer or a diagnostic at the solution:
            ``jacobian_frobenius(solution.problem, solution.value, *solution.args)``. They are missing in the attribute
            ``solution`` of an :class:`~torchimplicit.nn.Equilibrium`, and in a solution that was unpickled.
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: float
    trajectory: tuple[Any, ...] = ()
    aux: Any = field(default=None, repr=False, compare=False)
    turns: tuple[Turn, ...] = ()
    problem: Any = field(default=None, repr=False, compare=False)
    args: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    _norms: tuple[Tensor | None, tuple[tuple[Tensor, Tensor], ...]] = field(
        default=(None, ()), repr=False, compare=False
    )
    """The norms of the residual, ``[batch]`` or ``[batch, leaves]``, and the solver's trace."""
    _record: AdjointRecord = field(default_factory=AdjointRecord, repr=False, compare=False)
    _attach: Callable[[int], Any] | None = field(default=None, repr=False, compare=False)
    """Returns the iterate of a given number, with the derivative that it would have as the solution."""

    @property
    def converged(self) -> Tensor:
        """bool ``[batch]`` (or a scalar): the samples that reached their tolerance."""
        return self.status == Status.CONVERGED

    @property
    def fell_short(self) -> Tensor:
        """bool ``[batch]`` (or a scalar): the samples that reached neither their tolerance nor a prescribed number of
        steps."""
        return fell_short(self.status)

    @property
    def absolute_residual(self) -> Tensor | None:
        """float ``[batch]`` (or a scalar): the norm of the residual, for a fixed point :math:`\\lVert f(z)-z\\rVert`;
        ``residual`` is its relative size. ``None`` if nothing was evaluated, and under ``torch.func`` transforms."""
        norm = self._norms[0]
        return None if norm is None else self._shaped(_whole(norm))

    @property
    def trace(self) -> Trace | None:
        """The residuals of all iterates, if the solver has ``keep_trace=True``; ``None`` otherwise."""
        steps = self._norms[1]
        if not steps:
            return None
        relative = [parts if parts.ndim == 1 else parts.amax(dim=1) for _, parts in steps]
        absolute = [_whole(norm) for norm, _ in steps]
        return Trace(*(self._shaped(torch.stack(figures)) for figures in (relative, absolute)))

    def _shaped(self, figures: Tensor) -> Tensor:
        return figures if self.status.ndim else figures[..., 0]

    @property
    def adjoint(self) -> Report | None:
        """The figures of the backward pass, once it has run; ``None`` before.

        An estimator that takes a prescribed number of steps reports :attr:`Status.STEPS_TAKEN`, and NaN for an unknown
        residual. :class:`~torchimplicit.gradients.UnrolledPhantom` and :class:`~torchimplicit.gradients.Unrolled` leave
        no report under ``torch.func``.
        """
        return self._record.report

    def __getstate__(self) -> dict[str, Any]:
        """The values and figures, to be pickled or copied; without the graph, and without the problem, whose function
        often cannot be pickled."""
        cut = {"value": _cut(self.value), "trajectory": _cut(self.trajectory), "aux": _cut(self.aux)}
        return {**self.__dict__, **cut, "problem": None, "args": (), "_attach": None}

    def figures(self) -> Solution:
        """A copy without the state, its graph and the problem, to keep many of them. Its ``adjoint`` is filled in as
        well when the backward pass has run."""
        return replace(self, value=None, trajectory=(), aux=None, problem=None, args=(), _attach=None)

    def states(
        self,
        count: int | None = None,
        *,
        every: int | None = None,
        at: Sequence[int] | None = None,
        random: bool = False,
        generator: torch.Generator | None = None,
    ) -> list[Any]:
        """Selected iterates, and the solution as the last of the list, each with a derivative: for a loss on all of
        them.

        Each iterate is differentiated as if it were the solution, by the gradient estimator of the solve:
        :class:`~torchimplicit.gradients.Implicit` and the series take one evaluation and an adjoint solve for each,
        :class:`~torchimplicit.gradients.UnrolledPhantom` its steps from there, and
        :class:`~torchimplicit.gradients.OneStep` after a prescribed number of steps the step that led there. With
        :class:`~torchimplicit.gradients.Unrolled` they have their derivatives already. Samples that have stopped repeat
        their last state. Give one of ``count``, ``every`` and ``at``; or none of them, for the iterates that a solver
        with ``keep_trajectory=(4, 8)`` has kept.

        Args:
            count: the number of states, including the solution, evenly spaced; all if there are fewer.
            every: the states after this number of steps, twice that number, and so on.
            at: the states after these numbers of steps, 0 being the start.
            random: whether the ``count`` states are drawn at random without repetition, rather than evenly spaced.
            generator: for the draw; ``None``: the global one.

        Raises:
            ValueError: the solver did not keep the trajectory, or not one of these states.
        """
        self._check_kept()
        kept = [place for place, z in enumerate(self.trajectory) if z is not None]
        chosen = len(kept) < len(self.trajectory)
        ways = sum(way is not None for way in (count, every, at))
        if ways > 1 or (ways == 0 and not chosen):
            raise ValueError(
                "Solution.states takes one of count, every and at: states(4), states(every=2), states(at=[3])"
            )
        if random and count is None:
            raise ValueError("Solution.states draws a count of states at random: states(4, random=True)")
        last = len(self.trajectory) - 1
        if count is not None:
            places = chosen_iterates(self, count, random=random, generator=generator)
        elif every is not None:
            at_least("Solution.states", "every", every, 1)
            places = list(range(every, last, every))
        elif at is not None:
            places = list(at)
            for place in places:
                at_least("Solution.states", "at", place, 0)
        else:
            places = [place for place in kept if place < last]
        missing = sorted({place for place in places if place < last} - set(kept))
        if missing:
            raise ValueError(
                f"the solver has kept the states after {', '.join(map(str, kept))} steps, but those after "
                f"{', '.join(map(str, missing))} are asked for: give it keep_trajectory=True, or these numbers too"
            )
        return [*(self._state(place, last) for place in places), self.value]

    def _state(self, place: int, last: int) -> Any:
        assert self._attach is not None
        ended = place > last or (place == last and bool((self.status == Status.STEPS_TAKEN).all()))
        return self.value if ended else self._attach(place)

    def _check_kept(self) -> None:
        """Raise if the iterates were not kept, or are no longer there."""
        if self.value is not None and not self.trajectory:
            raise ValueError(
                "this needs the iterates: solve with a solver that has keep_trajectory=True, for example "
                "Anderson(keep_trajectory=True), outside torch.func transforms"
            )
        if self._attach is None:
            raise ValueError(
                "this needs the iterates with their problem, but this solution holds figures only, as does the "
                "attribute solution of an Equilibrium (so that no graph stays in memory) or one read from a file. "
                "Solve by layer.solve(x), or by torchimplicit.solve(FixedPoint(cell), z0, x, "
                "solver=Anderson(keep_trajectory=True)), and use the solution that is returned"
            )

    def summary(self) -> str:
        """One line of text: how many samples stopped for which reason, the largest residual, and which solvers were
        tried if there were several."""
        return Report(self.status, self.steps, self.residual, self.evaluations).summary() + turned(self.turns)


def chosen_iterates(
    solution: Solution, count: int, *, random: bool = False, generator: torch.Generator | None = None
) -> list[int]:
    """The places in the trajectory that :meth:`Solution.states` selects beside the solution, in ascending order.

    Args:
        solution: with its trajectory.
        count: the number of states, including the solution.
        random: whether they are drawn at random without repetition, rather than evenly spaced.
        generator: for the draw; ``None``: the global one.
    """
    at_least("states", "count", count, 1)
    between = len(solution.trajectory) - 2  # neither the start nor the last iterate, which is the solution
    number = min(count - 1, max(between, 0))
    if random:
        return (torch.randperm(between, generator=generator)[:number].sort().values + 1).tolist() if number else []
    return [round((k + 1) * (between + 1) / (number + 1)) for k in range(number)]


def fell_short(status: Tensor) -> Tensor:
    """bool, shaped like ``status``: the samples that reached neither their tolerance nor a prescribed number of
    steps."""
    return (status != Status.CONVERGED) & (status != Status.STEPS_TAKEN)


def _whole(norms: Tensor) -> Tensor:
    """The norm of the state ``[batch]``, from norms of its leaves ``[batch, leaves]`` (or from itself)."""
    return norms if norms.ndim == 1 else torch.linalg.vector_norm(norms, dim=1)


def _cut(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
