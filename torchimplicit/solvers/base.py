"""What every solver is: a step, and the budget that the loop gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.precision import default_rtol
from torchimplicit.problems import Point, System
from torchimplicit.problems.system import explained
from torchimplicit.validation import check_count, check_nonnegative


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

    def place(self, z: Tensor) -> Tensor:
        """``z``, put back on the constraint where there is one."""
        return self.system.place(z, self.params)

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
    """

    active: Tensor | None
    improving: bool


@dataclass(frozen=True)
class Move:
    """What a solver's step gives to the loop.

    Attributes:
        to: the next state ``[batch, dim]``; or the point there, where the step has evaluated it already.
        state: the solver's own state, a ``NamedTuple`` whose tensors all have the batch in dim 0; ``None`` for none.
        breakdown: bool ``[batch]``: samples for which the method cannot go on; ``None`` for none.
    """

    to: Tensor | Point
    state: Any = None
    breakdown: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """How the solution is found. A subclass is final, frozen, and owns its step only: the loop is
    :func:`~torchimplicit.solvers.iterate.iterate`.

    Args:
        rtol: relative tolerance, per sample: the norm of the residual over ``‖f(z)‖`` for a fixed point, over the
            first residual's norm for a root or a free minimum, over the norm of the whole gradient for a constrained
            one. ``None``: ``eps ** (2/3)`` of the state's dtype (2.4e-5 in float32, 3.7e-11 in float64).
        atol: absolute tolerance on the norm of the residual, added to the relative one. ``None``: a hundredth of the
            dtype's ``eps`` times the size of the first evaluation, so that a solution of zero is found as well; for
            a root or a free minimum, ``eps``, so that a warm start is not asked for more than rounding allows.
        max_steps: the most steps that a sample may take.
        keep_trajectory: whether to keep every iterate, in ``solution.trajectory``.
        check_every: after how many steps the host asks whether all samples are done. Each such question waits for
            the device; on a GPU a larger number saves time and may cost a few evaluations at the end.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100
    keep_trajectory: bool = False
    check_every: int = 1

    def __post_init__(self) -> None:
        check_nonnegative(self, "rtol", optional=True)
        check_nonnegative(self, "atol", optional=True)
        check_count(self, "max_steps")
        check_count(self, "check_every")
        self.check()

    def check(self) -> None:
        """Validates the subclass's own fields."""

    def supports(self, system: System) -> str | None:
        """``None`` where this solver can solve ``system``; otherwise why not, and what to take instead."""
        return None

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

    def relative_tolerance(self, dtype: torch.dtype) -> float:
        """``rtol``, or its default for states of ``dtype``."""
        return default_rtol(dtype) if self.rtol is None else self.rtol
