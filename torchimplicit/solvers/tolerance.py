"""The stopping rule: a sample is solved when its residual is small relative to the terms that the residual sums.

One rule serves every problem, leaf by leaf of the state: ``‖r‖ <= atol + rtol * T``, where :math:`T` is the size of the
terms whose sum is the residual. The rule has no unit of its own, so a problem stated in other units takes the same
steps.

A fixed point's residual is the difference of :math:`f(z)` and :math:`z`, and both are known. For a root or a gradient
the terms are hidden in the user's function. Their size is estimated by how much the residual changes when the state
changes by its own size, :math:`T = \\lVert A\\rVert\\lVert z\\rVert`: the rule then asks whether a relative change of
the state by ``rtol`` would account for the residual, which is a backward error (Higham 2002, section 1.5). No
evaluation is spent on it: :class:`Measure` takes it from the last step.
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
"""A residual of at most this many times ``eps`` of its terms is taken for rounding."""

RUN_OFF = 1e6
"""The size of a state counts up to this many times its first size: relative to a state that diverges, every residual
would look small."""

COVERED = 100
"""The factor by which an equation's residual may exceed the tolerance that its own terms allow, before larger equations
beside it no longer make up for it."""

DENSE = 64
"""The largest number of unknowns for which :meth:`Judge.look` assembles the matrix."""

Tolerance = float | Any
"""A number, or a pytree of numbers with the structure of the state."""


def check_tolerance(owner: object, name: str) -> None:
    """Raise unless ``owner.name`` is ``None``, a finite number of at least zero, or a pytree of those.

    Raises:
        TypeError: a leaf is not a number.
        ValueError: a number is negative or not finite, or the pytree holds none.
    """
    value = getattr(owner, name)
    if value is None:
        return
    where = f"{type(owner).__name__}.{name}"
    numbers = leaves_of(value)
    if not numbers:
        raise ValueError(f"{where} is {value!r}, which holds no number: give one, or one for each leaf of the state")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{where} must be a number, not {type(number).__name__} ({number!r}), or a pytree of numbers"
            )
        if not 0 <= number < float("inf"):
            raise ValueError(f"{where} is {value}, and must be a finite number of at least zero")


def by_leaf(value: Tolerance, system: System, like: Tensor, what: str) -> float | Tensor:
    """A tolerance as a single number, or as a tensor ``[leaves]`` where it was given per leaf.

    Raises:
        ValueError: it is a pytree that does not match the state.
    """
    if isinstance(value, (int, float)):
        return float(value)
    numbers, spec = pytree.tree_flatten(value)
    leaves = system.leaves
    if leaves is None or leaves.spec is None:
        raise ValueError(
            f"{what} is a pytree, but this state is solved in coordinates that mix its leaves (metric, eliminate): "
            "give a number"
        )
    if spec != leaves.spec:
        raise ValueError(
            f"{what} has the structure {spec}, but the state has {leaves.spec}: give a number for each leaf"
        )
    if len(numbers) == 1:
        return float(numbers[0])
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def least(value: Tolerance) -> float:
    """The strictest number of a tolerance."""
    return float(min(pytree.tree_leaves(value)))


class Measure:
    """Measures the size of the terms of a residual from the last step, where an evaluation does not tell it.

    A step by :math:`\\Delta z` changed the residual by :math:`\\Delta r`. The state changed by a relative
    :math:`\\delta=\\max_m\\lVert\\Delta z_m\\rVert/\\lVert z_m\\rVert`, the maximum over its leaves; so a change by its
    own size would have changed the residual of leaf l by :math:`T_l=\\lVert\\Delta r_l\\rVert/\\delta`. This
    extrapolation is trusted only where the step was short, :math:`\\delta\\le\\sqrt{rtol}`: a long step says nothing
    about the place where it ended, and such a sample goes on. (After a Newton step of that length the error is of the
    order of ``rtol``, so quadratic convergence is not held up.)

    The size of a leaf is replaced by a floor where it is small, so that a solution at zero can be found: by
    ``ROUNDING * eps / rtol`` of its recent maximum, which is halved in every step, and by ``eps`` of its first size. It
    is capped at ``RUN_OFF`` times the first size plus the first step.

    Attributes:
        recent: ``[batch]`` or ``[batch, leaves]``, the decaying maximum of the size of the state.
        since: the size of the first state, here or where an earlier solver began; shaped like ``recent``.
        first: the size of the first residual.
        least: the smallest value of ``recent``.
        most: the largest size of the state that counts.
        share: the share of ``recent`` below which no leaf counts as smaller.
        near: the largest relative change by a step that is trusted.
        local: bool, where the size of the terms is known at the present point.
        refused: bool ``[batch]``, samples whose next step is not trusted; ``None`` for none.
        known: the size of the terms that a Newton step has told (:meth:`short`), for samples that do not move.
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
        """The first point: the size of its terms is unknown, and stands as zero."""
        self.first = self.system.norms(point.residual)
        return point.changed(error=self.first, scale=torch.zeros_like(self.first))

    @torch.no_grad()
    def step(self, point: Point, before: Point) -> Point:
        """``point``, which a step from ``before`` has reached, with the size of its terms."""
        z, r = point.z, point.residual
        # stacked, so that a step costs one reduction instead of four
        size, moved, turned, norms = self.system.norms(torch.stack((z, z - before.z, r - before.residual, r)))
        norms = torch.where(moved < torch.inf, norms, torch.nan)  # f may be finite at infinity, as exp(-z) is
        if not self.begun:
            self.most, self.begun = RUN_OFF * (self.recent + moved), True
        size = torch.minimum(size, self.most)
        self.recent = torch.maximum(torch.maximum(size, self.least), 0.5 * self.recent)
        share = self._share(moved, size)
        stepped = share > 0
        near = share <= self.near
        if self.refused is not None:
            near, self.refused = near & ~(self.refused if near.ndim == 1 else self.refused[:, None]), None
        # a sample that did not move keeps what was known of it
        self.local = torch.where(stepped, near, self.local)
        still = before.scale if self.known is None else self.known
        assert still is not None
        self.known = None
        return point.changed(error=norms, scale=torch.where(stepped, turned / share, still))

    @torch.no_grad()
    def product(self, point: Point, image: Tensor) -> Point:
        """``point`` with the size of its terms from ``image``, the product of the Jacobian with its residual."""
        size, moved, turned = self.system.norms(torch.stack((point.z, point.residual, image)))
        share = self._share(moved, size)
        self.local = (share > 0) & (share < torch.inf) & (turned < torch.inf)
        return point.changed(scale=torch.where(self.local, turned / share, 0), product=image)

    def refuse(self, samples: Tensor) -> None:
        """Do not trust the coming step of ``samples`` (bool ``[batch]``): the method shortened it, so that its length
        is no sign of being near the solution."""
        self.refused = samples

    def short(self, point: Point, step: Tensor, rtol: float | Tensor) -> Tensor:
        """bool ``[batch]``: whether the Newton ``step`` from ``point`` is within ``rtol`` of the state, leaf by leaf:
        the same rule, with the Jacobian in place of a difference quotient."""
        size, moved = self.system.norms(torch.stack((point.z, step)))
        share = moved / (size + self.share * self.recent)
        short = moved <= rtol * (size + self.share * self.recent)
        if short.ndim == 2:
            short, share = short.all(dim=1), share.amax(dim=1, keepdim=True)
        norms = point.size()
        self.known = torch.where(share > 0, norms / share, norms)
        return short

    def _share(self, moved: Tensor, size: Tensor) -> Tensor:
        """The relative change of the leaf that changed most."""
        share = moved / (size + self.share * self.recent)
        return share if share.ndim == 1 else share.amax(dim=1, keepdim=True).expand_as(share)

    def take(self, rows: Tensor) -> Measure:
        """The measure of the samples ``rows`` alone."""
        part = copy(self)
        part.recent, part.least, part.local = self.recent[rows], self.least[rows], self.local[rows]
        part.most = self.most[rows]
        return part


