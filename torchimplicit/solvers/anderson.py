"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.basis import less
from torchimplicit.precision import widened
from torchimplicit.problems import Judgement, Point
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.broyden import unit_of
from torchimplicit.solvers.history import History
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_fraction, check_nonnegative


class AndersonState(NamedTuple):
    """The last point, and differences between past points.

    Attributes:
        z, residual, image: state, residual and image of the point before this one.
        moves: for each past step, the difference of the damped images, :math:`\\Delta z + \\beta\\Delta r`.
        turns: for each past step, the difference of the residuals, :math:`\\Delta r`, at unit length.
        gram: inner products of ``turns``, ``[batch, memory, memory]``.
        kept: 0 or 1, ``[batch, memory]``, which of the past differences each sample still remembers; ``None``: all.
        merit: ``[batch]``, of the point before this one, where the problem has one.
        plain: bool ``[batch]``, the samples whose coming step is a plain one; ``None`` for none.
        taken: the number of steps so far.
        weight: ``[batch, dim]``, the factors on residuals where they are compared; ``None`` for 1.
        gamma: ``[batch, 1]``, the factor that gives a residual the state's unit; ``None`` for 1.
    """

    z: Tensor
    residual: Tensor
    image: Tensor | None
    moves: History
    turns: History
    gram: Tensor
    kept: Tensor | None
    merit: Tensor | None
    plain: Tensor | None
    taken: int
    weight: Tensor | None = None
    gamma: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II; Walker and Ni 2011), safeguarded.

    The next state combines the last ``memory`` images such that the same combination of their residuals has the
    smallest norm. The differences are scaled to unit length before the small system is solved, so the regularization
    is relative and does not slow the end of a solve. The residual of each leaf of the state is weighted by the inverse
    size of the leaf, that of each part of a joint state by how strongly it acts on the others, so that units do not
    matter.

    The safeguard: where an accelerated step leaves the residual larger than ``growth`` times what it was, the sample
    goes back, forgets its history, and takes a plain step; on contractions the method is then no slower than plain
    iteration. For a problem with a merit (:class:`JointInference`: its cost) a step that raises the merit is taken back
    instead, since the smallest residual may belong to another stationary point. The plain step of a root or a minimum
    is :math:`\\gamma r` in the problem's own units, as in :class:`~torchimplicit.Broyden`.

    Args:
        memory: number of past differences that are combined.
        damping: :math:`\\beta` in (0, 1], the share of the residual that is added to the combination.
        regularization: added to the unit diagonal of the scaled Gram matrix; ``None``: 10 times the ``eps`` of the
            dtype in which the small system is solved (float32 for half precision).
        growth: the safeguard's factor, at least 1.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
    """

    memory: int = 6
    damping: float = 1.0
    regularization: float | None = None
    growth: float = 2.0
    remembers: ClassVar[bool] = True

    def check(self) -> None:
        check_count(self, "memory")
        check_fraction(self, "damping")
        check_nonnegative(self, "regularization", optional=True)
        check_nonnegative(self, "growth")
        if self.growth < 1:
            raise ValueError(f"Anderson.growth is {self.growth}, and must be at least 1")

    def start(self, point: Point) -> Any:
        return None

    def wants_product(self) -> bool:
        return True

    def step(self, evaluate: Evaluator, point: Point, state: AndersonState | None, progress: Progress) -> Move:
        residual = point.residual
        gamma = unit_of(point) if state is None else state.gamma
        if gamma is not None:
            gamma = gamma.reshape(-1, 1)
            residual = (gamma * residual).to(residual.dtype)
        if state is None:
            to = self._plain(point.z, residual, point.image)
            moves, turns = History.empty(residual, self.memory), History.empty(residual, self.memory)
            gram = turns.ring.new_zeros(residual.shape[0], self.memory, self.memory)
            first = AndersonState(point.z, residual, point.image, moves, turns, gram, None, _merit(point), None, 0)
            return Move(to, first._replace(gamma=gamma))

        weight = state.weight
        # The weights stay those of the first images: a Gram matrix of differently weighted rows would mean nothing.
        system = evaluate.system
        if state.taken == 0 and system.separate is not None and isinstance(system, ImageSystem):
            weight = spread(system.weights(point, state.z, state.residual), system.separate.sizes)
        slot = state.taken % self.memory
        # at unit length, so that the Gram matrix has a unit diagonal and the regularization is relative to it
        turns, length = state.turns.put_unit(slot, residual, state.residual, weight)
        if self.damping == 1 and point.image is not None and state.image is not None:
            # dz + dr is the difference of the images: no sum of two differences, no third vector
            moves = state.moves.put_difference(slot, point.image, state.image, length)
        else:
            turn = widened(residual - state.residual)
            moves = state.moves.put(slot, torch.add(widened(point.z - state.z), turn, alpha=self.damping), length)
        compared, number = widened(residual), torch.finfo(length.dtype)
        if weight is not None:
            compared = compared * weight
        size = turns.filled
        # one pass over the history gives both the new row of the Gram matrix and the right-hand side
        both = torch.stack((turns.ring[:, slot], compared)).transpose(0, 1)
        products = torch.bmm(both, turns.vectors.mT)
        kept = state.kept
        if kept is not None:
            # a forgotten difference gets a zero row and a unit diagonal, and so the coefficient zero
            kept = kept.clone()
            kept[:, slot] = 1
            products = products * kept[:, None, :size]
        gram = state.gram.clone() if torch.is_grad_enabled() else state.gram  # autograd may have seen the old one
        gram[:, slot, :size] = gram[:, :size, slot] = products[:, 0]
        gram[:, slot, slot].add_(10 * number.eps if self.regularization is None else self.regularization)
        # The normal equations of min ||r - sum_i g_i dr_i||: with unit columns and a ring of six they are accurate
        # enough, and need no pass over the history. ``solve_ex`` does not wait for the device to report an error.
        weights, _ = torch.linalg.solve_ex(gram[:, :size, :size], products[:, 1])
        to = self._plain(point.z, residual, point.image)
        to = less(widened(to), weights, moves.vectors).to(to.dtype)
        after = AndersonState(
            point.z,
            residual,
            point.image,
            moves,
            turns,
            gram,
            kept,
            _merit(point),
            None,
            state.taken + 1,
            weight,
            gamma,
        )
        if progress.improving:
            return Move(to, after)
        return self._safeguard(to, state, after, point.judgement)

    def _safeguard(self, to: Tensor, before: AndersonState, after: AndersonState, judgement: Judgement | None) -> Move:
        """Send the samples whose accelerated step failed back, to take a plain step with their history forgotten."""
        merit = after.merit
        if judgement is None or merit is None or before.merit is None:
            here, there = after.residual, before.residual
            if after.weight is not None:
                here, there = here * after.weight, there * after.weight
            failed = row_norm(here) > self.growth * row_norm(there)
        else:
            rounding = 10 * torch.finfo(merit.dtype).eps * before.merit.abs()
            failed = merit - judgement.merit_error > before.merit + rounding
        if before.plain is not None:  # a plain step is accepted as it is, or a sample would go back for ever
            failed = failed & ~before.plain
        # With a merit ``improving`` seldom holds, so this shortcut is asked for here. Not on a GPU, where the question
        # takes longer than the selects that it saves.
        if merit is not None and failed.device.type == "cpu" and not failed.any():
            return Move(to, after._replace(merit=merit))
        if merit is not None and before.merit is not None:
            merit = torch.where(failed, before.merit, merit)
        column = failed[:, None]
        to = torch.where(column, self._plain(before.z, before.residual, before.image), to)
        forget = failed[:, None, None]
        # forgotten by mask and by a Gram matrix of the identity: the long vectors need not be touched
        kept = after.gram.new_ones(after.gram.shape[:2]) if after.kept is None else after.kept
        image = None
        if after.image is not None and before.image is not None:
            image = torch.where(column, before.image, after.image)
        return Move(
            to,
            AndersonState(
                torch.where(column, before.z, after.z),
                torch.where(column, before.residual, after.residual),
                image,
                after.moves,
                after.turns,
                torch.where(forget, torch.eye(self.memory, out=after.gram.new_empty(0)), after.gram),
                kept.masked_fill(column, 0),
                merit,
                failed,
                after.taken,
                after.weight,
                after.gamma,
            ),
        )

    def _plain(self, z: Tensor, residual: Tensor, image: Tensor | None) -> Tensor:
        if self.damping == 1.0 and image is not None:
            return image
        return torch.add(z, residual, alpha=self.damping)


def spread(leaves: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Repeat each leaf's number (``[batch, leaves]``) for every entry of the leaf, ``[batch, dim]``."""
    return torch.cat([leaf[:, None].expand(-1, n) for leaf, n in zip(leaves.unbind(dim=1), sizes, strict=True)], dim=1)


def _merit(point: Point) -> Tensor | None:
    return None if point.judgement is None else point.judgement.merit
