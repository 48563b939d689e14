"""The solvers' steps as functions of tensors alone: nothing in them depends on the number of the step but tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.rings import Rings, write, written
from torchimplicit.precision import widened
from torchimplicit.problems import Point
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.solvers.anderson import spread
from torchimplicit.solvers.broyden import unit_of
from torchimplicit.state import row_norm


class Place(NamedTuple):
    """Where the samples are, ``[batch, dim]``: the state, and what the plain step from it leads to."""

    z: Tensor
    image: Tensor

    @property
    def residual(self) -> Tensor:
        return self.image - self.z

    def ahead(self, damping: float) -> Tensor:
        """A damped plain step."""
        return self.image if damping == 1.0 else torch.add(self.z, self.residual, alpha=damping)

    def where(self, mask: Tensor, other: Place) -> Place:
        """This one where ``mask`` (bool ``[batch]``) holds."""
        column = mask[:, None]
        return Place(torch.where(column, self.z, other.z), torch.where(column, self.image, other.image))


class Spot(NamedTuple):
    """Likewise, of problems that tell the residual itself, in which a difference of states would drown."""

    z: Tensor
    residual: Tensor

    def ahead(self, damping: float) -> Tensor:
        """A damped plain step."""
        return torch.add(self.z, self.residual, alpha=damping)

    def where(self, mask: Tensor, other: Spot) -> Spot:
        """This one where ``mask`` (bool ``[batch]``) holds."""
        column = mask[:, None]
        return Spot(torch.where(column, self.z, other.z), torch.where(column, self.residual, other.residual))


def place_of(point: Point) -> Any:
    """Where a point is."""
    return Spot(point.z, point.residual) if point.image is None else Place(point.z, point.image)


def _in_unit(place: Any, gamma: Any) -> Any:
    """With the residual in the state's unit."""
    if not isinstance(gamma, Tensor):
        return place
    return Spot(place.z, (gamma * place.residual).to(place.z.dtype))


class Stage(NamedTuple):
    """How steps are taken for a while.

    Attributes:
        step: how.
        upto: a number of steps; ``None`` for any.
        behind: ``(size, scale, taken) -> bool [batch]``, which samples are so far behind that all had better go over to
            the next stage.
    """

    step: Stepping
    upto: int | None = None
    behind: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


class Stepping(ABC):
    """What is common to all steps."""

    def stages(self) -> tuple[Stage, ...]:
        """The step as it is taken at first, and later."""
        return (Stage(self),)

    def rings(self, point: Point) -> Rings:
        """The long memories, empty."""
        return ()

    @abstractmethod
    def start(self, point: Point) -> Any:
        """The state at the first point: a pytree of tensors."""


class Step(Stepping):
    """A step in two parts, around the evaluation that lies between them."""

    @abstractmethod
    def propose(self, place: Any, state: Any, rings: Rings, taken: Tensor) -> tuple[Tensor, Any]:
        """Where to go next, and the state for :meth:`learn`. ``taken``: int64, the steps so far."""

    def learn(self, before: Any, point: Point, state: Any, rings: Rings, taken: Tensor) -> tuple[Any, Any]:
        """Where to go on from, ``point`` having been reached from ``before``; and the state."""
        return place_of(point), state


class Plain(Step):
    """Of :class:`~torchimplicit.solvers.FixedPointIteration`."""

    def __init__(self, damping: float):
        self.damping = damping

    def start(self, point: Point) -> Any:
        return ()

    def propose(self, place: Any, state: Any, rings: Rings, taken: Tensor) -> tuple[Tensor, Any]:
        return place.ahead(self.damping), state


class Heavy(Step):
    """Of :class:`~torchimplicit.solvers.GradientDescent`."""

    def __init__(self, step_size: float, momentum: float):
        self.step_size, self.momentum = step_size, momentum

    def start(self, point: Point) -> Any:
        return torch.zeros_like(point.z)

    def propose(self, place: Any, state: Tensor, rings: Rings, taken: Tensor) -> tuple[Tensor, Any]:
        velocity = torch.add(place.residual, state, alpha=self.momentum)
        return torch.add(place.z, velocity, alpha=self.step_size), velocity


class Past(NamedTuple):
    """As :class:`~torchimplicit.solvers.anderson.AndersonState` has them, ``kept`` and ``plain`` for all samples.
    ``right``, ``[batch, memory]``, are the products of the turns with the residual to come from; ``taken`` counts the
    steps that were remembered. ``weight``, ``[batch, leaves]``, is that of each leaf; ``gamma``, ``[batch, 1]``, gives
    residuals the state's unit; each is an empty tree for 1. ``merit``, ``[batch]``, is that of the place, where points
    have one."""

    gram: Tensor
    kept: Tensor
    plain: Tensor
    right: Tensor
    taken: Tensor
    weight: Any = ()
    merit: Any = ()
    gamma: Any = ()


