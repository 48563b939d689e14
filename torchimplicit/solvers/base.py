"""What every solver is: a step, and the budget that the loop gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.linear import LinearOperator
from torchimplicit.precision import default_rtol
from torchimplicit.problems import Point, System
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.problems.system import explained, vjp
from torchimplicit.solvers.tolerance import Judge, Tolerance, check_tolerance, least
from torchimplicit.validation import check_count, check_counts


class Evaluator:
    """The system at its parameters, counting what is evaluated.

    Attributes:
        rows_evaluated: row evaluations so far.
    """

    def __init__(self, system: System, params: Sequence[Tensor], rows_evaluated: int = 0, part: bool = False):
        self.system = system
        self.params = tuple(params)
        self.rows_evaluated = rows_evaluated
        self._part = part
        self._now = system.during(0)

    def begin(self, step: int) -> None:
        """A step of the solver begins."""
        self._now = self.system.during(step)

    def __call__(self, z: Tensor) -> Point:
        """One evaluation, ``z`` being ``[rows, dim]``."""
        self.rows_evaluated += z.shape[0]
        if self._part:
            with explained():
                return self._now.at(z, self.params)
        return self._now.at(z, self.params)

    def product(self, z: Tensor, v: Tensor) -> Tensor | None:
        """:math:`A v` at ``z``; ``None`` where the user's function has no second derivative to take it from. What that
        evaluates is not counted."""
        system = self.system
        try:
            if not torch.is_grad_enabled():
                return self.operator(z).product(v)
            _, pull = vjp(lambda z: system.residual(z, *self.params), z)
            _, twice = vjp(lambda w: pull(w)[0], torch.zeros_like(v))
            return twice(v)[0]
        except RuntimeError:
            return None

    def image(self, z: Tensor) -> Tensor:
        """Of a fixed point, one evaluation of its map alone."""
        self.rows_evaluated += z.shape[0]
        assert isinstance(self.system, ImageSystem)
        return self.system.image(z, *self.params)

    def operator(self, z: Tensor) -> LinearOperator:
        """The Jacobian :math:`A` at ``z``, by products."""
        return self.system.operator(self.system.linearize(z, self.params), False)

    def project(self, z: Tensor) -> Tensor:
        """``z``, put back on the constraint where there is one."""
        return self.system.project(z, self.params)

    def take(self, rows: Tensor) -> Evaluator:
        """The evaluator of the samples ``rows``, which goes on with this one's count."""
        part = Evaluator(self.system, self.system.rows(self.params, rows), self.rows_evaluated, part=True)
        part._now = self._now
        return part


class Progress(NamedTuple):
    """What the loop knows of the samples as a step begins.

    Attributes:
        active: bool ``[batch]``, the samples that still take part; ``None`` for all. The others may get any value from
            a step: the loop keeps them where they are.
        improving: whether the residual of every active sample is known to be its least so far.
        judge: the rule by which the loop finds samples solved.
        solved: bool ``[batch]``, the samples that the rule has found solved, where the solver :meth:`confirms` it.
    """

    active: Tensor | None
    improving: bool
    judge: Judge | None = None
    solved: Tensor | None = None

    def short(self, point: Point, newton: Tensor, exact: Tensor) -> Tensor | None:
        """bool ``[batch]``: the active samples that need no step, since Newton's, where it solves its equation
        (``exact``, bool ``[batch]``), is within the tolerance, or since the absolute tolerance is met; ``None`` where
        the point itself tells its tolerance."""
        judge = self.judge
        if judge is None or judge.measure is None:
            return None
        solved = judge.measure.short(point, newton, judge.rtol) & exact
        if self.solved is not None:
            within = point.size() <= judge.atol
            solved = solved | (within if within.ndim == 1 else within.all(dim=1))
        return solved if self.active is None else solved & self.active


@dataclass(frozen=True)
class Move:
    """What a solver's step gives to the loop.

    Attributes:
        to: the next state ``[batch, dim]``; or the point there, where the step has evaluated it already.
        state: the solver's own state, a ``NamedTuple`` whose tensors all have the batch in dim 0; ``None`` for none.
        breakdown: bool ``[batch]``: samples for which the method cannot go on; ``None`` for none.
        solved: bool ``[batch]``: samples that the step has found to be solved where they are, and has not moved.
        saddle: bool ``[batch]``: those of ``breakdown`` that are at a stationary point which is no minimum.
        left: bool ``[batch]``: samples that were at such a point, which is not to be returned for its small residual.
    """

    to: Tensor | Point
    state: Any = None
    breakdown: Tensor | None = None
    solved: Tensor | None = None
    saddle: Tensor | None = None
    left: Tensor | None = None


