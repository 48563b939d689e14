"""When a sample is solved: its residual is small against the terms that make it up.

One rule serves every problem, leaf by leaf of the state: ``‖r‖ <= atol + rtol * T``, where :math:`T` is the size of the
terms whose sum the residual is. It has no unit of its own, so that a problem stated in other units takes the same
steps.

A fixed point's terms are :math:`f(z)` and :math:`z`, and both are known. A root or a gradient hides its own: they are
what a change of the state by its own size would make of the residual, :math:`T = \\lVert A\\rVert\\lVert z\\rVert`, so
that the rule asks whether a relative change of the state by ``rtol`` would account for the residual (a backward error).
No evaluation is spent on it: :class:`Measure` reads it off the step that was taken last.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.linear import LinearOperator
from torchimplicit.precision import default_rtol
from torchimplicit.problems import Point, System
from torchimplicit.solvers.result import relative_to
from torchimplicit.state import leaves_of

ROUNDING = 16
"""How many roundings of its terms a residual may be made of."""

RUN_OFF = 1e6
"""How many times its first size a state may have and still be what its residual is measured by."""

COVERED = 100
"""By how much the scales of a residual's equations may differ unnoticed."""

DENSE = 64
"""Up to so many unknowns, the matrix is assembled where a sample must be looked at closely."""

Tolerance = float | Any
"""A number, or a pytree of numbers with the structure of the state."""


def check_tolerance(owner: object, name: str) -> None:
    """``owner.name`` must be ``None``, or a finite number of at least zero, or a pytree of those."""
    value = getattr(owner, name)
    if value is None:
        return
    where = f"{type(owner).__name__}.{name}"
    numbers = leaves_of(value)
    if not numbers:
        raise ValueError(f"{where} is {value!r}, and holds no number: give one, or one for each leaf of the state")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{where} must be a number, not {type(number).__name__} ({number!r}), or a pytree of numbers"
            )
        if not 0 <= number < float("inf"):
            raise ValueError(f"{where} is {value}, and must be a finite number of at least zero")


def by_leaf(value: Tolerance, system: System, like: Tensor, what: str) -> float | Tensor:
    """A tolerance as a number where it is one for all, or ``[leaves]``.

    Raises:
        ValueError: it is a tree that does not fit the state.
    """
    if isinstance(value, (int, float)):
        return float(value)
    numbers, spec = pytree.tree_flatten(value)
    leaves = system.leaves
    if leaves is None or leaves.spec is None:
        raise ValueError(
            f"{what} is a pytree, and this state is solved for in coordinates that mix its leaves (metric, eliminate): "
            "give a number"
        )
    if spec != leaves.spec:
        raise ValueError(
            f"{what} has the structure {spec}, and the state has {leaves.spec}: give a number for each leaf"
        )
    if len(numbers) == 1:
        return float(numbers[0])
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def least(value: Tolerance) -> float:
    """Of a tolerance, that of the leaf which is judged the most strictly."""
    return float(min(pytree.tree_leaves(value)))