class Accelerated(Step):
    """Of :class:`~torchimplicit.solvers.Anderson`: the same combination with the same safeguard. What has not been
    remembered yet is treated as what is forgotten. The rings are the moves and the turns. ``system``: of whose leaves
    the residuals are weighed, where it has several."""

    def __init__(
        self,
        memory: int,
        damping: float,
        regularization: float | None,
        growth: float,
        system: ImageSystem | None = None,
    ):
        self.memory, self.damping, self.regularization, self.growth = memory, damping, regularization, growth
        self.system = system
        self.sizes = () if system is None or system.separate is None else system.separate.sizes

    def rings(self, point: Point) -> Rings:
        like = widened(point.z)
        ring = like.new_empty(like.shape[0], self.memory, like.shape[1])
        return ring, torch.empty_like(ring)

    def start(self, point: Point) -> Past:
        like = widened(point.z)
        batch = like.shape[0]
        eye = torch.eye(self.memory, dtype=like.dtype, device=like.device).expand(batch, -1, -1).clone()
        flag = torch.zeros(batch, dtype=torch.bool, device=like.device)
        none = like.new_zeros(batch, self.memory)
        weight = like.new_ones(batch, len(self.sizes)) if self.sizes else ()
        count = torch.zeros((), dtype=torch.int64, device=like.device)
        merit = () if point.judgement is None else point.judgement.merit
        gamma = unit_of(point)
        return Past(eye, none, flag, none.clone(), count, weight, merit, () if gamma is None else gamma)

    def propose(self, place: Any, state: Past, rings: Rings, taken: Tensor) -> tuple[Tensor, Past]:
        place = _in_unit(place, state.gamma)
        weights = solved(state.gram, state.right, self._shift(state.gram))
        moves = written(rings[0], state.taken)
        correction = (weights[:, :, None] * moves).sum(dim=1)
        to = place.ahead(self.damping)
        return to - correction.to(to.dtype), state

    def learn(self, before: Any, point: Point, state: Past, rings: Rings, taken: Tensor) -> tuple[Any, Past]:
        reached, here = place_of(point), _in_unit(place_of(point), state.gamma)
        last_found, before = before, _in_unit(before, state.gamma)
        turn = widened(here.residual - before.residual)
        if self.damping == 1 and isinstance(here, Place):
            move = widened(here.image - before.image)
        else:
            move = torch.add(widened(here.z - before.z), turn, alpha=self.damping)
        weight = state.weight
        if self.system is not None and self.sizes:
            measured = self.system.weights(point, last_found.z, last_found.residual)
            weight = torch.where(state.taken == 0, measured, weight)
        turn = self._compared(turn, weight)
        length = torch.linalg.vector_norm(turn, dim=1, keepdim=True).clamp_min(torch.finfo(turn.dtype).tiny)
        turn, move = turn / length, move / length
        at = state.taken % self.memory
        write(rings[0], at, move)
        write(rings[1], at, turn)
        turns = written(rings[1], state.taken + 1)
        slot = torch.arange(self.memory, device=turn.device) == at
        now, last = (self._compared(place.residual, weight) for place in (here, before))
        merit = state.merit
        judged = point.judgement
        if judged is None:
            failed = row_norm(now) > self.growth * row_norm(last)
        else:
            rounding = 10 * torch.finfo(judged.merit.dtype).eps * merit.abs()
            failed = judged.merit - judged.merit_error > merit + rounding
        failed = failed & ~state.plain
        if judged is not None:
            merit = torch.where(failed, merit, judged.merit)
        kept = torch.where(slot[None, :], 1.0, state.kept).masked_fill(failed[:, None], 0.0)
        row = (turns * turn[:, None]).sum(dim=-1) * kept
        gram = torch.where(slot[None, :, None], row[:, None, :], state.gram)
        gram = torch.where(slot[None, None, :], row[:, :, None], gram)
        gram = torch.where(slot[None, :, None] & slot[None, None, :], 1.0 + self._shift(turn), gram)
        eye = torch.eye(self.memory, dtype=gram.dtype, device=gram.device)
        gram = torch.where(failed[:, None, None], eye, gram)
        place = before.where(failed, here)
        right = (turns * self._compared(widened(place.residual), weight)[:, None]).sum(dim=-1) * kept
        place = last_found.where(failed, reached)
        return place, Past(gram, kept, failed, right, state.taken + 1, weight, merit, state.gamma)

    def _compared(self, residual: Tensor, weight: Any) -> Tensor:
        return residual * spread(weight, self.sizes) if self.sizes else residual

    def _shift(self, like: Tensor) -> float:
        return 10 * torch.finfo(like.dtype).eps if self.regularization is None else self.regularization


