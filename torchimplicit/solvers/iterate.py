"""The loop that every solver runs in.

It owns the residual, the tolerance test, the masks, the best iterate, the trajectory, and which samples still take
part; a solver owns only its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchimplicit.coupling import broken_promise
from torchimplicit.linear import PreparedPreconditioner
from torchimplicit.problems import Point, System
from torchimplicit.solution import Report, Status
from torchimplicit.solvers.base import Evaluator, Progress, Solver
from torchimplicit.state import row_norm

GROWTH_LIMIT = 1e6
"""A residual this many times the first one (plus its scale) counts as growing without bound."""

SHRINK_AT = 0.75
"""Finished samples leave the batch once at most this share of it is still active."""

_RUNNING = -1


@dataclass(frozen=True)
class Outcome:
    """What the loop found: states ``[batch, dim]`` and the figures.

    Attributes:
        z: the solutions; the best iterate where a sample did not converge.
        report: per sample.
        trajectory: the iterates, if they were to be kept.
        state: the solver's last state (for all samples, unless some left the batch: then ``None``).
    """

    z: Tensor
    report: Report
    trajectory: tuple[Tensor, ...] = ()
    state: Any = None


def iterate(
    solver: Solver, system: System, z0: Tensor, params: Sequence[Tensor], first: Point | None = None
) -> Outcome:
    """Solve ``system`` from ``z0`` (``[batch, dim]``). Differentiable by autograd where grad mode is on.

    Args:
        first: the evaluation at ``z0``, where it has been made already.
    """
    evaluate = Evaluator(system, params, rows_evaluated=0 if first is None else z0.shape[0])
    return _Loop(solver, evaluate, evaluate(evaluate.place(z0)) if first is None else first).run()


class _Loop:
    """The loop's variables, for the samples that the current batch holds.

    Attributes:
        point: where the samples are. One that is done stays at its best iterate.
        best: the iterate of least residual (or merit, where the point has one), which is ``best_rank``. It *is*
            ``point`` while all that are active improve; then it is a point at rest, whose residual is not kept.
        active: how many samples were active when the host last asked.
        certain: whether ``active`` is the count of this very moment.
        running: bool ``[batch]``, the active samples; ``None`` for all.
        improving: whether every active sample is known to have improved with the last step.
        rows: the current batch's places in the first batch; ``None`` while all samples are in it.
        full: the results of the first batch, once samples have left it.
    """

    def __init__(self, solver: Solver, evaluate: Evaluator, point: Point):
        self.solver = solver
        self.evaluate = evaluate
        self.point = self.best = point
        self.batch = self.active = point.z.shape[0]
        self.certain = self.improving = True
        self.may_shrink = (
            evaluate.system.row_params is not None and not solver.keep_trajectory and not torch.is_grad_enabled()
        )
        dtype = point.z.dtype
        self.rtol = solver.relative_tolerance(dtype)
        norm = point.size()
        self.first_scale = norm if point.scale is None else point.scale
        first = norm + self.first_scale
        reach = first if point.error is None else point.reach() + row_norm(point.z)
        # where the first evaluation is not finite there is no limit to stay within: such a sample stops at once
        self.limit = GROWTH_LIMIT * reach.nan_to_num(nan=-1.0, posinf=-1.0)
        eps = torch.finfo(dtype).eps
        if solver.atol is not None:
            self.floor = torch.full_like(norm, solver.atol)
        elif point.scale is not None:
            self.floor = 0.01 * eps * first
        else:
            # relative to the first residual alone, which a warm start makes as small as rounding
            self.floor = eps * (1 + first)
        self.best_rank = torch.full_like(norm, torch.inf)
        self.status = torch.full((self.batch,), _RUNNING, dtype=torch.int64, device=norm.device)
        self.steps = torch.zeros_like(self.status)
        self.running: Tensor | None = None
        self.rows: Tensor | None = None
        self.full: dict[str, Tensor] = {}

    def run(self) -> Outcome:
        solver = self.solver
        trajectory = [self.point.z]
        state = solver.start(self.point)
        self._judge(0, None, ask=True)
        for step in range(1, solver.max_steps + 1):
            if self.active == 0:
                break
            if self.may_shrink and self.certain and self.active <= SHRINK_AT * self.point.z.shape[0]:
                state = self._shrink(state)
            self.evaluate.begin(step)
            move = solver.step(self.evaluate, self.point, state, Progress(self.running, self.improving))
            state = move.state
            self._advance(move.to)
            if solver.keep_trajectory:
                trajectory.append(self.point.z)
            self._judge(step, move.breakdown, ask=step % solver.check_every == 0)
        return self._finish(tuple(trajectory) if solver.keep_trajectory else (), state)

    def _advance(self, to: Tensor | Point) -> None:
        """Take the step; samples that are done stay where they are."""
        if isinstance(to, Point):
            self.point = to if self.running is None else to.select(self.running, self.point)
        else:
            z = to if self.running is None else torch.where(self.running[:, None], to, self.point.z)
            before, point = self.point, self.evaluate(self.evaluate.place(z))
            self.point = self.evaluate.system.compared(point, before)

    def _judge(self, step: int, breakdown: Tensor | None, ask: bool) -> None:
        """Test every active sample, and note those that stop here. Reads from the device once, if ``ask``."""
        norm = self.point.size()
        scale = self.first_scale if self.point.scale is None else self.point.scale
        tolerance = torch.add(self.floor, scale, alpha=self.rtol)
        good = (norm if self.point.error is None else self.point.reach()) <= self.limit
        going = (norm > tolerance) & good
        rank = norm if self.point.merit is None else self.point.merit
        improved = rank < self.best_rank
        if breakdown is not None:
            going = going & ~breakdown
        before, was_running, was_certain = self.active, self.running, self.certain
        if was_running is not None:
            going, improved = going & was_running, improved & was_running
        self.certain = ask
        if ask:
            self.active, improving = torch.stack((going, improved)).sum(dim=1).tolist()
            self.improving = was_certain and improving == before
        else:
            self.improving = False
        self.running = None if ask and self.active == norm.shape[0] else going
        if self.improving:
            # whoever stops here stops at its best iterate, and whoever stopped before has not moved
            self.best, self.best_rank = self.point, rank
            if self.active == before:
                return
        if step and ask and was_certain and self.active == before:  # nobody stopped
            if improving:
                self.best = self.point.resting(improved, self.best)
                self.best_rank = torch.where(improved, rank, self.best_rank)
            return
        stopped = ~going if was_running is None else was_running & ~going
        self.steps = self.steps.masked_fill(stopped, step)
        self.status = self.status.masked_fill(stopped, int(Status.CONVERGED))
        if self.improving and breakdown is None:
            return
        done = norm <= tolerance
        self.status = self.status.masked_fill(stopped & ~done, int(Status.BREAKDOWN))
        self.status = self.status.masked_fill(stopped & ~good, int(Status.NONFINITE))
        if step == 0:
            self.best_rank = rank
        if self.improving or step == 0:
            return
        better = improved | (stopped & done)
        self.best = self.point.resting(better, self.best)
        self.best_rank = torch.where(better, rank, self.best_rank)
        # a sample that stops for good goes to its best iterate: the map never sees a bad state again
        self.point = self.best.select(stopped, self.point)

    def _shrink(self, state: Any) -> Any:
        """Let the finished samples leave the batch."""
        self._store()
        assert self.running is not None
        keep = self.running.nonzero().squeeze(1)
        if self.rows is None:
            self._check_promise(keep[:1])
        self.rows = keep if self.rows is None else self.rows[keep]
        self.evaluate = self.evaluate.take(keep)
        self.point, self.best = self.point.take(keep), self.best.take(keep)
        for name in ("first_scale", "floor", "limit", "best_rank", "status", "steps"):
            setattr(self, name, getattr(self, name)[keep])
        self.running = None
        return take_rows(state, keep)

    def _check_promise(self, row: Tensor) -> None:
        """Evaluate one sample alone, once a solve: it must give what it gave in the whole batch."""
        alone = self.evaluate.take(row)
        known, found = self.point.take(row), alone(self.point.z[row])
        self.evaluate.rows_evaluated = alone.rows_evaluated
        size = row_norm(known.residual) + (known.z.new_zeros(1) if known.scale is None else known.scale)
        gap = row_norm(found.residual - known.residual)
        if bool(gap > torch.finfo(known.z.dtype).eps ** 0.4 * size):
            broken_promise(f"a sample's residual changed by {float(gap / size):.1g} (relative) when it was alone")

    def _results(self) -> dict[str, Tensor]:
        scale = self.first_scale if self.best.scale is None else self.best.scale
        size = self.best_rank if self.best.merit is None else self.best.size()
        relative = size / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return {"z": self.best.z, "residual": relative, "status": self.status, "steps": self.steps}

    def _store(self) -> None:
        """Write the current batch's results to their places in the first batch."""
        for name, value in self._results().items():
            if self.rows is None:
                self.full[name] = value.clone()
            else:
                self.full[name].index_copy_(0, self.rows, value)

    def _finish(self, trajectory: tuple[Tensor, ...], state: Any) -> Outcome:
        if self.active or not self.certain:
            running = self.status == _RUNNING
            self.status = torch.where(running, int(Status.MAX_STEPS), self.status)
            self.steps = torch.where(running, self.solver.max_steps, self.steps)
        if self.rows is None:
            found = self._results()
        else:
            self._store()
            found, state = self.full, None
        evaluations = self.evaluate.rows_evaluated / max(self.batch, 1)
        return Outcome(
            found["z"], Report(found["status"], found["steps"], found["residual"], evaluations), trajectory, state
        )


def take_rows(state: Any, rows: Tensor) -> Any:
    """A solver's state (a ``NamedTuple`` of tensors, numbers, preconditioners and such tuples) for the samples
    ``rows``."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, PreparedPreconditioner):
        return state.restrict(rows)
    if isinstance(state, tuple):
        parts = [take_rows(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