class Measure:
    """The size of the terms of a residual that does not tell it, from the step taken last.

    A step by :math:`\\Delta z` changed the residual by :math:`\\Delta r`. Relative to its size, the state changed by
    :math:`\\delta=\\max_m\\lVert\\Delta z_m\\rVert/\\lVert z_m\\rVert`, the leaf that changed most; a change by its own
    size would have made :math:`\\lVert\\Delta r_l\\rVert/\\delta` of leaf l. That holds where the step was short,
    :math:`\\delta\\le\\sqrt{rtol}`: a long one tells nothing of where it has led, however small the residual is against
    the one that it came from, and such a sample goes on. (A Newton step that short leaves an error of ``rtol``:
    quadratic convergence is not held up.)

    The size of a leaf counts what it has been of late, so that a solution at zero can be found: never less than
    ``ROUNDING * eps / rtol`` of the largest, which is halved in every step, nor than ``eps`` of what it was at first.
    Nor does it count more than ``RUN_OFF`` times what it was at first, with the first step: relative to a state that
    has run off, every residual is small.

    Attributes:
        since: ``[batch]`` or ``[batch, leaves]``, what it was at first, here or where another solver began.
        first: likewise, the size of the first residual.
        local: bool ``[batch]`` or ``[batch, leaves]``: where what is known of the terms is known of the present point.
    """

    def __init__(self, system: System, point: Point, rtol: float | Tensor, since: Tensor | None = None):
        eps = torch.finfo(point.z.dtype).eps
        usual = default_rtol(point.z.dtype)
        self.system = system
        self.share: float | Tensor
        self.near: float | Tensor
        if isinstance(rtol, Tensor):
            rtol = torch.where(rtol > 0, rtol, usual)
            self.share, self.near = (ROUNDING * eps / rtol).clamp_max(0.1), rtol.sqrt()
        else:
            rtol = rtol or usual
            self.share, self.near = min(ROUNDING * eps / rtol, 0.1), rtol**0.5
        self.recent = system.norms(point.z)
        self.since = self.recent if since is None else torch.maximum(self.recent, since)
        self.first = torch.zeros_like(self.recent)
        self.least = self.since * (eps / self.share)
        self.most = torch.full_like(self.recent, torch.inf)
        self.begun = False
        self.refused: Tensor | None = None
        self.known: Tensor | None = None
        self.local = torch.zeros_like(self.recent, dtype=torch.bool)

    def start(self, point: Point) -> Point:
        """The first point, of whose terms nothing is known."""
        self.first = self.system.norms(point.residual)
        return point.changed(error=self.first, scale=torch.zeros_like(self.first))

    @torch.no_grad()
    def step(self, point: Point, before: Point) -> Point:
        """The point that a step from ``before`` has led to, with its terms."""
        z, r = point.z, point.residual
        size, moved, turned, norms = self.system.norms(torch.stack((z, z - before.z, r - before.residual, r)))
        if not self.begun:
            self.most, self.begun = RUN_OFF * (self.recent + moved), True
        size = torch.minimum(size, self.most)
        self.recent = torch.maximum(torch.maximum(size, self.least), 0.5 * self.recent)
        share = self._share(moved, size)
        stepped = share > 0
        near = share <= self.near
        if self.refused is not None:
            near, self.refused = near & ~(self.refused if near.ndim == 1 else self.refused[:, None]), None
        self.local = torch.where(stepped, near, self.local)
        still = before.scale if self.known is None else self.known
        assert still is not None
        self.known = None
        return point.changed(error=norms, scale=torch.where(stepped, turned / share, still))

    @torch.no_grad()
    def product(self, point: Point, image: Tensor) -> Point:
        """``point`` with the terms that the product of the Jacobian with its residual tells."""
        size, moved, turned = self.system.norms(torch.stack((point.z, point.residual, image)))
        share = self._share(moved, size)
        self.local = (share > 0) & (share < torch.inf) & (turned < torch.inf)
        return point.changed(scale=torch.where(self.local, turned / share, 0), product=image)

    def refuse(self, samples: Tensor) -> None:
        """Let the step to come tell nothing of the terms of ``samples`` (bool ``[batch]``): it is short because the
        method did not dare to take the whole of it."""
        self.refused = samples

    def short(self, point: Point, step: Tensor, rtol: float | Tensor) -> Tensor:
        """bool ``[batch]``: whether Newton's ``step`` from ``point`` is within ``rtol`` of the state, leaf by leaf. It
        is the same rule, with the Jacobian in the place of a difference."""
        size, moved = self.system.norms(torch.stack((point.z, step)))
        share = moved / (size + self.share * self.recent)
        short = moved <= rtol * (size + self.share * self.recent)
        if short.ndim == 2:
            short, share = short.all(dim=1), share.amax(dim=1, keepdim=True)
        norms = point.size()
        self.known = torch.where(share > 0, norms / share, norms)
        return short

    def _share(self, moved: Tensor, size: Tensor) -> Tensor:
        """How far the state moved, relative to its size: the leaf that moved furthest."""
        share = moved / (size + self.share * self.recent)
        return share if share.ndim == 1 else share.amax(dim=1, keepdim=True).expand_as(share)

    def take(self, rows: Tensor) -> Measure:
        """Of the samples ``rows`` alone."""
        part = copy(self)
        part.recent, part.least, part.local = self.recent[rows], self.least[rows], self.local[rows]
        part.most = self.most[rows]
        return part


