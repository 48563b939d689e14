"""The interface of a solver: one step, and the budget that the loop gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.linear import LinearOperator
from torchimplicit.problems import Point, System
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.problems.system import explained, vjp
from torchimplicit.solvers.tolerance import Judge, Tolerance, check_tolerance
from torchimplicit.validation import check_count, check_counts


class Evaluator:
    """Evaluates the system at fixed parameters and counts the rows that are evaluated.

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
        """Tell the system that step number ``step`` of the solver begins."""
        self._now = self.system.during(step)

    def __call__(self, z: Tensor) -> Point:
        """Evaluate the system at ``z`` (``[rows, dim]``)."""
        self.rows_evaluated += z.shape[0]
        if self._part:
            # a function that cannot take fewer rows fails here, and the user needs to hear about rowwise=True
            with explained():
                return self._now.at(z, self.params)
        return self._now.at(z, self.params)

    def product(self, z: Tensor, v: Tensor) -> Tensor | None:
        """:math:`A v` at ``z``; ``None`` where the user's function lacks the derivative. Not counted as an
        evaluation."""
        system = self.system
        try:
            if not torch.is_grad_enabled():
                return self.operator(z).product(v)
            # under Unrolled the product must itself be differentiable, which nested forward mode is not everywhere: the
            # vjp is linear in its cotangent, and its derivative there is the jvp
            _, pull = vjp(lambda z: system.residual(z, *self.params), z)
            _, twice = vjp(lambda w: pull(w)[0], torch.zeros_like(v))
            return twice(v)[0]
        except RuntimeError:
            return None

    def image(self, z: Tensor) -> Tensor:
        """Evaluate the map of a fixed-point system, without forming its residual."""
        self.rows_evaluated += z.shape[0]
        assert isinstance(self._now, ImageSystem)
        return self._now.advanced(z, self.params)

    def operator(self, z: Tensor) -> LinearOperator:
        """The Jacobian :math:`A` at ``z`` as a linear operator."""
        return self.system.operator(self.system.linearize(z, self.params), False)

    def project(self, z: Tensor) -> Tensor:
        """Project ``z`` onto the constraint, where there is one."""
        return self.system.project(z, self.params)

    def take(self, rows: Tensor) -> Evaluator:
        """An evaluator for the samples ``rows`` that continues this one's count."""
        part = Evaluator(self.system, self.system.rows(self.params, rows), self.rows_evaluated, part=True)
        part._now = self._now
        return part


class Progress(NamedTuple):
    """The loop's knowledge of the samples when a step begins.

    Attributes:
        active: bool ``[batch]``, the samples that still take part; ``None`` for all. A step may return any value for
            the others, since the loop keeps them where they are.
        improving: whether every active sample is known to have its smallest residual so far.
        judge: the stopping rule.
        solved: bool ``[batch]``, the samples that meet the stopping rule and wait for the solver to confirm them
            (:meth:`Solver.confirms`); ``None`` where the rule decides alone.
    """

    active: Tensor | None
    improving: bool
    judge: Judge | None = None
    solved: Tensor | None = None

    def short(self, point: Point, newton: Tensor, exact: Tensor) -> Tensor | None:
        """The active samples that need no further step, bool ``[batch]``.

        A sample is solved where its Newton step is within the relative tolerance, provided that the step solves the
        Newton equation, or where the absolute tolerance is met.

        Args:
            newton: the Newton step ``[batch, dim]``.
            exact: bool ``[batch]``, where ``newton`` solves the Newton equation.

        Returns:
            ``None`` for systems whose points carry the scale of their residual: there the rule needs no step.
        """
        judge = self.judge
        if judge is None or judge.measure is None:
            return None
        solved = judge.measure.short(point, newton, judge.rtol) & exact
        if self.solved is not None:
            within = point.size() <= judge.atol
            solved = solved | (within if within.ndim == 1 else within.all(dim=1))
        return solved if self.active is None else solved & self.active

    def refuse(self, samples: Tensor) -> None:
        """Do not estimate the scale of the residual from the coming step of ``samples``, bool ``[batch]``.

        The scale is measured from how much a short step changes the residual. A step that was shortened by a line
        search or a trust region is short for another reason, and would make the tolerance look met.
        """
        if self.judge is not None and self.judge.measure is not None:
            self.judge.measure.refuse(samples)


