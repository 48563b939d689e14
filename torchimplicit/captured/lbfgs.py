"""The step of L-BFGS as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.rings import Rings, write, written
from torchimplicit.captured.search import Fields, Ground, Moved, Searching, fields, search
from torchimplicit.precision import widened
from torchimplicit.problems import Point
from torchimplicit.solvers.lbfgs import PATIENCE, first_length
from torchimplicit.state import row_norm


class Remembered(NamedTuple):
    """As :class:`~torchimplicit.solvers.lbfgs.LBFGSState` has them; ``kept`` bool ``[batch, memory]``, the slots that
    hold something. ``sy`` and ``yy``, ``[batch, memory, memory]``, are the products of steps and gradient changes;
    ``s_along`` and ``y_along``, ``[batch, memory]``, theirs with the residual. ``length``, ``[batch, dim or 1]``, are
    the units of the leaves; ones where there is a single leaf."""

    kept: Tensor
    sy: Tensor
    yy: Tensor
    s_along: Tensor
    y_along: Tensor
    gamma: Tensor
    lowest: Tensor
    least: Tensor
    idle: Tensor
    seen: Tensor
    length: Tensor


class _Tried(NamedTuple):
    """Of :meth:`QuasiNewton._search`: ``searching`` are the samples that have found nothing yet, ``stuck`` those that
    the model has led nowhere."""

    attempt: Tensor
    direction: Tensor
    searching: Tensor
    stuck: Tensor
    reached: Fields
    last: Fields
    trials: Tensor
    spent: Tensor


class QuasiNewton(Searching):
    """Of :class:`~torchimplicit.solvers.LBFGS`, by two triangular systems in the place of its two loops.

    With R the products :math:`s_i^Ty_j` of a step with changes that are not older, and D its diagonal, the inverse
    Hessian is (Byrd, Nocedal and Schnabel 1994, theorem 2.2)

    .. math:: Hr=\\gamma r+S^Tw-\\gamma Y^Ta,\\quad Ra=Sr,\\quad R^Tw=Da-\\gamma Y(r-Y^Ta),

    so that a step passes twice over the memories, which are the rings, S and Y.
    """

    def __init__(self, memory: int, trials: int, lengths: Callable[[Point], Tensor] | None):
        self.memory, self.trials, self.lengths = memory, trials, lengths

    def rings(self, point: Point) -> Rings:
        like = widened(point.z)
        ring = like.new_empty(like.shape[0], self.memory, like.shape[1])
        return ring, torch.empty_like(ring)

    def start(self, point: Point) -> Remembered:
        like, n = widened(point.z), self.memory
        norm = row_norm(point.residual)
        gamma = first_length(point, norm).to(like.dtype)[:, None]
        length = torch.ones_like(gamma)
        if self.lengths is not None:
            gamma, length = length, self.lengths(point)
            norm = row_norm(length * widened(point.residual))
        none, square = like.new_zeros(like.shape[0], n), like.new_zeros(like.shape[0], n, n)
        assert point.energy is not None
        return Remembered(
            kept=torch.zeros_like(none, dtype=torch.bool),
            sy=square,
            yy=square.clone(),
            s_along=none,
            y_along=none.clone(),
            gamma=gamma,
            lowest=point.energy,
            least=norm,
            idle=torch.zeros_like(norm, dtype=torch.int64),
            seen=torch.zeros((), dtype=torch.int64, device=like.device),
            length=length,
        )

    def move(self, ground: Ground, at: Point, state: Remembered, rings: Rings) -> Moved:
        searched = self._search(ground, at, self._direction(at.residual, state, rings), state.gamma * state.length**2)
        reached, last, lost = Point(**searched.reached), Point(**searched.last), searched.searching
        state = state._replace(kept=state.kept & ~searched.stuck[:, None])
        # a sample that met nothing but NaN and infinity is shown them, so that it counts as non-finite
        to = last.select(lost & ~torch.isfinite(row_norm(last.residual)), reached)
        state = self._remember(state, at, reached, searched.trials, rings)
        return Moved(to, state, lost | (state.idle >= PATIENCE), searched.spent)

    def _search(self, ground: Ground, at: Point, direction: Tensor, gamma: Tensor) -> _Tried:
        """Search along ``direction``; samples that find nothing there search along the gradient, since the model of the
        Hessian may be at fault. A loop, so that the search is compiled once."""
        count = torch.zeros((), dtype=torch.int64, device=at.z.device)
        none, trials = torch.zeros_like(ground.running), torch.zeros_like(ground.running, dtype=torch.int64)
        here = fields(at)
        now = _Tried(count, direction, ground.running, none, here, here, trials, count)

        def body(now: _Tried, outer: Any, rings: Any) -> _Tried:
            constants, residual, gamma = outer
            along = ground._replace(constants=constants)
            searched = search(along, Point(**now.reached), now.direction, now.searching, self.trials)
            return _Tried(
                now.attempt + 1,
                (gamma * widened(residual)).to(residual.dtype),
                searched.failed,
                now.stuck | searched.failed,
                fields(searched.point),
                fields(searched.last),
                now.trials + searched.trials,
                now.spent + searched.spent,
            )

        def on(now: _Tried) -> Tensor:
            return (now.attempt < 2) & (now.searching.sum() > 0)

        return while_loop(on, body, now, (ground.constants, at.residual, gamma))

    def _order(self, seen: Tensor) -> Tensor:
        """The slots from the newest to the oldest, int64 ``[memory]``; a permutation that is its own inverse."""
        return (seen - 1 - torch.arange(self.memory, device=seen.device)) % self.memory

    def _direction(self, residual: Tensor, state: Remembered, rings: Rings) -> Tensor:
        order = self._order(state.seen)

        def ordered(t: Tensor) -> Tensor:
            for dim in range(1, t.ndim):
                t = t.index_select(dim, order)
            return t

        kept, sy, yy, s_along, y_along = (ordered(t) for t in state[:5])
        eye = torch.eye(self.memory, dtype=sy.dtype, device=sy.device)
        lower = torch.where((kept[:, :, None] & kept[:, None, :]).tril(), sy, eye)
        diagonal = torch.where(kept, lower.diagonal(dim1=1, dim2=2), 0)
        right = torch.where(kept, s_along, 0)
        a = substituted(lower, right, range(self.memory))
        rest = y_along - (yy * a[:, None, :]).sum(dim=2)
        right = torch.where(kept, diagonal * a - state.gamma * rest, 0)
        w = substituted(lower.mT, right, range(self.memory - 1, -1, -1))
        s, y = (written(ring, state.seen) for ring in rings)
        back = (w.index_select(1, order)[:, :, None] * s).sum(dim=1)
        forth = (a.index_select(1, order)[:, :, None] * y).sum(dim=1)
        return (state.length * (state.gamma * (state.length * widened(residual) - forth) + back)).to(residual.dtype)

    def _remember(self, state: Remembered, before: Point, after: Point, trials: Tensor, rings: Rings) -> Remembered:
        slot = state.seen % self.memory
        r = state.length * widened(after.residual)
        s = widened(after.z - before.z) / state.length
        y = state.length * widened(before.residual - after.residual)
        sy, yy, ss = torch.stack((s * y, y * y, s * s)).sum(dim=2)
        # a pair without positive curvature would spoil the model: keep it out
        kept = sy > 1e-10 * yy.sqrt() * ss.sqrt()
        kept = kept & torch.isfinite(sy + yy)
        gamma = torch.where(kept, sy / torch.where(kept, yy, 1), state.gamma[:, 0])[:, None]
        clean = kept[:, None]
        s, y = torch.where(clean, s, 0), torch.where(clean, y, 0)
        write(rings[0], slot, s)
        write(rings[1], slot, y)
        steps, turns = (written(ring, state.seen + 1) for ring in rings)
        s_y, y_y, s_along, y_along = ((ring * v[:, None]).sum(dim=2) for v in (y, r) for ring in (steps, turns))
        at = torch.arange(self.memory, device=slot.device) == slot
        column, row = at[None, None, :], at[None, :, None]
        of_y = torch.where(row, y_y[:, None, :], torch.where(column, y_y[:, :, None], state.yy))
        assert after.energy is not None
        norm = row_norm(r)
        rounding = 4 * torch.finfo(norm.dtype).eps * state.lowest.abs()
        fell = (after.energy < state.lowest - rounding) | (norm < 0.9 * state.least)
        return Remembered(
            kept=torch.where(at[None, :], clean, state.kept),
            sy=torch.where(column, s_y[:, :, None], state.sy),
            yy=of_y,
            s_along=s_along,
            y_along=y_along,
            gamma=gamma,
            lowest=torch.minimum(after.energy, state.lowest),
            least=torch.minimum(norm, state.least),
            idle=torch.where(fell, 0, state.idle + trials),
            seen=state.seen + 1,
            length=state.length,
        )


def substituted(matrix: Tensor, right: Tensor, order: range) -> Tensor:
    """The solution of triangular systems ``[batch, n, n]`` for ``[batch, n]``, unknown by unknown in ``order``; written
    out, which compiles to one pass over the batch."""
    by_slot: dict[int, Tensor] = {}
    for i in order:
        value = right[:, i]
        for j, x in by_slot.items():
            value = value - matrix[:, i, j] * x
        by_slot[i] = value / matrix[:, i, i]
    return torch.stack([by_slot[i] for i in range(len(order))], dim=1)
