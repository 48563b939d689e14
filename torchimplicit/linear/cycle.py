"""One cycle of the loop: steps of a method until every row has stopped, or the method's memory is full."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.linear.rowwise import clear, select
from torchimplicit.linear.system import System
from torchimplicit.solution import Status

CROWD = 0.75
"""The part of the rows that may still be at work when the others are dropped."""


class Method(ABC):
    """What one solver does within the loop.

    A state is a ``NamedTuple`` whose tensors (also those in tuples) have the rows as dimension 0. It has at least the
    field ``norm`` (``[rows]``), the norm of the residual after the step. Optional fields, bool ``[rows]``: ``broken``
    says where the method cannot go on; ``slow`` is counted at each check, and the count handed to the next step.
    Steps must keep a row that is zero in all tensors at zero: that is how rows which have stopped are laid to rest.

    Attributes:
        monotone: whether ``norm`` never grows, so that the last iterate is the best one.
        definite: whether the preconditioner has to be symmetric positive definite.
        cycle: steps after which the method has to start again from its iterate; ``None`` for no such limit.
    """

    monotone: bool = True
    definite: bool = False
    cycle: int | None = None

    @abstractmethod
    def start(self, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> Any:
        """The state at ``x`` (``[rows, dim]``) of residual ``r``; it may keep ``x``, ``r``, ``norm``, not ``b``."""

    @abstractmethod
    def step(self, system: System, state: Any, slow: int | None) -> Any:
        """The next state. ``slow`` is the number of slow rows in ``state``, ``None`` where it was not read."""

    @abstractmethod
    def iterate(self, state: Any, rows: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """The iterates of some rows (``None``: all), and how far their residuals may be from ``norm``."""


class Outcome(NamedTuple):
    """What is known of each row after a cycle; ``gap`` bounds how far its residual may be from ``norm``."""

    x: Tensor
    norm: Tensor
    gap: Tensor
    steps: Tensor
    status: Tensor

    def updated(self, part: Outcome, rows: Tensor) -> Outcome:
        """This, with ``part`` in the given rows."""
        return Outcome(*(old.index_copy(0, rows, new) for old, new in zip(self, part, strict=True)))

    def followed_by(self, later: Outcome, live: Tensor) -> Outcome:
        """This, with what a later cycle made of the live rows."""
        later = later._replace(steps=self.steps + later.steps)
        masks = (live[:, None], live, live, live, live)
        return Outcome(*(new.where(mask, old) for mask, new, old in zip(masks, later, self, strict=True)))


class Cycle:
    """The state of a cycle: which rows are still at work, and what became of the others.

    ``pending`` is the tolerance of the rows at work and infinite for the rest. ``rows`` says where the rows of the
    state stand in the outcome: ``None`` for all of them, in order.
    """

    def __init__(
        self, method: Method, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor, tolerance: Tensor
    ) -> None:
        self.method, self.system = method, system
        self.state = self.previous = method.start(system, b, x.clone(), r.clone(), norm.clone())
        self.best = None if method.monotone else (norm, x)
        self.pending, self.rows = tolerance.clone(), None
        self.infinity = torch.full((), torch.inf, dtype=norm.dtype, device=norm.device)
        self.current = self.alive = len(norm)
        self.wasted, self.setup = 0, 1.0
        self.steps = 0
        zeros = torch.zeros(len(norm), dtype=torch.int64, device=norm.device)
        self.outcome = Outcome(x, norm, torch.zeros_like(norm), zeros, zeros)

    def run(self, limit: int, check_every: int) -> Outcome:
        """Steps until every row has stopped, ``limit`` at most, looking at the residuals every so many."""
        while True:
            slow = self._check(self.steps == limit)
            if not self.alive or self.steps == limit:
                return self.outcome
            self.previous = self.state
            for _ in range(min(check_every, limit - self.steps)):
                self.state = self.method.step(self.system, self.state, slow)
                self.steps, slow = self.steps + 1, None
                if self.best is not None:
                    self._keep_best(*self.best)

    def _check(self, last: bool) -> int | None:
        """The one look at the device. Deals with the rows that have stopped; returns the count of the slow ones."""
        state = self.state
        broken, slow_rows = getattr(state, "broken", None), getattr(state, "slow", None)
        active = state.norm > self.pending
        if broken is not None:
            active = active > broken
        masks = (active, state.norm < self.infinity)
        masks = masks if slow_rows is None else (*masks, slow_rows)
        going, finite, *slow = torch.stack(masks).sum(1).tolist()
        if finite < self.current:
            active = active & masks[1]
            going = int(active.sum())
        stopped = None
        if last or going < self.alive:
            stopped = self.pending < self.infinity
            stopped = (stopped if last else stopped > active).nonzero().squeeze(1)
            self._record(stopped, finite < self.current)
            self.alive = going
        if going and not last and not self._drop(active) and stopped is not None:
            self.pending.index_fill_(0, stopped, torch.inf)
            clear(state, stopped)
        return slow[0] if slow else None

    def _record(self, stopped: Tensor, failed: bool) -> None:
        """Copy out the rows that have stopped; ``failed``: some of them are no longer finite."""
        every = len(stopped) == self.current
        norm = self.state.norm[stopped]
        finite = norm < self.infinity
        status = torch.full_like(stopped, Status.MAX_STEPS)
        if (broken := getattr(self.state, "broken", None)) is not None:
            status.masked_fill_(broken[stopped], Status.BREAKDOWN)
        status.masked_fill_(norm <= self.pending[stopped], Status.CONVERGED).masked_fill_(~finite, Status.NONFINITE)
        x, gap = self.method.iterate(self.state, None if every else stopped)
        if self.best is not None:
            norm, x = (t[stopped] for t in self.best)
        elif failed:
            old, _ = self.method.iterate(self.previous, None if every else stopped)
            x, norm = x.where(finite[:, None], old), norm.where(finite, self.previous.norm[stopped])
        gap = torch.zeros_like(norm) + (gap if self.steps else 0.0)
        part = Outcome(x, norm, gap, torch.full_like(stopped, self.steps), status)
        rows = stopped if self.rows is None else self.rows[stopped]
        self.outcome = part if len(rows) == len(self.outcome.norm) else self.outcome.updated(part, rows)

    def _drop(self, active: Tensor) -> bool:
        """Leave the rows that have stopped behind, where that is possible and seems to pay.

        Making the restricted operator may cost a product of each row that stays. How long these rows will take is not
        known, so they are made to pay once as much has been wasted on the others: at most twice the best cost.
        """
        idle = self.current - self.alive
        self.wasted += idle
        if self.alive > CROWD * self.current or self.wasted + idle < self.setup * self.alive:
            return False
        if (self.system.root or self.system).operator.restrict is None:
            return False
        rows = active.nonzero().squeeze(1)
        self.system = self.system.restrict(rows)
        self.setup = self.system.operator.setup_rows / self.alive
        self.state, self.pending = select(self.state, rows), self.pending[rows]
        self.best = self.best and select(self.best, rows)
        self.rows = rows if self.rows is None else self.rows[rows]
        self.current, self.wasted = self.alive, 0
        return True

    def _keep_best(self, norm: Tensor, x: Tensor) -> None:
        better = self.state.norm < norm
        new, _ = self.method.iterate(self.state, None)
        self.best = (self.state.norm.where(better, norm), new.where(better[:, None], x))
