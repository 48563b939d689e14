"""What a solve returns: the point, and how it was found."""

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
    """The step budget ran out first; the value is the iterate of least residual."""
    NONFINITE = 2
    """The map gave NaN or infinity, or the residual grew without bound; the value is the last good iterate."""
    BREAKDOWN = 3
    """The method could not go on (a singular system, a line search without decrease); the value is the best iterate."""
    SADDLE = 4
    """Of an adjoint solve: the Hessian of the minimum has a negative eigenvalue, so the point is no minimum, and what
    was solved for is the derivative of a stationary point that no minimization would find. Of a minimization by
    :class:`~torchimplicit.NewtonKrylov`: it has come to such a point, and found no way down from it."""
    STEPS_TAKEN = 5
    """A number of ``steps`` was given, and they were taken: nothing was tested. The value is the last iterate. So it is
    with an estimator that takes a given number of steps or products backward."""


GROWTH_LIMIT = 1e6
"""A residual this many times the first one (plus its scale) counts as growing without bound: as NONFINITE."""


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
            of a residual, with a preconditioner M that of :math:`M^{-1}H`; after :class:`~torchimplicit.linear.CG` that
            of a direction, likewise; after other solvers, the least on the span of the solution and the right-hand
            side. ``None`` for a solve that says nothing of it.
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
        return fell_short(self.status)

    def summary(self) -> str:
        """One line for people: how many samples stopped for which reason, and the worst residual that is known."""
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
    """The residuals of every iterate, the start first: float ``[steps + 1, batch]``, or ``[steps + 1]`` of a problem
    that is not batched. A sample that has stopped stays where it is. After a given number of steps the last iterate is
    not evaluated, and not in it.

    Attributes:
        relative: as in :attr:`Solution.residual`; NaN where the size of the terms is not known yet, as at the start of
            a root or a minimum.
        absolute: as in :attr:`Solution.absolute_residual`.
    """

    relative: Tensor
    absolute: Tensor


class Turn(NamedTuple):
    """One solver's turn in a solve by several: its name, for how many samples it was tried, and how many of these it
    solved."""

    solver: str
    tried: int
    solved: int


def turned(turns: Sequence[Turn]) -> str:
    """What a summary adds of several solvers; nothing where one has done it all."""
    if len(turns) < 2:
        return ""
    return "; " + ", then ".join(f"{name} solved {solved} of {tried}" for name, tried, solved in turns)


@dataclass
class AdjointRecord:
    """Where a backward pass leaves its report, so that :attr:`Solution.adjoint` shows it afterwards."""

    report: Report | None = None
    coming: Report | None = None
    """What a backward pass through the solution will leave, where that is known before."""


