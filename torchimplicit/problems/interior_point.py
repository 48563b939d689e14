"""Quadratic programs by an interior-point method, for what is active at their solutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 60
"""The most steps of the method."""


class Program(NamedTuple):
    """Of least :math:`\\langle g,x\\rangle+\\frac12 x^THx` with :math:`Cx=d`, or :math:`\\le d`, near x = 0.

    Attributes:
        hessian, slope: ``[rows, dim, dim]`` and ``[rows, dim]``.
        size: about that of the solution, ``[rows, 1]``.
        matrix, room: ``[rows, m, dim]`` and ``[rows, m]``.
    """

    hessian: Tensor
    slope: Tensor
    size: Tensor
    matrix: Tensor
    room: Tensor

    @staticmethod
    def of(hessian: Tensor, slope: Tensor, far: Tensor, matrix: Tensor, room: Tensor, equalities: int) -> Program:
        """Its solution lies at most as ``far`` (``[rows]``) away, or as most rows, and as far as zero violates any."""
        outside = torch.cat((room[:, :equalities].abs(), (-room[:, equalities:]).clamp_min(0)), dim=1).amax(dim=1)
        size = torch.fmin(far, typical(room)) + outside
        return Program(hessian, slope, torch.where(size > 0, size, 1)[:, None], matrix, room)

    def take(self, rows: Tensor) -> Program:
        return Program(*(t[rows] for t in self))

    def from_there(self, x: Tensor, equalities: int) -> Program:
        """The same, near ``x`` (``[rows, dim]``)."""
        slope, room = self.slope + times(self.hessian, x), self.room - times(self.matrix, x)
        return Program.of(self.hessian, slope, self.size[:, 0], self.matrix, room, equalities)


def typical(room: Tensor) -> Tensor:
    """How far away most of the rows are that zero does not violate, ``[rows]``; NaN where there are none."""
    return torch.where(room > 0, room, torch.nan).nanmedian(dim=1).values


def interior(program: Program, equalities: int) -> tuple[Tensor, Tensor, Tensor]:
    """The solution, its multipliers but for their unit, and which inequalities are active there, by Mehrotra's
    predictor-corrector method (Nocedal and Wright 2006, algorithm 16.4)."""
    hessian, slope, size, matrix, room = program
    hessian, d = hessian * size[:, :, None], room / size
    steep = torch.maximum(slope.abs().amax(dim=1, keepdim=True), hessian.abs().amax(dim=(1, 2))[:, None])
    steep = torch.where(steep > 0, steep, 1)
    hessian, slope = hessian / steep[:, :, None], slope / steep
    a, g = matrix[:, :equalities], matrix[:, equalities:]
    b, h = d[:, :equalities], d[:, equalities:]
    corner = a.new_zeros(*b.shape, equalities)
    kkt = torch.cat((torch.cat((hessian, a.mT), dim=2), torch.cat((a, corner), dim=2)), dim=1)
    x = torch.zeros_like(torch.cat((slope, b), dim=1))  # and the equalities' multipliers
    s = h.clamp_min(1.0)
    pull = 1 / s  # a bound that is far away is as near to the central path as others
    # what Newton's equations leave, of which a step takes its share off
    rest, less = torch.cat((slope + times(g.mT, pull), -b), dim=1), s - h
    near = torch.finfo(x.dtype).eps ** 0.6
    for _ in range(STEPS):
        mean = (s * pull).mean(dim=1, keepdim=True)
        worst = torch.cat((rest, less / s.clamp_min(1.0), mean), dim=1).abs().amax(dim=1, keepdim=True)
        # nearer to the boundary the equations are too ill conditioned to go on
        going = ~(worst <= near) & (mean > 0.01 * near)
        if not bool(going.any()):
            break
        newton = _Newton.of(kkt, g, rest, less, s, pull)
        _, ds, dp = newton.direction(torch.zeros_like(s))
        share = _share(s, ds, pull, dp)
        ahead = ((s + share * ds) * (pull + share * dp)).mean(dim=1, keepdim=True)
        center = (ahead / mean.clamp_min(torch.finfo(x.dtype).tiny)) ** 3 * mean
        dx, ds, dp = newton.direction(center - ds * dp)
        good = torch.cat((dx, ds, dp), dim=1).isfinite().all(dim=1, keepdim=True) & going
        share = torch.where(good, 0.995 * _share(s, ds, pull, dp), 0)
        x, s, pull = (t + share * torch.where(good, dt, 0) for t, dt in ((x, dx), (s, ds), (pull, dp)))
        rest, less = (1 - share) * rest, (1 - share) * less
    dim = slope.shape[1]
    return size * x[:, :dim], torch.cat((x[:, dim:], pull), dim=1), pull > s


class _Newton(NamedTuple):
    """Newton's equations at one point, without the slacks ``s`` and the inequalities' multipliers ``pull``."""

    lu: Tensor
    pivots: Tensor
    g: Tensor
    rest: Tensor
    less: Tensor
    s: Tensor
    pull: Tensor

    @staticmethod
    def of(kkt: Tensor, g: Tensor, rest: Tensor, less: Tensor, s: Tensor, pull: Tensor) -> _Newton:
        matrix, dim = kkt.clone(), g.shape[2]
        matrix[:, :dim, :dim] += g.mT @ ((pull / s)[:, :, None] * g)
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return _Newton(lu, pivots, g, rest, less, s, pull)

    def direction(self, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the point, the slacks and the multipliers, to where these times those are ``center``."""
        dim, turned = self.g.shape[2], self.g.mT
        weight, centered = self.pull / self.s, center / self.s
        right = -self.rest
        right[:, :dim] -= times(turned, weight * self.less - self.pull + centered)
        dx = torch.linalg.lu_solve(self.lu, self.pivots, right[:, :, None])[:, :, 0]
        ds = -self.less - times(self.g, dx[:, :dim])
        return dx, ds, centered - weight * (self.s + ds)


def _share(s: Tensor, ds: Tensor, pull: Tensor, dp: Tensor) -> Tensor:
    """How far, at most 1, both can go and stay positive, ``[rows, 1]``."""
    t, dt = torch.cat((s, pull), dim=1), torch.cat((ds, dp), dim=1)
    return torch.where(dt < 0, -t / dt, 1).amin(dim=1, keepdim=True).clamp_max(1)


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """``[rows, m, dim]`` times ``[rows, dim]``."""
    return (matrix @ v[:, :, None])[:, :, 0]
