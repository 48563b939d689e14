"""An interior-point method for batches of quadratic programs, which finds the active constraints at the solutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 60
"""The most steps of the method."""


class Program(NamedTuple):
    """A quadratic program: minimize :math:`\\langle g,x\\rangle+\\frac12 x^THx` subject to :math:`Cx=d` in the first
    rows and :math:`Cx\\le d` in the others. Its solution is sought near zero.

    Attributes:
        hessian, slope: H ``[rows, dim, dim]`` and g ``[rows, dim]``.
        size: about the size of the solution, ``[rows, 1]``.
        matrix, room: C ``[rows, m, dim]`` and d ``[rows, m]``.
    """

    hessian: Tensor
    slope: Tensor
    size: Tensor
    matrix: Tensor
    room: Tensor

    @staticmethod
    def of(hessian: Tensor, slope: Tensor, far: Tensor, matrix: Tensor, room: Tensor, equalities: int) -> Program:
        """The program with the size of its solution estimated: at most ``far`` (``[rows]``, the distance of the
        unconstrained minimum), and of the order of the typical distance of the constraints and of zero's violations."""
        outside = torch.cat((room[:, :equalities].abs(), (-room[:, equalities:]).clamp_min(0)), dim=1).amax(dim=1)
        size = torch.fmin(far, typical(room)) + outside
        return Program(hessian, slope, torch.where(size > 0, size, 1)[:, None], matrix, room)

    def take(self, rows: Tensor) -> Program:
        """The programs ``rows`` alone."""
        return Program(*(t[rows] for t in self))

    def from_there(self, x: Tensor, equalities: int) -> Program:
        """Return the same program with the origin moved to ``x`` (``[rows, dim]``)."""
        slope, room = self.slope + times(self.hessian, x), self.room - times(self.matrix, x)
        return Program.of(self.hessian, slope, self.size[:, 0], self.matrix, room, equalities)


def typical(room: Tensor) -> Tensor:
    """The median distance of the constraints that zero does not violate, ``[rows]``; NaN where there are none."""
    return torch.where(room > 0, room, torch.nan).nanmedian(dim=1).values


def interior(program: Program, equalities: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve by Mehrotra's predictor-corrector method (Nocedal and Wright 2006, algorithm 16.4).

    Returns:
        The solution ``[rows, dim]``; its multipliers up to a common positive factor, ``[rows, m]``; and bool, which
        inequalities are active.
    """
    hessian, slope, size, matrix, room = program
    # dimensionless: x in units of its size, the energy in units of its steepest term
    hessian, d = hessian * size[:, :, None], room / size
    steep = torch.maximum(slope.abs().amax(dim=1, keepdim=True), hessian.abs().amax(dim=(1, 2))[:, None])
    steep = torch.where(steep > 0, steep, 1)
    hessian, slope = hessian / steep[:, :, None], slope / steep
    a, g = matrix[:, :equalities], matrix[:, equalities:]
    b, h = d[:, :equalities, None], d[:, equalities:, None]
    dim, count = slope.shape[1], h.shape[1]
    corner = a.new_zeros(len(a), equalities, equalities)
    kkt = torch.cat((torch.cat((hessian, a.mT), dim=2), torch.cat((a, corner), dim=2)), dim=1)
    # the inequalities' matrix, padded to act on the point together with the equalities' multipliers
    wide = torch.cat((g, g.new_zeros(*g.shape[:2], equalities)), dim=2)
    tall = wide.mT.contiguous()
    x = torch.zeros_like(kkt[:, :, :1])
    s = h.clamp_min(1.0)
    both = torch.cat((s, 1 / s), dim=1)  # slacks and multipliers with product 1: on the central path for every bound
    # The residuals of the linear equations. A step of length t leaves 1 - t of them, so they are never evaluated anew.
    rest = torch.cat((slope[:, :, None], -b), dim=1) + tall @ both[:, count:]
    less, near, tiny = s - h, torch.finfo(x.dtype).eps ** 0.6, torch.finfo(x.dtype).tiny
    for _ in range(STEPS):
        s, pull = both[:, :count], both[:, count:]
        mean = (s * pull).mean(dim=1, keepdim=True)
        worst = torch.cat((rest, less / s.clamp_min(1.0), mean), dim=1).abs().amax(dim=1, keepdim=True)
        # closer to the boundary the equations become too ill-conditioned
        going = ~(worst <= near) & (mean > 0.01 * near)
        if not bool(going.any()):
            break
        newton = _Newton.of(kkt, wide, tall, rest, less, s, pull)
        # Mehrotra's predictor: how far the pure Newton step gets says how much centering the corrector needs
        _, ahead = newton.direction(None)
        there = torch.addcmul(both, _share(both, ahead), ahead)
        left = (there[:, :count] * there[:, count:]).mean(dim=1, keepdim=True)
        center = (left / mean.clamp_min(tiny)) ** 3 * mean
        dx, to = newton.direction(center - ahead[:, :count] * ahead[:, count:])
        share = 0.995 * _share(both, to)
        good = share.isfinite() & going
        x, both = torch.where(good, x + share * dx, x), torch.where(good, both + share * to, both)
        kept = torch.where(good, 1 - share, 1)
        rest, less = kept * rest, kept * less
    s, pull = both[:, :count, 0], both[:, count:, 0]
    return size * x[:, :dim, 0], torch.cat((x[:, dim:, 0], pull), dim=1), pull > s


class _Newton(NamedTuple):
    """The factorized Newton equations at one point, with the slacks ``s`` and the inequalities' multipliers eliminated;
    vectors are columns, ``[rows, k, 1]``."""

    lu: Tensor
    pivots: Tensor
    wide: Tensor
    tall: Tensor
    rest: Tensor
    less: Tensor
    s: Tensor
    weight: Tensor
    pulled: Tensor

    @staticmethod
    def of(kkt: Tensor, wide: Tensor, tall: Tensor, rest: Tensor, less: Tensor, s: Tensor, pull: Tensor) -> _Newton:
        weight = pull / s
        lu, pivots, _ = torch.linalg.lu_factor_ex(torch.baddbmm(kkt, tall, weight * wide))
        return _Newton(lu, pivots, wide, tall, rest, less, s, weight, torch.addcmul(-pull, weight, less))

    def direction(self, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """The directions of the point, and of the slacks with the multipliers, towards complementarity products of
        ``center`` (``None``: zero)."""
        centered = None if center is None else center / self.s
        pulled = self.pulled if centered is None else self.pulled + centered
        right = torch.baddbmm(self.rest, self.tall, pulled, beta=-1, alpha=-1)
        dx = torch.linalg.lu_solve(self.lu, self.pivots, right)
        ds = torch.baddbmm(self.less, self.wide, dx, beta=-1, alpha=-1)
        dp = -self.weight * (self.s + ds) if centered is None else centered - self.weight * (self.s + ds)
        return dx, torch.cat((ds, dp), dim=1)


def _share(t: Tensor, dt: Tensor) -> Tensor:
    """The longest step, at most 1, along ``dt`` that keeps ``t`` positive, ``[rows, 1, 1]``."""
    return (-dt / t).amax(dim=1, keepdim=True).clamp_min(1).reciprocal()


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """Matrices ``[rows, m, dim]`` times vectors ``[rows, dim]``."""
    return (matrix @ v[:, :, None])[:, :, 0]