@dataclass(frozen=True)
class Solution:
    """The solution of an implicit problem and the figures of the solve.

    Attributes:
        value: the solution, with the structure of ``z0``; carries the gradient.
        status, steps, residual, evaluations: see :class:`Report`; scalars where the problem is not batched.
        trajectory: the iterates, each with the structure of ``z0``, oldest first; empty unless the solver was told
            ``keep_trajectory=True``. Where it was told which to keep, ``None`` stands in the place of the others.
        aux: of a map with ``has_aux=True``, what it returned beside the state at ``value``, in an evaluation that is
            made anyway; where autograd sees steps (:class:`~torchimplicit.gradients.UnrolledPhantom`; after a given
            number of them :class:`~torchimplicit.gradients.OneStep` and :class:`~torchimplicit.gradients.Unrolled`), in
            the last of those, as in a loop written by hand. It carries the gradient, in what its formula holds and
            through ``value``. One evaluation more, which is counted, is made where none was at ``value``: under
            ``torch.func`` transforms, and without gradients where the last iterate is not what is returned, or was not
            evaluated (``steps=n`` with :class:`~torchimplicit.gradients.Implicit`). ``None`` without ``has_aux``.
        turns: of a solve by several solvers in turn (:class:`~torchimplicit.Polyalgorithm`, which is the default),
            which ones took part, and what they solved.
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
    aux: Any = field(default=None, repr=False, compare=False)
    turns: tuple[Turn, ...] = ()
    problem: Any = field(default=None, repr=False, compare=False)
    args: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    _norms: tuple[Tensor | None, tuple[tuple[Tensor, Tensor], ...]] = field(
        default=(None, ()), repr=False, compare=False
    )
    """The norms of the residual, ``[batch]`` or ``[batch, leaves]``, and the trace as the solver left it."""
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
        return fell_short(self.status)

    @property
    def absolute_residual(self) -> Tensor | None:
        """float ``[batch]`` (or a scalar): the norm of the residual whose relative size is ``residual``; for a
        fixed point, :math:`\\lVert f(z)-z\\rVert`. ``None`` where nothing was evaluated, and under ``torch.func``
        transforms."""
        norm = self._norms[0]
        return None if norm is None else self._shaped(_whole(norm))

    @property
    def trace(self) -> Trace | None:
        """The residual of every iterate, where the solver was told ``keep_trace=True``; ``None`` otherwise."""
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

        An estimator that takes a given number of steps reports :attr:`Status.STEPS_TAKEN`, and NaN for a residual that
        it does not know. :class:`~torchimplicit.gradients.UnrolledPhantom` and
        :class:`~torchimplicit.gradients.Unrolled` leave no report under ``torch.func``.
        """
        return self._record.report

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: values and figures. The graph and the problem, whose function is often none that
        could be pickled, stay behind."""
        cut = {"value": _cut(self.value), "trajectory": _cut(self.trajectory), "aux": _cut(self.aux)}
        return {**self.__dict__, **cut, "problem": None, "args": (), "_attach": None}

    def figures(self) -> Solution:
        """The same figures without the state, its graph and the problem: to keep many of them. The ``adjoint`` is
        filled in here too, when the backward pass has run."""
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
        """Iterates on the way, and the solution as the last of the list, each with a derivative: for a loss of the
        user's own on all of them.

        Each iterate is treated as the solution by the gradient estimator of the solve, at what that costs:
        :class:`~torchimplicit.gradients.Implicit` and the series take one evaluation and an adjoint solve for each,
        :class:`~torchimplicit.gradients.UnrolledPhantom` its steps from there, and
        :class:`~torchimplicit.gradients.OneStep` after a given number of steps the step that led there. Through
        :class:`~torchimplicit.gradients.Unrolled` they are what the steps make them, at no further cost. Samples that
        have stopped stay where they are, in what is beyond the last iterate too. One of ``count``, ``every`` and ``at``
        is to be given; none of them: those that the solver was told to keep, ``keep_trajectory=(4, 8)``.

        Args:
            count: so many, the solution among them, evenly spaced; all where there are fewer.
            every: after this number of steps, twice that number, and so on.
            at: after these numbers of steps, 0 being the start.
            random: whether the ``count`` are drawn at random, without repetition, rather than evenly spaced.
            generator: for that; ``None``: the global one.

        Raises:
            ValueError: the solver was not told ``keep_trajectory=True``, or not told to keep one of them.
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
                f"the solver was told to keep the states after {', '.join(map(str, kept))} steps, and those after "
                f"{', '.join(map(str, missing))} are asked for: give it keep_trajectory=True, or these numbers too"
            )
        return [*(self._state(place, last) for place in places), self.value]

    def _state(self, place: int, last: int) -> Any:
        assert self._attach is not None
        ended = place > last or (place == last and bool((self.status == Status.STEPS_TAKEN).all()))
        return self.value if ended else self._attach(place)

    def _check_kept(self) -> None:
        """Raise where the iterates are gone, or were never kept."""
        if self.value is not None and not self.trajectory:
            raise ValueError(
                "this needs the iterates: solve with a solver that has keep_trajectory=True, for example "
                "Anderson(keep_trajectory=True), outside torch.func transforms"
            )
        if self._attach is None:
            raise ValueError(
                "this needs the iterates with what they came from, and this solution is cut off from it, as one that "
                "an Equilibrium keeps in its attribute solution, lest a graph stay in memory, or one read from a file. "
                "Solve by layer.solve(x), or by torchimplicit.solve(FixedPoint(cell), z0, x, "
                "solver=Anderson(keep_trajectory=True)), and take what that returns"
            )

    def summary(self) -> str:
        """One line for people: how many samples stopped for which reason, the worst residual, and which solvers were
        tried in turn, where it took several."""
        return Report(self.status, self.steps, self.residual, self.evaluations).summary() + turned(self.turns)


def chosen_iterates(
    solution: Solution, count: int, *, random: bool = False, generator: torch.Generator | None = None
) -> list[int]:
    """Which iterates of the trajectory :meth:`Solution.states` takes beside the solution, in their order.

    Args:
        count: n, the solution included.
        random: whether they are drawn at random, without repetition, rather than evenly spaced.
        generator: for that; ``None``: the global one.
    """
    at_least("states", "count", count, 1)
    between = len(solution.trajectory) - 2  # the start is not an iterate of the map, the last is the solution
    wanted = min(count - 1, max(between, 0))
    if random:
        return (torch.randperm(between, generator=generator)[:wanted].sort().values + 1).tolist() if wanted else []
    return [round((k + 1) * (between + 1) / (wanted + 1)) for k in range(wanted)]


def fell_short(status: Tensor) -> Tensor:
    """bool, of the shape of ``status``: where it tells of something that was asked for and not done."""
    return (status != Status.CONVERGED) & (status != Status.STEPS_TAKEN)


def _whole(norms: Tensor) -> Tensor:
    """Of the norms of leaves, that of the state."""
    return norms if norms.ndim == 1 else torch.linalg.vector_norm(norms, dim=1)


def _cut(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
