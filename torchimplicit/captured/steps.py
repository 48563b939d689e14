"""The solvers' steps as functions of tensors alone: nothing in them depends on the number of the step but tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.precision import widened
from torchimplicit.problems import Point
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver
from torchimplicit.state import row_norm


class Place(NamedTuple):
    """Where the samples are, ``[batch, dim]``: the state, and what the plain step from it leads to."""

    z: Tensor
    image: Tensor

    @property
    def residual(self) -> Tensor:
        return self.image - self.z

    @staticmethod
    def of(point: Point) -> Place:
        return Place(point.z, point.z + point.residual if point.image is None else point.image)

    def where(self, mask: Tensor, other: Place) -> Place:
        """This one where ``mask`` (bool ``[batch]``) holds."""
        column = mask[:, None]
        return Place(torch.where(column, self.z, other.z), torch.where(column, self.image, other.image))


class Step(ABC):
    """A step in two parts, around the evaluation that lies between them."""

    @abstractmethod
    def start(self, point: Point) -> Any:
        """The state at the first point: a pytree of tensors."""

    @abstractmethod
    def propose(self, place: Place, state: Any, taken: Tensor) -> tuple[Tensor, Any]:
        """Where to go next, and the state for :meth:`learn`. ``taken``: int64, the steps so far."""

    @abstractmethod
    def learn(self, before: Place, point: Point, state: Any, taken: Tensor) -> tuple[Place, Any]:
        """Where to go on from, ``point`` having been reached from ``before``; and the state."""


class Plain(Step):
    """Of :class:`~torchimplicit.solvers.FixedPointIteration`."""

    def __init__(self, damping: float):
        self.damping = damping

    def start(self, point: Point) -> Any:
        return ()

    def propose(self, place: Place, state: Any, taken: Tensor) -> tuple[Tensor, Any]:
        return _damped(place, self.damping), state

    def learn(self, before: Place, point: Point, state: Any, taken: Tensor) -> tuple[Place, Any]:
        return Place.of(point), state


class Past(NamedTuple):
    """As :class:`~torchimplicit.solvers.anderson.AndersonState` has them, ``kept`` and ``plain`` for all samples; the
    rings ``[batch, memory, dim]`` are full of what gets no weight where ``kept`` is zero. ``right``,
    ``[batch, memory]``, are the products of the turns with the residual to come from."""

    moves: Tensor
    turns: Tensor
    gram: Tensor
    kept: Tensor
    plain: Tensor
    right: Tensor


class Accelerated(Step):
    """Of :class:`~torchimplicit.solvers.Anderson`: the same combination with the same safeguard. What has not been
    remembered yet is treated as what is forgotten."""

    def __init__(self, memory: int, damping: float, regularization: float | None, growth: float):
        self.memory, self.damping, self.regularization, self.growth = memory, damping, regularization, growth

    def start(self, point: Point) -> Past:
        like = widened(point.z)
        batch, dim = like.shape
        ring = like.new_zeros(batch, self.memory, dim)
        eye = torch.eye(self.memory, dtype=like.dtype, device=like.device).expand(batch, -1, -1).clone()
        flag = torch.zeros(batch, dtype=torch.bool, device=like.device)
        none = like.new_zeros(batch, self.memory)
        return Past(ring, ring.clone(), eye, none, flag, none.clone())

    def propose(self, place: Place, state: Past, taken: Tensor) -> tuple[Tensor, Past]:
        weights = solved(state.gram, state.right, self._shift(state.gram))
        correction = (weights[:, :, None] * state.moves).sum(dim=1)
        to = _damped(place, self.damping)
        return to - correction.to(to.dtype), state

    def learn(self, before: Place, point: Point, state: Past, taken: Tensor) -> tuple[Place, Past]:
        here = Place.of(point)
        turn = widened(here.residual - before.residual)
        if self.damping == 1:
            move = widened(here.image - before.image)
        else:
            move = torch.add(widened(here.z - before.z), turn, alpha=self.damping)
        length = torch.linalg.vector_norm(turn, dim=1, keepdim=True).clamp_min(torch.finfo(turn.dtype).tiny)
        turn, move = turn / length, move / length
        slot = torch.arange(self.memory, device=turn.device) == taken % self.memory
        turns = torch.where(slot[None, :, None], turn[:, None], state.turns)
        moves = torch.where(slot[None, :, None], move[:, None], state.moves)
        failed = (row_norm(here.residual) > self.growth * row_norm(before.residual)) & ~state.plain
        kept = torch.where(slot[None, :], 1.0, state.kept).masked_fill(failed[:, None], 0.0)
        row = (turns * turn[:, None]).sum(dim=-1) * kept
        gram = torch.where(slot[None, :, None], row[:, None, :], state.gram)
        gram = torch.where(slot[None, None, :], row[:, :, None], gram)
        gram = torch.where(slot[None, :, None] & slot[None, None, :], 1.0 + self._shift(turn), gram)
        eye = torch.eye(self.memory, dtype=gram.dtype, device=gram.device)
        gram = torch.where(failed[:, None, None], eye, gram)
        place = before.where(failed, here)
        right = (turns * widened(place.residual)[:, None]).sum(dim=-1) * kept
        return place, Past(moves, turns, gram, kept, failed, right)

    def _shift(self, like: Tensor) -> float:
        return 10 * torch.finfo(like.dtype).eps if self.regularization is None else self.regularization


def solved(matrix: Tensor, right: Tensor, least: float) -> Tensor:
    """The solution of symmetric positive definite systems ``[batch, n, n]`` for ``[batch, n]``, by Cholesky's
    factorization written out, which compiles to one pass over the batch; ``least``: what no pivot is less than."""
    n = matrix.shape[1]
    lower: list[list[Tensor]] = []
    pivots: list[Tensor] = []
    y: list[Tensor] = []
    for i in range(n):
        row: list[Tensor] = []
        for j in range(i + 1):
            entry = matrix[:, i, j]
            for k in range(j):
                entry = entry - row[k] * lower[j][k] * pivots[k] if j < i else entry - row[k] * row[k] * pivots[k]
            row.append(entry / pivots[j] if j < i else entry.clamp_min(least))
        pivots.append(row.pop())
        lower.append(row)
        value = right[:, i]
        for k in range(i):
            value = value - row[k] * y[k]
        y.append(value)
    x: list[Tensor] = [y[i] / pivots[i] for i in range(n)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            x[i] = x[i] - lower[k][i] * x[k]
    return torch.stack(x, dim=1)


def step_of(solver: Solver) -> Step | None:
    """The captured step of ``solver``; ``None`` where it has none."""
    if isinstance(solver, FixedPointIteration):
        return Plain(solver.damping)
    if isinstance(solver, Anderson):
        return Accelerated(solver.memory, solver.damping, solver.regularization, solver.growth)
    return None


def _damped(place: Place, damping: float) -> Tensor:
    return place.image if damping == 1.0 else torch.add(place.z, place.residual, alpha=damping)