class Hurried(Plain):
    """Of a linear system: the series, for as long as it would come to its end within ``HORIZON`` steps at the pace that
    it has."""

    HORIZON = 20

    def __init__(self, damping: float, rtol: float):
        super().__init__(damping)
        self.rtol = rtol

    def stages(self) -> tuple[Stage, ...]:
        """Until a sample is behind."""
        pace = math.log(max(self.rtol, 1e-15)) / self.HORIZON

        def behind(size: Tensor, scale: Tensor, taken: Tensor) -> Tensor:
            return size > scale * torch.exp(pace * (taken - 3).clamp_min(0))

        return (Stage(Plain(self.damping), None, behind),)


class Secants(Step):
    """Of :class:`~torchimplicit.solvers.Broyden`, by the steps alone.

    Full steps make the inverse a product of factors :math:`I+s_{j+1}s_j^T/s_j^Ts_j` (Kelley 1995, section 7.3). So
    :math:`Gr=\\gamma r+\\sum_j c_js_{j+1}`, where the :math:`c` are a triangular matrix times the :math:`s_i^T\\gamma
    r`: two passes over one ring. The rings are the steps, that matrix, and the steps' products with each other.
    """

    FIRST = 12
    """For so many steps at first, so many slots are looked at."""

    def __init__(self, memory: int, capacity: int | None = None):
        self.memory, self.capacity = memory, memory if capacity is None else capacity

    def stages(self) -> tuple[Stage, ...]:
        """By fewer slots while they are enough."""
        if self.memory <= self.FIRST:
            return (Stage(self),)
        return Stage(Secants(self.memory, self.FIRST), self.FIRST), Stage(self)

    def rings(self, point: Point) -> Rings:
        like, n = widened(point.z), self.memory
        square = like.new_empty(like.shape[0], n, n)
        return like.new_empty(like.shape[0], n, like.shape[1]), square, torch.empty_like(square)

    def start(self, point: Point) -> Tensor:
        gamma = unit_of(point)
        return torch.ones_like(widened(point.z)[:, :1]) if gamma is None else gamma

    def propose(self, place: Any, state: Tensor, rings: Rings, taken: Tensor) -> tuple[Tensor, Any]:
        n = self.capacity
        steps, factors, products = rings
        age = taken % (self.memory + 1)
        slots = torch.arange(n, device=taken.device)
        known, last = slots < age, slots == age - 1
        s = torch.where(known[:, None], steps[:, :n], 0)
        c = torch.where((slots[:, None] < age - 1) & (slots[None, :] <= slots[:, None]), factors[:, :n, :n], 0)
        k = torch.where(known[:, None] & known[None, :], products[:, :n, :n], 0)
        base = state * widened(place.residual)
        along = (s * base[:, None]).sum(dim=-1)
        parts = (c * along[:, None]).sum(dim=-1)
        weights = _padded(parts[:, : n - 1], 1, 0)  # the j-th is that of the next step
        g = base + (weights[:, :, None] * s).sum(dim=1)
        along = along + (k * weights[:, None]).sum(dim=-1)  # of g
        square = (k * (last[:, None] & last[None, :])).sum(dim=(1, 2))[:, None]
        rest = 1 - (along * last).sum(dim=-1, keepdim=True) / torch.where(square > 0, square, 1)
        safe = (rest.abs() > 1e-8) & (square > 0)
        factor = torch.where(safe, 1 / torch.where(safe, rest, 1), 1)
        move = g * factor
        # the factor that the last step makes, for the steps to come
        before = _padded((k * last[:, None]).sum(dim=1)[:, 1:], 0, 1)
        row = (last + (before[:, :, None] * c).sum(dim=1)) * torch.where(safe, 1 / torch.where(safe, square, 1), 0)
        slot = age % self.memory
        new = along * factor
        square_of_move = (move * move).sum(dim=-1, keepdim=True)
        new = torch.where(slots == slot, square_of_move, new)
        # what is written through a view would be copied as a whole
        row, new = (_padded(t, 0, self.memory - n) for t in (row, new))
        write(factors, (age - 1).clamp_min(0), row)
        write(products, slot, new)
        products.index_copy_(2, slot.reshape(1), new[:, :, None])
        write(steps, slot, move)
        return place.z + move.to(place.z.dtype), state


def _padded(t: Tensor, before: int, after: int) -> Tensor:
    """``[batch, n]`` with zeros before and after; ``torch.nn.functional.pad`` would ask for the batch's size."""
    return torch.cat((t.new_zeros(t.shape[0], before), t, t.new_zeros(t.shape[0], after)), dim=1)


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