class Judge:
    """The stopping rule of one solve.

    Attributes:
        measure: measures the terms of the residual; ``None`` where every point tells them.
        strict: a factor on the relative tolerance where the terms are measured.
        first: the size of the residual plus its terms at the first point, where it tells them; zero where not finite.
        floor: the tolerance at terms of zero.
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
            # at a solution that is zero the terms vanish with the residual, and no relative tolerance could be met
            self.first = (point.size() + point.scale).nan_to_num(0.0, 0.0, 0.0)
            self.floor = self.first * (self.rtol * self.eps)
            if isinstance(self.atol, Tensor) or self.atol:
                self.floor = self.floor + self.atol

    def start(self, point: Point) -> Point:
        """The first point, with the size of its terms as far as it is known."""
        return point if self.measure is None else self.measure.start(point)

    def tolerance(self, point: Point) -> Tensor:
        """The tolerance on the norm of the residual, ``[batch]`` or ``[batch, leaves]``."""
        scale = point.scale
        assert scale is not None
        if self.measure is None:
            assert self.floor is not None
            # one fused operation: this runs in every step
            if isinstance(self.rtol, Tensor):
                return torch.addcmul(self.floor, scale, self.rtol)
            return torch.add(self.floor, scale, alpha=self.rtol)
        tolerance = torch.where(self.measure.local, self.strict * self.rtol * scale, 0)
        return tolerance + self._beside_terms(point)

    def _beside_terms(self, point: Point) -> float | Tensor:
        """Return what is added to the relative tolerance: the absolute one, and the rounding of terms that cancel. An
        infinite gradient has none: with it any residual that a set leaves finite, as a box does, would count as
        solved."""
        if point.noise is None:
            return self.atol
        return ROUNDING * self.eps * torch.where(point.noise < torch.inf, point.noise, 0) + self.atol

    def take(self, rows: Tensor) -> Judge:
        """The rule for the samples ``rows`` alone."""
        part = copy(self)
        part.measure = None if self.measure is None else self.measure.take(rows)
        part.floor = None if self.floor is None else self.floor[rows]
        return part

    def look(
        self, point: Point, operator: LinearOperator, closely: bool, norms_of: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Judge samples by the Jacobian itself.

        The size of the terms is what the Jacobian makes of a change of the state by its own size along the residual,
        :math:`\\lVert Av\\rVert` with :math:`v_m=r_m\\lVert z_m\\rVert/\\lVert r_m\\rVert` for leaf m. An equation
        whose residual exceeds ``COVERED`` times the tolerance of its own terms is not covered by them; where such
        equations make up a good part of a leaf's residual, the leaf is not solved, however large its other equations
        are.

        Args:
            point: where to judge.
            operator: the Jacobian there.
            closely: whether to assemble the matrix, up to ``DENSE`` unknowns, to recognize rounding. A residual is
                taken for rounding where each leaf of it is within ``ROUNDING * eps`` of :math:`|A||z|` (Oettli and
                Prager 1964) and each equation within ``COVERED * rtol`` of its row's. Where the state has shrunk to
                ``ROUNDING * eps`` of its first size, as at a root at zero with a singular Jacobian, an equation may be
                as large as the whole of its row's. Beyond ``DENSE`` unknowns a solved residual is taken for rounding.
            norms_of: the norms of the leaves; ``None``: those of the system.

        Returns:
            bool ``[batch]``, the solved samples; bool ``[batch]``, those whose residual is nothing but rounding; and
            the relative residuals, ``[batch]`` or ``[batch, leaves]``.
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
        rest = torch.zeros_like(norms) + self._beside_terms(point)
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