class Judge:
    """The rule, for one solve.

    Attributes:
        measure: of the terms, where a point does not tell them; ``None`` where it does.
        strict: what the relative tolerance is multiplied by where the terms are measured.
        first: the size of the residual and its terms at the first point, where it tells them; zero where that is not
            finite.
        floor: what the residual may be, whatever its terms have become.
    """

    first: Tensor | None
    floor: Tensor | None

    def __init__(
        self,
        system: System,
        point: Point,
        rtol: Tolerance | None,
        atol: Tolerance | None,
        strict: float = 1.0,
        since: Tensor | None = None,
    ):
        like = point.z
        usual = default_rtol(like.dtype)
        self.eps = torch.finfo(like.dtype).eps
        self.rtol = usual if rtol is None else by_leaf(rtol, system, like, "rtol")
        self.atol = 0.0 if atol is None else by_leaf(atol, system, like, "atol")
        self.strict = strict
        self.measure = Measure(system, point, self.rtol, since) if point.scale is None else None
        self.first = self.floor = None
        if point.scale is not None:
            # a solution at zero has terms that vanish with it
            self.first = (point.size() + point.scale).nan_to_num(0.0, 0.0, 0.0)
            self.floor = self.first * (self.rtol * self.eps)
            if isinstance(self.atol, Tensor) or self.atol:
                self.floor = self.floor + self.atol

    def start(self, point: Point) -> Point:
        """The first point, with what is known of its terms."""
        return point if self.measure is None else self.measure.start(point)

    def tolerance(self, point: Point) -> Tensor:
        """What the residual may be, ``[batch]`` or ``[batch, leaves]``."""
        scale = point.scale
        assert scale is not None
        if self.measure is None:
            assert self.floor is not None
            if isinstance(self.rtol, Tensor):
                return torch.addcmul(self.floor, scale, self.rtol)
            return torch.add(self.floor, scale, alpha=self.rtol)
        tolerance = torch.where(self.measure.local, self.strict * self.rtol * scale, 0)
        if point.noise is not None:
            tolerance = torch.add(tolerance, point.noise, alpha=ROUNDING * self.eps)
        return tolerance + self.atol

    def take(self, rows: Tensor) -> Judge:
        """Of the samples ``rows`` alone."""
        part = copy(self)
        part.measure = None if self.measure is None else self.measure.take(rows)
        part.floor = None if self.floor is None else self.floor[rows]
        return part

    def look(
        self, point: Point, operator: LinearOperator, closely: bool, norms_of: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the Jacobian itself tells of samples: bool ``[batch]``, whether they are solved; bool ``[batch]``,
        whether their residuals are nothing but rounding; and the relative residuals, ``[batch]`` or ``[batch,
        leaves]``.

        The terms are what the Jacobian makes of a change of the state by its own size along the residual,
        :math:`\\lVert Av\\rVert` with :math:`v_m=r_m\\lVert z_m\\rVert/\\lVert r_m\\rVert`. Where equations whose own
        terms do not cover them, even ``COVERED`` times over, make up a good part of the residual, large equations
        beside them do not cover them either.

        Args:
            closely: whether to assemble the matrix where it is small: a residual is taken for rounding where each leaf
                of it is within ``ROUNDING`` times ``eps`` of :math:`|A||z|` (Oettli and Prager 1964), and each equation
                within ``COVERED`` times ``rtol`` of its row of the matrix; within the whole of it where the state has
                shrunk to ``ROUNDING`` times ``eps`` of its first size, as at a root at zero with a singular Jacobian.
                Where it is not small, a residual that is solved is taken for it.
            norms_of: the norms of the leaves; ``None``: those of the system.
        """
        assert self.measure is not None
        system, z, r = self.measure.system, point.z, point.residual
        norms_of = norms_of or system.norms
        size, norms = norms_of(torch.stack((z, r)))
        size = torch.minimum(size, self.measure.most) + self.measure.share * self.measure.recent
        sizes = None if system.separate is None else torch.tensor(system.separate.sizes, device=z.device)

        def spread(t: Tensor) -> Tensor:
            return t[..., None] if sizes is None else t.repeat_interleave(sizes, dim=-1)

        image = operator.product(r * spread(torch.where(norms > 0, size / norms, 0)).to(z.dtype))
        terms = norms_of(image)
        terms = torch.where(terms < torch.inf, terms, 0)
        rtol = spread(self.rtol) if isinstance(self.rtol, Tensor) else self.rtol
        bare = torch.where(r.abs() > COVERED * rtol * image.abs(), r, 0)
        rest = torch.full_like(norms, self.atol) if isinstance(self.atol, float) else self.atol.expand_as(norms)
        if point.noise is not None:
            rest = torch.add(rest, point.noise, alpha=ROUNDING * self.eps)
        covered = torch.where(norms_of(bare) > 0.3 * norms, 0, self.rtol * terms)
        solved = drowned = self._all(norms <= covered + rest)
        if closely and z.shape[1] <= DENSE:
            matrix = operator.dense().abs()
            rounded = norms_of((matrix @ z.abs()[:, :, None])[:, :, 0])
            rounded = ROUNDING * self.eps * torch.where(rounded < torch.inf, rounded, 0)
            row = torch.linalg.vector_norm(matrix * spread(size)[:, None, :], dim=2)
            vanished = norms_of(z) <= ROUNDING * self.eps * self.measure.since
            share = torch.where(spread(vanished), 1, COVERED * rtol)
            near = (r.abs() <= share * row + spread(rest)).all(dim=1)
            drowned = self._all(norms <= rounded + rest) & near
        return solved, drowned, relative_to(norms, terms)

    @staticmethod
    def _all(leaves: Tensor) -> Tensor:
        return leaves if leaves.ndim == 1 else leaves.all(dim=1)
