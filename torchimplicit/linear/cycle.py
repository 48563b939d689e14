"""One cycle of the linear loop: steps of a method until every row has stopped or the method's memory is full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.rowwise import clear, column, select
from torchimplicit.linear.system import LinearSystem
from torchimplicit.solution import Report, Status

assert (Status.CONVERGED, Status.MAX_STEPS) == (0, 1), "statuses are made from comparisons with the tolerance"

CROWD = 0.75
"""Stopped rows are dropped once at most this share of the rows is still active."""

ROUNDING = 100
"""A curvature of at most this many times ``eps`` of the matrix's norm is taken for rounding."""


class Method(ABC):
    """The steps of one iterative method.

    Its state is a ``NamedTuple`` whose tensors (those in nested tuples too) have the rows in dimension 0, and are not
    written to once they belong to a state. Required fields are ``x`` (``[rows, dim]``), the iterate or the start of the
    cycle, and ``norm`` (``[rows]``), the norm of the residual. Optional fields:

    - ``broken``, bool ``[rows]``: where the method cannot go on;
    - ``slow``, bool ``[rows]``: counted at each check, and the count passed to the next step;
    - ``curvature``, ``[rows, 1]``: the smallest curvature met in a symmetric matrix, infinite if none was negative;
    - ``tally``, ``[rows, 1]``: a sum over the steps, passed to :meth:`figures`.

    When a row stops, all of its fields but those in ``kept`` are set to zero, and steps must leave such a row as it is.

    Attributes:
        kept: the fields of the state that hold the iterate.
        monotone: whether ``norm`` never grows, so that the last iterate is the best one.
        definite: whether the preconditioner has to be symmetric positive definite.
        cycle: the steps after which the method has to restart from its iterate; ``None`` for no limit.
        curved: whether its state has a ``curvature``.
        growth: a row stops as non-finite once its residual exceeds its first one by this factor.
        watched: whether residuals are tested on the way; if not, all steps are taken.
    """

    kept: tuple[str, ...] = ("x",)
    monotone: bool = True
    definite: bool = False
    cycle: int | None = None
    curved: bool = False
    growth: float = torch.inf
    watched: bool = True

    @abstractmethod
    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> Any:
        """The state at ``x`` (``[rows, dim]``), whose residual is ``r``."""

    @abstractmethod
    def step(self, system: LinearSystem, state: Any, slow: int | None) -> Any:
        """The next state. ``slow`` is the number of slow rows in ``state``, ``None`` where it was not read."""

    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of the rows ``rows`` (ascending, int64 ``[k]``); ``state`` is not used any more."""
        return select(state, rows)

    def iterate(self, state: Any) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """The iterates, with what is known of them.

        Returns:
            The iterates ``[rows, dim]``; a bound of the difference between their true residuals and ``norm``
            (``[rows]`` or one number for all, infinite where the recurrence gives none); and a lower bound of the norm
            of each row's operator (``[rows]``; ``None`` where the method knows none).
        """
        return state.x, 0.0, None

    def figures(self, report: Report, tally: Tensor) -> Report:
        """The report with the method's own figures, from the ``tally`` (``[batch]``) summed over all cycles."""
        return report


class CycleResult(NamedTuple):
    """The outcome of a cycle for each row.

    Attributes:
        x: iterates, ``[rows, dim]``.
        norm: the norms of their residuals, by the recurrence; ``[rows]`` like all that follows.
        gap: a bound of the error of ``norm``.
        steps: the number of steps.
        status: see :class:`~torchimplicit.Status`.
        curvature: the smallest negative curvature, infinite where there was none; zero from a method that meets none.
        size: a lower bound of the norm of the matrix.
        tally: the method's own sum; zero from a method without one.
    """

    x: Tensor
    norm: Tensor
    gap: Tensor
    steps: Tensor
    status: Tensor
    curvature: Tensor
    size: Tensor
    tally: Tensor

    def updated(self, part: CycleResult, rows: Tensor | None) -> CycleResult:
        """This outcome with ``part`` in the given rows (``None``: in all)."""
        if rows is None:
            return part
        return CycleResult(*(old.index_copy(0, rows, new) for old, new in zip(self, part, strict=True)))

    def followed_by(self, later: CycleResult, live: Tensor) -> CycleResult:
        """This outcome, continued by a later cycle for the live rows."""
        later = later._replace(
            steps=self.steps + later.steps,
            curvature=self.curvature.minimum(later.curvature),
            size=self.size.maximum(later.size),
            tally=self.tally + later.tally,
        )
        return CycleResult(*(new.where(column(live, new), old) for new, old in zip(later, self, strict=True)))