class Move(NamedTuple):
    """The result of a solver's step.

    Attributes:
        to: the next state ``[batch, dim]``; or the evaluated :class:`Point` there, where the step has it already.
        state: the solver's own state, a ``NamedTuple`` whose tensors all have the batch in dim 0; ``None`` for none.
        breakdown: bool ``[batch]``, samples for which the method cannot go on; ``None`` for none.
        solved: bool ``[batch]``, samples that the step has found to be solved where they are, and has not moved.
        saddle: bool ``[batch]``, those of ``breakdown`` that are at a stationary point which is not a minimum.
        left: bool ``[batch]``, samples that the step has moved off such a point. Their best iterate is forgotten:
            otherwise the saddle would be returned, because its residual is the smallest.
    """

    to: Tensor | Point
    state: Any = None
    breakdown: Tensor | None = None
    solved: Tensor | None = None
    saddle: Tensor | None = None
    left: Tensor | None = None


_TESTS = ("rtol", "atol", "max_steps", "check_every")
"""The options that have no effect where a number of ``steps`` is prescribed."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base class of the solvers. A subclass is final and frozen, and owns its step only; the loop is
    :func:`~torchimplicit.solvers.iterate.iterate`.

    Args:
        rtol: relative tolerance, per sample and per leaf of the state: the norm of the residual divided by the size
            of the terms that it is made of. A number, or a pytree of numbers with the state's structure (for
            :class:`JointInference`, a :class:`JointState` of three). ``None``: ``eps ** (2/3)`` of the state's dtype
            (2.4e-5 in float32, 3.7e-11 in float64). The size of the terms is :math:`\\lVert f(z)\\rVert` for a fixed
            point; for a root or a minimum it is how much the residual changes when the state changes by its own size,
            see :class:`~torchimplicit.solvers.tolerance.Measure`.
        atol: absolute tolerance on the norm of the residual, added to the relative one: a number, or a pytree of
            numbers with the state's structure. ``None``: none.
        max_steps: the most steps that a sample may take.
        keep_trajectory: whether to keep every iterate in ``solution.trajectory``; or a sequence of step numbers to
            keep (0 is the start), as ``(4, 8)``: the trajectory then holds ``None`` for the others.
        keep_trace: whether to keep the residual of every iterate in ``solution.trace``.
        check_every: the host asks whether all samples are done once every so many steps. Each question waits for the
            device; on a GPU a larger number saves time and may cost a few evaluations at the end.
        steps: take exactly this many steps with every sample, as in a loop written by hand: nothing is tested or
            warned about, and the last iterate is returned with :attr:`Status.STEPS_TAKEN`. That iterate is not
            evaluated, so ``solution.residual`` belongs to the one before it. Zero returns the start. ``None``: step
            until the tolerance is met or ``max_steps`` are taken.
        return_last: whether a sample that has used up ``max_steps`` is returned at its last iterate instead of the
            iterate with the smallest residual.

    Raises:
        ValueError: a number is out of range, or ``steps`` is given together with an option that it makes void.
        TypeError: a tolerance is not a number or a pytree of numbers.
    """

    by_products: ClassVar[bool] = False
    """True if a step takes products with the Jacobian."""
    searches: ClassVar[bool] = False
    """True if a step evaluates several points and selects among them per sample. Samples that depend on each other
    must then be solved as one system, since such a selection is none of the points that were evaluated."""

    bounded: ClassVar[bool] = False
    """True if the iterates stay in a bounded set: then a residual of any size on the way is no sign of divergence."""

    mixes_parts: ClassVar[bool] = False
    """True if the steps on a joint state depend on the units of its parts, which are then chosen before the first."""

    remembers: ClassVar[bool] = False
    """True if a step combines each sample's past steps as if the sample were alone (Anderson, Broyden). Where samples
    depend on each other, that may fail to converge."""

    not_unrolled: ClassVar[str | None] = None
    """Advice for users if autograd cannot follow the steps, because they branch on the data or solve linear systems;
    ``None`` if it can."""

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
                    f"{type(self).__name__}(steps={self.steps}) takes exactly that many steps and tests nothing, so "
                    f"{' and '.join(idle)} would have no effect: leave out one or the other (given(steps) does so)"
                )
        self.check()

    def given(self, steps: int) -> Self:
        """Return the same method with a prescribed number of ``steps``; tolerances and ``max_steps`` are reset."""
        defaults: dict[str, Any] = {name: self.__dataclass_fields__[name].default for name in _TESTS}
        return replace(self, steps=steps, **defaults)

    def check_unrolled(self) -> None:
        """Raise :class:`UnsupportedDerivativeError` where autograd is to follow steps that it cannot follow."""
        if self.not_unrolled is not None and torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                f"Unrolled cannot differentiate the steps of {type(self).__name__}: {self.not_unrolled}"
            )

    def keeps(self, step: int) -> bool:
        """Return whether the iterate after ``step`` steps is kept in the trajectory."""
        kept = self.keep_trajectory
        return kept if isinstance(kept, bool) else step in kept

    def going_on(self, trajectory: Sequence[Any]) -> Self:
        """Return the same method for a solve that continues where ``trajectory`` ended."""
        if isinstance(self.keep_trajectory, bool):
            return self
        taken = len(trajectory) - 1  # the step numbers to keep count from the first start
        return replace(self, keep_trajectory=tuple(k - taken for k in self.keep_trajectory if k > taken))

    def check(self) -> None:
        """Validate the subclass's own fields."""

    @property
    def straight(self) -> bool:
        """True if the next iterate is the map's value as it is (plain iteration)."""
        return False

    @property
    def leading(self) -> Solver:
        """The solver that takes the first steps: itself, unless it is made of several."""
        return self

    def supports(self, system: System) -> None:
        """Raise where this solver cannot solve ``system``.

        Raises:
            ValueError: it cannot; the message says what to take instead.
        """

    def suits(self, system: System) -> bool:
        """Return whether :meth:`supports` accepts ``system``."""
        try:
            self.supports(system)
        except ValueError:
            return False
        return True

    @abstractmethod
    def start(self, point: Point) -> Any:
        """The solver's own state at the first point."""

    @abstractmethod
    def step(self, evaluate: Evaluator, point: Point, state: Any, progress: Progress) -> Move:
        """Take one step from ``point``, with all samples at once.

        Where grad mode is on, the step must be differentiable: it may not write into tensors that autograd has seen.

        Args:
            evaluate: for steps that need more evaluations than the one at ``point``.
            point: where the samples are.
            state: the solver's own, from :meth:`start` or the last :class:`Move`.
            progress: which samples still take part.
        """

    def wants_product(self) -> bool:
        """Return whether the first point of a root or a minimum should carry the product of the Jacobian with its
        residual (:attr:`~torchimplicit.problems.Point.product`). The relative tolerance needs it to judge the start,
        and some solvers choose the length of their first step by it."""
        return not self.by_products and self.wants_relative()

    def wants_relative(self) -> bool:
        """Return whether any leaf has a relative tolerance."""
        return self.steps is None and (self.rtol is None or any(pytree.tree_leaves(self.rtol)))

    def confirms(self, system: System, z: Tensor) -> bool:
        """Return whether a sample that meets the stopping rule counts as solved only once a step agrees
        (:attr:`Move.solved`), as where the step knows the curvature and the residual alone cannot tell a minimum from a
        saddle."""
        return False

    def fell_short(self, summary: str) -> str:
        """The message for the user where samples were not solved."""
        which = "last" if self.return_last else "best"
        return (
            f"{type(self).__name__} did not converge: {summary}. The {which} iterate is returned. Allow more "
            "max_steps, loosen rtol or atol, or try another solver"
        )