_TESTS = ("rtol", "atol", "max_steps", "check_every")
"""What says when a sample is done."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """How the solution is found. A subclass is final, frozen, and owns its step only: the loop is
    :func:`~torchimplicit.solvers.iterate.iterate`.

    Args:
        rtol: relative tolerance, per sample and per leaf of the state: of the norm of the residual against the size
            of the terms that make it up. A number, or a pytree of numbers like the state (for
            :class:`JointInference`, a :class:`JointState` of three). ``None``: ``eps ** (2/3)`` of the state's dtype
            (2.4e-5 in float32, 3.7e-11 in float64). The terms are :math:`\\lVert f(z)\\rVert` for a fixed point; for a
            root or a minimum, what a change of the state by its own size makes of the residual: see
            :class:`~torchimplicit.solvers.tolerance.Measure`.
        atol: absolute tolerance on the norm of the residual, added to the relative one; a number or a pytree likewise.
            ``None``: none.
        max_steps: the most steps that a sample may take.
        keep_trajectory: whether to keep every iterate, in ``solution.trajectory``; or after which numbers of steps,
            0 being the start, as ``(4, 8)``: the trajectory has ``None`` in the place of the others.
        keep_trace: whether to keep every iterate's residual, in ``solution.trace``.
        check_every: after how many steps the host asks whether all samples are done. Each such question waits for
            the device; on a GPU a larger number saves time and may cost a few evaluations at the end.
        steps: so many steps of every sample, meant so: as in a loop written by hand, nothing is tested, nothing is
            warned of, and the last iterate is returned, with :attr:`Status.STEPS_TAKEN`. The value that the last
            step leads to is not evaluated, and ``solution.residual`` is that of the last state that was. Zero returns
            the start. ``None``: until the tolerance is met, or ``max_steps`` are taken.
        return_last: whether a sample that has taken ``max_steps`` is returned at its last iterate, in place of the one
            of least residual.
    """

    by_products: ClassVar[bool] = False
    """Whether a step takes products with the Jacobian."""
    searches: ClassVar[bool] = False
    """Whether a step evaluates several points and takes of them what suits each sample: where samples depend on each
    other, they have to be solved as one system."""

    bounded: ClassVar[bool] = False
    """Whether its iterates cannot run off: a residual may then be of any size on the way."""

    remembers: ClassVar[bool] = False
    """Whether a step combines what each sample's own steps have told, as if it were alone: where samples depend on each
    other, that may not lead to the solution."""

    rtol: Tolerance | None = None
    atol: Tolerance | None = None
    max_steps: int = 100
    keep_trajectory: bool | Sequence[int] = False
    keep_trace: bool = False
    check_every: int = 1
    steps: int | None = None
    return_last: bool = False

    def __post_init__(self) -> None:
        check_tolerance(self, "rtol")
        check_tolerance(self, "atol")
        check_count(self, "max_steps")
        check_count(self, "check_every")
        if not isinstance(self.keep_trajectory, bool):
            object.__setattr__(self, "keep_trajectory", check_counts(self, "keep_trajectory"))
        if self.steps is not None:
            check_count(self, "steps", least=0)
            idle = [name for name in _TESTS if getattr(self, name) != self.__dataclass_fields__[name].default]
            if idle:
                raise ValueError(
                    f"{type(self).__name__}(steps={self.steps}) takes so many steps and tests nothing, so that "
                    f"{' and '.join(idle)} would have no effect: leave out one or the other (given(steps) does so)"
                )
        self.check()

    def given(self, steps: int) -> Self:
        """The same method with so many ``steps``, whatever it was told of tolerances and ``max_steps``."""
        usual: dict[str, Any] = {name: self.__dataclass_fields__[name].default for name in _TESTS}
        return replace(self, steps=steps, **usual)

    def keeps(self, step: int) -> bool:
        """Whether the iterate after so many steps is to be kept."""
        kept = self.keep_trajectory
        return kept if isinstance(kept, bool) else step in kept

    def going_on(self, trajectory: Sequence[Any]) -> Self:
        """The same method for a solve that goes on where this ``trajectory`` has ended."""
        if isinstance(self.keep_trajectory, bool):
            return self
        taken = len(trajectory) - 1
        return replace(self, keep_trajectory=tuple(k - taken for k in self.keep_trajectory if k > taken))

    def check(self) -> None:
        """Validates the subclass's own fields."""

    @property
    def straight(self) -> bool:
        """Whether the map's value is the next iterate."""
        return False

    @property
    def leading(self) -> Solver:
        """The solver that takes the first steps: itself, unless it is made of several."""
        return self

    def supports(self, system: System) -> None:
        """Check that this solver can solve ``system``.

        Raises:
            ValueError: it cannot; the message says what to take instead.
        """

    def suits(self, system: System) -> bool:
        """Whether :meth:`supports` has nothing against ``system``."""
        try:
            self.supports(system)
        except ValueError:
            return False
        return True

    @abstractmethod
    def start(self, point: Point) -> Any:
        """The solver's state at the first point."""

    @abstractmethod
    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        """One step from ``point``, all samples at once.

        Args:
            evaluate: for steps that need more than the evaluation at ``point``.
            point: where the samples are.
            state: the solver's own, from :meth:`start` or the last :class:`Move`.
            progress: which samples still take part.

        Where grad mode is on, the step must be differentiable: it may not write into tensors that autograd has seen.
        """

    def wants_product(self) -> bool:
        """Whether the first point of a root or a minimum should carry the product of the Jacobian with its residual
        (:attr:`~torchimplicit.problems.Point.product`): for the relative tolerance, which it lets judge the start; or
        for a first step in the units of the problem."""
        return not self.by_products and self.wants_relative()

    def wants_relative(self) -> bool:
        """Whether any leaf has a relative tolerance."""
        return self.steps is None and (self.rtol is None or any(pytree.tree_leaves(self.rtol)))

    def confirms(self, system: System, z: Tensor) -> bool:
        """Whether a sample counts as solved only once a step has said so (:attr:`Move.solved`): the step then knows
        more than the residual."""
        return False

    def fell_short(self, summary: str) -> str:
        """What the user is told where samples were not solved."""
        which = "last" if self.return_last else "best"
        return (
            f"{type(self).__name__} did not converge: {summary}. The {which} iterate is returned. Allow more "
            "max_steps, loosen rtol or atol, or try another solver"
        )

    def relative_tolerance(self, dtype: torch.dtype) -> float:
        """``rtol``, or its default for states of ``dtype``; of several, the least."""
        return default_rtol(dtype) if self.rtol is None else least(self.rtol)