class _Notes(NamedTuple):
    """The loop's record of each row of the state.

    ``pending`` is the row's tolerance while it is active, and infinite afterwards, so that ``norm > pending`` tests
    both at once. ``norm`` and ``steps`` are valid once the row has stopped.
    """

    tolerance: Tensor
    pending: Tensor
    norm: Tensor
    steps: Tensor
    broken: Tensor | None = None
    failed: Tensor | None = None


class Cycle:
    """A cycle in progress: which rows are still active, and what became of the others.

    Attributes:
        outcome: the outcome of all rows that the cycle began with, once it was written (:meth:`_flush`).
        rows: places of the state's rows among those; ``None`` while none have been dropped.
        current, alive: number of rows in the state, and number of those that are active.
        best: the smallest residual norms and their iterates; ``None`` for a monotone method.
        finished: whether every row has converged by its recurrence or gone non-finite, so that no row is undecided.
        smooth: whether all rows have been active in every check so far; then one predicate is read instead of counts.
        wasted: row products spent on stopped rows since the last drop, see :meth:`_drop`.
        setup: row evaluations that restricting the operator costs per remaining row.
    """

    def __init__(
        self, method: Method, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor, tolerance: Tensor
    ) -> None:
        self.method, self.system = method, system
        self.state = self.previous = method.start(system, b, x, r, norm)
        self.best = None if method.monotone else (norm, x)
        count = torch.zeros_like(norm, dtype=torch.int64)
        self.notes = _Notes(tolerance, tolerance, norm, count)
        self.limit: Tensor | float = torch.inf
        if method.growth < torch.inf:
            self.limit = (method.growth * norm).where(norm > 0, torch.inf)
        self.current = self.alive = norm.shape[0]
        self.rows: Tensor | None = None
        self.outcome: CycleResult | None = None
        self.steps, self.wasted, self.setup = 0, 0, 1.0
        self.finished = True
        self.smooth = self.best is None and norm.shape[0] > 0

    def run(self, limit: int, check_every: int) -> CycleResult:
        """Take steps until every row has stopped, ``limit`` at most, and check the rows every ``check_every`` steps."""
        while True:
            slow = self._check(self.steps == limit)
            if not self.alive or self.steps == limit:
                self.finished &= not self.alive
                return self._flush()
            self.previous = self.state
            for ahead in reversed(range(min(check_every, limit - self.steps))):
                self.state = self.method.step(self.system, self.state, slow)
                self.steps, slow = self.steps + 1, None
                if self.best is not None and ahead:  # the check after the last of these steps does it for that one
                    self._keep_best(*self.best)

    def _check(self, last: bool) -> int | None:
        """Stop the rows that are done; returns the number of slow ones. The only read from the device in a step."""
        broken, slow_rows = getattr(self.state, "broken", None), getattr(self.state, "slow", None)
        above = self.state.norm > self.notes.pending
        # each read waits for the device, so all counts are read in one stack
        if self.smooth:
            # a single predicate while all rows go on and none is slow (an infinite or NaN residual would be)
            self.smooth = slow_rows is not None and broken is None and not last
            if self.smooth and bool((above > slow_rows).all()):
                return 0
            self.smooth = False
        finite = self.state.norm < self.limit
        active = above if broken is None else above > broken
        masks = [active, finite] if slow_rows is None else [active, finite, slow_rows]
        if self.best is not None:
            masks.append(self.state.norm < self.best[0])
        going, sound, *slow = torch.stack(masks).sum(1).tolist()
        if self.best is not None and slow.pop() == self.current:
            self.best = (self.state.norm, self.state.x)
        elif self.best is not None and self.steps:
            self._keep_best(*self.best)
        failed = None
        if sound < self.current:
            failed, active = ~finite & (self.notes.pending < torch.inf), active & finite
            going = int(active.sum())
        if last or going < self.alive:
            stopped = self.notes.pending < torch.inf
            if not last:
                stopped = stopped > active
            self._stop(stopped, above, failed, last or not going)
            self.alive = going
        if going and not last:
            self._drop(active)
        return slow[0] if slow else None

    def _stop(self, stopped: Tensor, above: Tensor, failed: Tensor | None, last: bool) -> None:
        """Record the rows ``stopped`` and clear their state.

        Args:
            stopped: bool ``[rows]``.
            above: bool ``[rows]``, the rows above their tolerance.
            failed: bool ``[rows]``, the rows that are no longer finite; ``None`` for none.
            last: whether the cycle ends here, so that nothing needs to be cleared.
        """
        norm, notes = self.state.norm, self.notes
        if failed is not None:
            self._restore(failed)
            norm = norm.where(~failed, self.previous.norm)
            notes = notes._replace(failed=_either(notes.failed, failed))
        if (broken := getattr(self.state, "broken", None)) is not None:
            notes = notes._replace(broken=_either(notes.broken, broken & above & stopped))
            self.finished = False
        if self.best is not None:
            norm, x = self.best
            self.best = (norm.masked_fill(stopped, 0.0), x)
        self.notes = notes._replace(
            pending=notes.pending.masked_fill(stopped, torch.inf),
            norm=norm.where(stopped, notes.norm),
            steps=notes.steps.masked_fill(stopped, self.steps),
        )
        if not last:
            self.state = clear(self.state, stopped, keep=self.method.kept)

    def _restore(self, failed: Tensor) -> None:
        """Put rows that are no longer finite back to the iterate of the last check."""
        x, *_ = self.method.iterate(self.previous)
        self.system = self.system.without(failed)
        state = clear(self.state, failed)
        self.state = state._replace(x=x.where(failed[:, None], state.x), norm=self.state.norm)

    def _drop(self, active: Tensor) -> None:
        """Drop the rows that have stopped, where that is possible and pays.

        Making the restricted operator may cost a product of each row that stays, and how many steps these still need is
        unknown. As in the ski-rental problem, the price is paid once as much has been wasted on stopped rows: the total
        is at most twice that of the best decision.
        """
        idle = self.current - self.alive
        self.wasted += idle
        if not idle or self.alive > CROWD * self.current or self.wasted + idle < self.setup * self.alive:
            return
        if (self.system.root or self.system).operator.restrict is None:
            return
        self._flush()
        rows = active.nonzero().squeeze(1)
        self.system = self.system.restrict(rows)
        self.setup = self.system.operator.setup_rows / self.alive
        self.state = self.method.select(self.state, rows)
        self.best, self.notes = select((self.best, self.notes), rows)
        self.rows = rows if self.rows is None else self.rows[rows]
        self.limit = self.limit[rows] if isinstance(self.limit, Tensor) else self.limit
        self.current, self.wasted = self.alive, 0

    def _flush(self) -> CycleResult:
        """Write the rows of the state to the outcome, and return it."""
        x, gap, size = self.method.iterate(self.state)
        if self.best is not None:
            x = self.best[1]
        tolerance, _, norm, steps, broken, failed = self.notes
        status = (norm > tolerance).to(steps.dtype)
        if broken is not None:
            status = status.masked_fill_(broken, Status.BREAKDOWN)
        if failed is not None:
            status = status.masked_fill_(failed, Status.NONFINITE)
        if not isinstance(gap, Tensor):
            gap = torch.full_like(norm, gap).masked_fill_(steps == 0, 0.0)
        nothing = torch.zeros_like(norm)
        curvature, tally = getattr(self.state, "curvature", None), getattr(self.state, "tally", None)
        curvature = nothing if curvature is None else curvature.squeeze(1)
        tally = nothing if tally is None else tally.squeeze(1)
        part = CycleResult(x, norm, gap, steps, status, curvature, nothing if size is None else size, tally)
        self.outcome = part if self.outcome is None else self.outcome.updated(part, self.rows)
        return self.outcome

    def _keep_best(self, norm: Tensor, x: Tensor) -> None:
        better = self.state.norm < norm
        self.best = (self.state.norm.where(better, norm), self.state.x.where(better[:, None], x))


def _either(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask | other
