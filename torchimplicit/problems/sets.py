"""Constraint sets in flat coordinates, each with the projection onto it, differentiable to any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.constraints import (
    Box,
    L2Ball,
    LinearEqualities,
    LinearEquality,
    LinearInequalities,
    NonNegative,
    Projection,
    Proximal,
    Simplex,
    check_plane,
    clamped,
)
from torchimplicit.problems.interior_point import typical
from torchimplicit.problems.per_sample import bound, column, flat_matrix, flat_tree
from torchimplicit.problems.polyhedron import (
    Memory,
    active_rows,
    dependent,
    doubled,
    independent,
    minimized,
    onto,
    projector,
    unit_rows,
)
from torchimplicit.problems.unseen import unseen
from torchimplicit.state import Layout

Tensors = tuple[Tensor, ...]

BISECTIONS = 64
"""The most points that are tried to find where a path of projections leaves a ball."""


class FlatSet(ABC):
    """A set of flat states given by its projection, or a penalty given by its proximal operator.

    Attributes:
        tensors: the tensors that define it, which are among the parameters of the problem's system.
        proximal: whether it is a penalty.
    """

    tensors: Tensors
    proximal = False

    @property
    def lengths(self) -> tuple[bool, ...] | None:
        """For each tensor, whether it has the state's unit; ``None`` where that is not known."""
        return None

    @abstractmethod
    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        """The projection of ``z`` (``[rows, dim]``); ``step`` (``[rows, 1]``) is that of the proximal operator."""

    def penalty(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """The penalty that is added to the energies, ``[rows]``; zero for a set."""
        return z.new_zeros(len(z))

    def dependent(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """bool ``[rows]``: whether more constraints hold with equality at ``z`` than are linearly independent."""
        return torch.zeros(len(z), dtype=torch.bool, device=z.device)

    def check(self, z: Tensor) -> None:
        """Raise ``ValueError`` where the set is empty or ill-defined; ``z`` (``[rows, dim]``) is the solver's start."""


class LinearSet(FlatSet):
    """A set of linear equalities and inequalities, onto which the projection is piecewise affine."""

    @abstractmethod
    def along(self, z: Tensor, way: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of ``z``, and its derivative along ``way``."""


class InPieces(LinearSet):
    """A linear set whose projection is differentiated within a piece that is found on plain tensors."""

    @abstractmethod
    def piece(self, z: Tensor, *tensors: Tensor) -> Any:
        """The constraints that are active at the projection of ``z``; not differentiated."""

    @abstractmethod
    def onto(self, z: Tensor, piece: Any, *tensors: Tensor) -> Tensor:
        """The projection of ``z`` onto the states where these hold with equality: affine in ``z``, differentiable."""

    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        return self.onto(z, self._found(z, tensors), *tensors)

    def along(self, z: Tensor, way: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        piece = self._found(z, tensors)
        at = self.onto(z, piece, *tensors)
        return at, self.onto(z + way, piece, *tensors) - at

    def _found(self, z: Tensor, tensors: Tensors) -> Any:
        return self.piece(z.detach(), *(t.detach() for t in tensors))


@final
@dataclass(frozen=True)
class FlatBox(LinearSet):
    """A box; its tensors are ``low`` and ``high``, ``[rows or 1, dim]``."""

    tensors: Tensors
    lengths = (True, True)

    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        return clamped(z, *tensors)

    def along(self, z: Tensor, way: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        at = clamped(z, *tensors)
        held = (z - at).detach().sign_().abs_()  # one or zero: a boolean mask takes several times as long on a CPU
        return at, torch.addcmul(way, held, way, value=-1)

    def check(self, z: Tensor) -> None:
        if _plain(self.tensors) and bool((self.tensors[0] > self.tensors[1]).any()):
            raise ValueError("the constraint's set is empty: a lower bound exceeds an upper one")


@final
@dataclass(frozen=True)
class FlatSlice(InPieces):
    """The intersection of a box and a plane; its tensors are ``low``, ``high`` and the weight ``[rows or 1, dim]``, and
    the total ``[rows or 1, 1]``."""

    tensors: Tensors
    lengths = (True, True, False, True)

    def piece(self, z: Tensor, *tensors: Tensor) -> Any:
        return _slice_ends(z, *(t.expand(len(z), -1) for t in tensors))

    def onto(self, z: Tensor, piece: Any, *tensors: Tensor) -> Tensor:
        low, high, weight, total = (t.expand(len(z), -1) for t in tensors)
        at_low, at_high = piece
        free = ~(at_low | at_high)
        # the projection is clip(z - m w), with the multiplier m for which it has the total
        held = torch.where(at_low, low, torch.where(at_high, high, 0))
        loose = torch.where(free, weight, 0)
        excess = (loose * z + weight * held).sum(dim=1, keepdim=True) - total
        size = loose.square().sum(dim=1, keepdim=True)
        multiplier = excess / torch.where(size > 0, size, 1)
        return torch.where(free, z - multiplier * weight, held)

    def check(self, z: Tensor) -> None:
        low, high, weight, total = self.tensors
        if not _plain(self.tensors):
            return
        check_plane(weight, total)
        if bool((low > high).any()):
            raise ValueError("the constraint's set is empty: a lower bound exceeds an upper one")
        least, most = (
            torch.where(weight == 0, 0, weight * torch.where(weight > 0, a, b)).sum(dim=1, keepdim=True)
            for a, b in ((low, high), (high, low))
        )
        room = 16 * torch.finfo(total.dtype).eps * (total.abs() + torch.where(least.isfinite(), least.abs(), 0))
        bad = ((total < least - room) | (total > most + room))[:, 0]
        if bool(bad.any()):
            raise ValueError(
                f"the constraint's set is empty in {int(bad.sum())} of {len(bad)} samples: no state within the bounds "
                "has the total"
            )


def _slice_ends(z: Tensor, low: Tensor, high: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of the projection that lie at their lower and at their upper bounds, bool ``[rows, dim]`` each.

    The total of :math:`clip(z-mw)` decreases with m, linearly between the breakpoints at which an entry reaches a
    bound. Bisection over the sorted breakpoints finds the interval that holds the total.
    """

    def clipped(m: Tensor) -> Tensor:
        moved = z - m * weight
        return torch.where(moved < low, low, torch.where(moved > high, high, moved))

    def excess(m: Tensor) -> Tensor:
        return (weight * clipped(m)).sum(dim=1, keepdim=True) - total

    ends = torch.cat(((z - low) / weight, (z - high) / weight), dim=1)
    ends = torch.where(ends.isfinite(), ends, torch.inf).sort(dim=1).values
    count = ends.shape[1]
    below = torch.full_like(total, -1, dtype=torch.int64)
    above = torch.full_like(below, count)
    for _ in range(count.bit_length() + 1):
        middle = (below + above).div(2, rounding_mode="floor")
        m = ends.gather(1, middle.clamp(0, count - 1))
        positive = torch.where(m.isfinite(), excess(torch.where(m.isfinite(), m, 0)) > 0, False)
        inside = (middle > below) & (middle < above)
        below = torch.where(inside & positive, middle, below)
        above = torch.where(inside & ~positive, middle, above)
    left = ends.gather(1, below.clamp(0, count - 1))
    right = ends.gather(1, above.clamp(0, count - 1))
    right = torch.where((above < count) & right.isfinite(), right, torch.inf)
    left = torch.where(below >= 0, left, -torch.inf)
    middle = torch.where(left.isfinite() & right.isfinite(), 0.5 * (left + right), 0)
    one = 1 + torch.where(left.isfinite(), left, torch.where(right.isfinite(), right, 0)).abs()
    middle = torch.where(left.isfinite() & ~right.isfinite(), left + one, middle)
    middle = torch.where(~left.isfinite() & right.isfinite(), right - one, middle)
    moved = z - middle * weight
    return moved <= low, moved >= high


@final
@dataclass(frozen=True)
class FlatBall(FlatSet):
    """A ball; its tensors are the radius ``[rows or 1, 1]`` and the center ``[rows or 1, dim]``."""

    tensors: Tensors
    lengths = (True, True)

    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        radius, center = tensors
        away = z - center
        square = away.square().sum(dim=1, keepdim=True)
        outside = square > radius.square()
        # the inner where keeps the derivative of sqrt finite at the center
        length = torch.where(outside, square, 1).sqrt()
        return torch.where(outside, center + radius / length * away, z)


@final
@dataclass(frozen=True)
class FlatPolyhedron(InPieces):
    """A polyhedron of linear equalities and inequalities with unit rows.

    Attributes:
        tensors: the matrices ``[rows or 1, m * dim]`` and the right-hand sides ``[rows or 1, m]``.
        equalities: number of equalities, the first of the m rows.
        dim: size of the state.
        memory: memory of the last active set.
    """

    tensors: Tensors
    equalities: int
    dim: int
    memory: Memory = field(default_factory=Memory, compare=False)
    lengths = (False, True)

    def piece(self, z: Tensor, *tensors: Tensor) -> Any:
        matrix, right = self._expanded(len(z), tensors)
        return active_rows(z, matrix, right, self.equalities, self.memory)

    def onto(self, z: Tensor, piece: Any, *tensors: Tensor) -> Tensor:
        return onto(z, *self._expanded(len(z), tensors), piece)[0]

    def newton(
        self, z: Tensor, slope: Tensor, hessian: Tensor, size: Tensor, moved: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step from ``z`` to the minimum on the set of the energies' quadratic models, and where these are flat;
        see :func:`~torchimplicit.problems.polyhedron.minimized`."""
        # samples that were joined into one have a block-diagonal matrix of constraints
        rows, count = z.shape[1] // self.dim, self.equalities
        matrix, right = self._expanded(len(z) * rows, tensors)
        if rows > 1:
            apart = torch.eye(rows, dtype=z.dtype, device=z.device)[:, None, :, None]
            matrix, right = matrix.reshape(len(z), rows, -1, 1, self.dim) * apart, right.reshape(len(z), rows, -1)
            parts = [(matrix[:, :, part], right[:, :, part]) for part in (slice(count), slice(count, None))]
            matrix = torch.cat([m.reshape(len(z), -1, z.shape[1]) for m, _ in parts], dim=1)
            right = torch.cat([r.reshape(len(z), -1) for _, r in parts], dim=1)

        def solved(
            hessian: Tensor, slope: Tensor, size: Tensor, moved: Tensor, matrix: Tensor, right: Tensor, z: Tensor
        ) -> tuple[Tensor, Tensor]:
            room = right - (matrix @ z[:, :, None])[:, :, 0]
            return minimized(hessian, slope, size, moved, matrix, room, count * rows, self.memory)

        inputs = (hessian, slope, size, moved, matrix, right, z)
        step, flat = unseen(solved, len(z), *map(doubled, inputs))
        return step.to(z.dtype), flat

    def extent(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """The median distance of the faces that ``z`` is not at, ``[rows]``; NaN where there are none."""

        def median(z: Tensor, matrix: Tensor, right: Tensor) -> tuple[Tensor]:
            return (typical(right - (matrix @ z[:, :, None])[:, :, 0]),)

        return unseen(median, len(z), z, *self._expanded(len(z), tensors))[0]

    def projector(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """The derivative of the projection at ``z``, ``[rows, dim, dim]``."""

        def derivative(z: Tensor, matrix: Tensor, right: Tensor) -> tuple[Tensor]:
            return (projector(matrix, active_rows(z, matrix, right, self.equalities, self.memory)),)

        return unseen(derivative, len(z), z, *self._expanded(len(z), tensors))[0]

    def dependent(self, z: Tensor, *tensors: Tensor) -> Tensor:
        return dependent(z, *self._expanded(len(z), tensors))

    def _expanded(self, rows: int, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        matrix, right = tensors
        return matrix.reshape(len(matrix), -1, self.dim).expand(rows, -1, -1), right.expand(rows, -1)

    def check(self, z: Tensor) -> None:
        if not _plain(self.tensors):
            return
        with torch.no_grad():
            rows = max(len(z), *map(len, self.tensors))
            matrix, right = self._expanded(rows, self.tensors)
            if not all(bool(t.isfinite().all()) for t in self.tensors):
                raise ValueError("the constraint's matrix or right-hand side holds NaN or infinity")
            count = self.equalities
            equations = self.tensors[0].reshape(len(self.tensors[0]), -1, self.dim)[:, :count]
            if count > self.dim or (count and not independent(equations)):
                raise ValueError(
                    "the constraint's equalities are linearly dependent (the rank of their matrix is less than the "
                    "number of its rows), so they are contradictory or redundant: leave some out"
                )
            start = z.detach() if _plain((z,)) and len(z) == rows else matrix.new_zeros(rows, self.dim)
            near = start.nan_to_num(0.0, 0.0, 0.0)
            for _ in range(2):  # from far away a small gap is lost in rounding: project once more from nearby
                near = self.project(near, near[:, :1], *self.tensors)
            gap = (matrix @ near[:, :, None])[:, :, 0] - right
            gap = torch.cat((gap[:, :count].abs(), gap[:, count:].clamp_min(0)), dim=1)
            size = right.abs() + torch.linalg.vector_norm(near, dim=1, keepdim=True)
            bad = ~(gap <= torch.finfo(gap.dtype).eps ** 0.6 * size).all(dim=1)
            if bool(bad.any()):
                raise ValueError(
                    f"the constraint's set is empty in {int(bad.sum())} of {rows} samples, as far as an interior-point "
                    "method can tell: no state satisfies all the equalities and inequalities"
                )


@final
@dataclass(frozen=True)
class FlatCut(FlatSet):
    """The intersection of a linear set and a ball; its tensors are those of the set, then the radius ``[rows or 1, 1]``
    and the center ``[rows or 1, dim]``.

    The projection of y is :math:`\\Pi(c+t(y-c))`, with the projection :math:`\\Pi` onto the linear set and the largest
    :math:`t\\le1` for which it lies in the ball. Within a piece that is :math:`c+a+tb` with orthogonal a and b, so that
    the square of its distance from c, which increases with t, is linear in :math:`t^2`.
    """

    linear: LinearSet
    tensors: Tensors

    @property
    def lengths(self) -> tuple[bool, ...]:
        assert self.linear.lengths is not None
        return *self.linear.lengths, True, True

    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        (square,) = unseen(self._square_share, len(z), z, *tensors)
        share = square.sqrt()
        at, way, room, size = self._at(share, z - tensors[-1], *tensors)
        # the t of the piece, which has derivatives; a point inside of the ball stays
        moves = (square < 1) & (size > 0)
        square = square + room / torch.where(moves, size, 1)
        positive = square > 0
        crossed = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
        return at + torch.where(moves, crossed - share, 0) * way

    def _at(self, share: Tensor, away: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The projection for a given t, its derivative b, how much the square of its distance is below :math:`r^2`, and
        :math:`\\lVert b\\rVert^2`: ``[rows, dim]`` the first two, ``[rows, 1]`` the others."""
        *tensors_of_set, radius, center = tensors
        at, way = self.linear.along(torch.addcmul(center, share, away), away, *tensors_of_set)
        return at, way, radius.square() - _square(at - center), _square(way)

    def _square_share(self, z: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        """The :math:`t^2` of the projection, ``[rows, 1]``; one where the ball is not active.

        By Newton's method from below. In a box around the center the square of the distance is concave in :math:`t^2`,
        so that the iterates increase, and end after finitely many; elsewhere a bracket guards them.
        """
        radius, center = tensors[-2:]
        away = z - center
        rounding = 8 * torch.finfo(z.dtype).eps * radius * (radius + center.abs().amax(dim=1, keepdim=True))
        square = (radius.square() / _square(away)).nan_to_num(1.0).clamp(max=1)
        low, high = torch.zeros_like(square), torch.ones_like(square)
        for step in range(1, BISECTIONS):
            _, _, room, size = self._at(square.sqrt(), away, *tensors)
            if not bool(((room < -rounding) | ((room > rounding) & (square < 1))).any()):
                break
            far = room < 0
            low, high = torch.where(far, low, square), torch.where(far, square, high)
            crossed = torch.addcdiv(square, room, size).clamp(max=1)
            newton = (crossed >= low) & (crossed <= high)
            middle = torch.lerp(low, high, 0.5)
            square = torch.where(newton, crossed, middle) if step % 8 else middle
        return (square,)

    def check(self, z: Tensor) -> None:
        self.linear.check(z)
        *tensors_of_set, radius, center = self.tensors
        if not _plain(self.tensors):
            return
        with torch.no_grad():
            center = center.expand(max(map(len, self.tensors)), -1)
            gap = torch.linalg.vector_norm(self.linear.project(center, center[:, :1], *tensors_of_set) - center, dim=1)
            bad = gap > radius[:, 0] + torch.finfo(gap.dtype).eps ** 0.6 * (
                gap + torch.linalg.vector_norm(center, dim=1)
            )
        if bool(bad.any()):
            raise ValueError(
                f"the constraint's set is empty in {int(bad.sum())} of {len(bad)} samples: the other constraints leave "
                "no state in the ball"
            )


def _square(v: Tensor) -> Tensor:
    """The squared norm of each row, ``[rows, 1]``."""
    return torch.linalg.vecdot(v, v)[:, None]


@final
@dataclass(frozen=True)
class Foreign(FlatSet):
    """A set or penalty that is given by the user's own projection or proximal operator.

    Attributes:
        given: the user's set or penalty.
        layout: layout of the state.
        tensors: the tensors among its arguments.
        spec, leaves: the structure of the arguments, and all of their leaves.
    """

    given: Projection | Proximal
    layout: Layout
    tensors: Tensors
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @property
    def proximal(self) -> bool:  # type: ignore[override]
        return isinstance(self.given, Proximal)

    def project(self, z: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        state, args = self.layout.unflatten(z), self._args(tensors)
        if isinstance(self.given, Projection):
            return self.layout.flatten(self.given.function(state, *args), "the result of the projection")
        size = step.reshape(-1) if self.layout.batched else step.reshape(())
        if self.layout.batched and self.layout.spec.is_leaf():
            size = size.reshape(-1, *(1,) * len(self.layout.shapes[0]))
        return self.layout.flatten(self.given.prox(state, size, *args), "the result of prox")

    def penalty(self, z: Tensor, *tensors: Tensor) -> Tensor:
        if isinstance(self.given, Projection):
            return super().penalty(z)
        value = self.given.penalty(self.layout.unflatten(z), *self._args(tensors))
        if not isinstance(value, Tensor) or value.numel() != len(z):
            raise ValueError("Proximal.penalty must return one number per sample, [batch]; a scalar if not batched")
        return value.reshape(len(z))

    def _args(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(a, Tensor) else a for a in self.leaves], self.spec)

    def check(self, z: Tensor) -> None:
        """Raise where the user's function captures a tensor that requires grad, which would silently get none."""
        probe = torch.zeros(1, self.layout.dim, dtype=self.layout.dtype, device=self.layout.device)
        if not _plain(self.tensors) or any(t.ndim and len(t) > 1 for t in self.tensors):
            return
        with torch.enable_grad():
            out = self.project(probe, torch.ones_like(probe[:, :1]), *(t.detach() for t in self.tensors))
        if out.requires_grad:
            raise ValueError(
                f"{type(self.given).__name__}'s function captures a tensor that requires grad, which would get no "
                "derivative: give it in args, as Projection(function, args=(tensor,))"
            )


def flat_set(layout: Layout, constraint: Any, rows: int) -> FlatSet:
    """The set of a :class:`Minimum`'s constraint, in flat coordinates.

    Args:
        layout: layout of the state.
        constraint: one constraint, or a tuple of several that hold together.
        rows: the batch size.

    Raises:
        ValueError, TypeError: constraints that cannot be combined, or do not fit the state.
    """
    parts = constraint if isinstance(constraint, tuple) else (constraint,)
    if len(parts) > 1 and any(isinstance(part, (Projection, Proximal)) for part in parts):
        raise ValueError(
            "a Projection or a Proximal cannot be combined with other constraints: give one Projection onto the "
            "intersection"
        )
    balls = [part for part in parts if isinstance(part, L2Ball)]
    if len(balls) > 1:
        raise ValueError("there is more than one L2Ball: give one Projection onto their intersection")
    if balls:
        radius = column(layout, balls[0].radius, rows, "the constraint's radius")
        ball = (radius, bound(layout, balls[0].center, rows, "the constraint's center"))
        others = [part for part in parts if not isinstance(part, L2Ball)]
        if not others:
            return FlatBall(ball)
        linear = _of_linear(layout, others, rows)
        return FlatCut(linear, (*linear.tensors, *ball))
    (first, *_) = parts
    if isinstance(first, (Projection, Proximal)):
        leaves, spec = pytree.tree_flatten(first.args)
        return Foreign(first, layout, tuple(t for t in leaves if isinstance(t, Tensor)), spec, tuple(leaves))
    return _of_linear(layout, parts, rows)


def _of_linear(layout: Layout, parts: Sequence[Any], rows: int) -> LinearSet:
    """The intersection of linear constraints as the simplest set that holds it: a box, a box with a plane, or a
    polyhedron."""
    like = {"dtype": layout.dtype, "device": layout.device}
    low = torch.full((1, layout.dim), -torch.inf, **like)  # type: ignore[call-overload]
    high = -low
    planes: list[tuple[Tensor, Tensor]] = []
    matrices: list[tuple[Tensor, Tensor, bool]] = []
    for part in parts:
        if isinstance(part, (Box, NonNegative, Simplex)):
            box = part if isinstance(part, Box) else Box(0.0, torch.inf)
            one, other = (bound(layout, t, rows, "the constraint's bounds") for t in (box.low, box.high))
            low, high = torch.where(one > low, one, low), torch.where(other < high, other, high)
        if isinstance(part, Simplex):
            planes.append((torch.ones_like(low), column(layout, part.total, rows, "the constraint's total")))
        elif isinstance(part, LinearEquality):
            weight = flat_tree(layout, part.weight, rows, "the constraint's weight")
            planes.append((weight, column(layout, part.total, rows, "the constraint's total")))
        elif isinstance(part, (LinearEqualities, LinearInequalities)):
            right = part.total if isinstance(part, LinearEqualities) else part.bound
            flat = flat_matrix(layout, part.matrix, right, rows, type(part).__name__)
            matrices.append((*flat, isinstance(part, LinearEqualities)))
    if not matrices and len(planes) <= 1:
        return FlatSlice((low, high, *planes[0])) if planes else FlatBox((low, high))
    eye = torch.eye(layout.dim, **like)[None]  # type: ignore[call-overload]
    equal = [(weight[:, None, :], total) for weight, total in planes] + [(m, r) for m, r, e in matrices if e]
    less = [_without_unbounded(m, r) for m, r, e in matrices if not e]
    for sign, side in ((1.0, high), (-1.0, low)):
        bounded = side.isfinite()
        if is_transformed(side) or bool(bounded.any()):
            less.append((torch.where(bounded[:, :, None], sign * eye, 0), torch.where(bounded, sign * side, 1)))
    every = [unit_rows(matrix, right) for matrix, right in (*equal, *less)]
    matrix, right = _stacked([m.flatten(1) for m, _ in every]), _stacked([r for _, r in every])
    return FlatPolyhedron((matrix, right), sum(m.shape[1] for m, _ in equal), layout.dim)


def _without_unbounded(matrix: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Replace inequalities with infinite bounds by ``0 <= 1``, which always holds."""
    none = bound == torch.inf
    if not is_transformed(bound) and not bool(none.any()):
        return matrix, bound
    return torch.where(none[:, :, None], 0, matrix), torch.where(none, 1, bound)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate ``[rows or 1, k]`` along dimension 1."""
    rows = max(map(len, parts))
    return torch.cat([part.expand(rows, -1) for part in parts], dim=1)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether the numbers can be read: no tensor is under a transform or on the meta device."""
    return not any(is_transformed(t) or t.device.type == "meta" for t in tensors)
