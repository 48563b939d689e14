"""The nearest point of a polyhedron."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.problems.unseen import unseen

STEPS = 60
"""The most steps of the interior-point method."""

CHANGES = 8
"""How often the active set is corrected before the interior-point method looks for it, and afterwards."""


def unit_rows(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same set, by rows of unit length; ``[rows or 1, m, dim]`` and ``[rows or 1, m]``. One of zeros stays so."""
    square = matrix.square().sum(dim=2)
    length = torch.where(square > 0, square, 1).sqrt()
    return matrix / length[:, :, None], right / length


class Memory:
    """Which rows were active where a polyhedron was projected onto last, where that is looked for first."""

    def __init__(self) -> None:
        self._active: Tensor | None = None

    def guess(self, like: Tensor) -> Tensor | None:
        """bool, of the shape of ``like``."""
        fits = self._active is not None and self._active.shape == like.shape and self._active.device == like.device
        return self._active if fits else None

    def keep(self, active: Tensor) -> None:
        self._active = active


@torch.no_grad()
def minimized(
    hessian: Tensor, slope: Tensor, matrix: Tensor, right: Tensor, equalities: int, memory: Memory | None = None
) -> Tensor:
    """The steps :math:`s` of least :math:`\\langle g,s\\rangle+\\frac12 s^THs` with :math:`Cs=d`, or :math:`\\le d`, as
    :func:`active_rows` has it: the projection in the metric of the Hessians, ``[rows, dim, dim]``. NaN where a Hessian
    is not positive definite, beyond rounding."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    rounding = 64 * slope.shape[1] * torch.finfo(slope.dtype).eps
    definite = (info == 0) & (pivots > rounding * hessian.abs().amax(dim=(1, 2))[:, None]).all(dim=1)
    factor = torch.where(
        definite[:, None, None], factor, torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
    )
    rows, bound = unit_rows(torch.linalg.solve_triangular(factor, matrix.mT, upper=False).mT, right)
    free = -torch.linalg.solve_triangular(factor, slope[:, :, None], upper=False)[:, :, 0]
    found, _ = onto(free, rows, bound, active_rows(free, rows, bound, equalities, memory))
    step = torch.linalg.solve_triangular(factor.mT, found[:, :, None], upper=True)[:, :, 0]
    return step.where(definite[:, None], torch.nan)


def onto(z: Tensor, matrix: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The projection onto the ``active`` rows, bool ``[rows, m]``, as equalities; and their multipliers."""
    look = not any(is_transformed(t) for t in (z, matrix, right, active))
    place = None
    if look:  # the active rows alone
        most = int(active.sum(dim=1).amax()) if active.numel() else 0
        place = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        matrix, right = matrix.gather(1, place[:, :, None].expand(-1, -1, z.shape[1])), right.gather(1, place)
        chosen = active.gather(1, place).to(z.dtype)
    else:
        chosen = active.to(z.dtype)
    rows = chosen[:, :, None] * matrix
    gap = chosen * (_times(matrix, z) - right)
    gram = rows @ rows.mT + torch.diag_embed(1 - chosen)
    if look:
        factor, _ = torch.linalg.cholesky_ex(gram)
        # the square of a row's distance from the span of those before it
        apart = factor.diagonal(dim1=1, dim2=2).square() > 64 * gram.shape[1] * torch.finfo(z.dtype).eps
        odd = (~apart.all(dim=1)).nonzero().squeeze(1)
        if len(odd):
            eye = torch.eye(gram.shape[1], dtype=z.dtype, device=z.device).expand(len(odd), -1, -1)
            factor, _ = torch.linalg.cholesky_ex(gram.index_copy(0, odd, eye))
        multipliers = torch.cholesky_solve(gap[:, :, None], factor)[:, :, 0]
        if len(odd):
            inverse = torch.linalg.pinv(gram[odd], hermitian=True)
            multipliers = multipliers.index_copy(0, odd, _times(inverse, gap[odd]))
    else:
        multipliers = _times(torch.linalg.pinv(gram, hermitian=True), gap)
    x = z - _times(rows.mT, multipliers)
    if place is not None:
        multipliers = torch.zeros(active.shape, dtype=z.dtype, device=z.device).scatter(1, place, multipliers)
    return x, multipliers


def dependent(z: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """bool ``[rows]``, where more rows hold with equality at ``z`` than are independent."""
    gap = _times(matrix, z) - right
    near = gap.abs() <= torch.finfo(z.dtype).eps ** 0.6 * (right.abs() + z.abs().amax(dim=1, keepdim=True))
    near = near & (matrix != 0).any(dim=2)
    held = near[:, :, None] * matrix
    return torch.linalg.matrix_rank(held, rtol=torch.finfo(z.dtype).eps ** 0.6) < near.sum(dim=1)


def active_rows(z: Tensor, matrix: Tensor, right: Tensor, equalities: int, memory: Memory | None = None) -> Tensor:
    """bool ``[rows, m]``, the active rows at the nearest points to ``z`` (``[rows, dim]``) with :math:`Cx=d` in the
    first ``equalities`` rows, which all are, and :math:`Cx\\le d` in the others; ``[rows, m, dim]`` and ``[rows, m]``,
    with rows of unit length."""
    fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
    if equalities == matrix.shape[1]:
        return fixed

    def found(z: Tensor, matrix: Tensor, right: Tensor) -> tuple[Tensor]:
        fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
        return (_active(z, matrix, right, equalities, fixed, memory),)

    return unseen(found, len(z), z, matrix, right)[0]


def _active(z: Tensor, matrix: Tensor, right: Tensor, equalities: int, fixed: Tensor, memory: Memory | None) -> Tensor:
    guess = None if memory is None else memory.guess(fixed)
    active, rows = fixed if guess is None else guess, None
    part, part_fixed = active, fixed
    # all that is wrong changed at once seldom fails (Hintermüller, Ito and Kunisch 2003), and costs less
    for change in range(CHANGES + 1):
        pulls, beyond, unmet = _wrong(z, matrix, right, part_fixed, part)
        left = ((pulls | (beyond > 0)).any(dim=1) | unmet).nonzero().squeeze(1)
        if not len(left):
            break
        part = (part & ~pulls) | (beyond > 0)
        if len(left) < len(part):  # those that are right leave
            rows = left if rows is None else rows[left]
            part, part_fixed, z, matrix, right = (t[left] for t in (part, part_fixed, z, matrix, right))
        if change == CHANGES:
            part = _corrected(z, matrix, right, equalities, part_fixed)
        active = part if rows is None else active.index_copy(0, rows, part)
    if memory is not None:
        memory.keep(active)
    return active


def _wrong(z: Tensor, matrix: Tensor, right: Tensor, fixed: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The active inequalities that pull the wrong way; those that are violated, by how much; and bool ``[rows]``, where
    the active rows contradict each other."""
    rounding = 64 * torch.finfo(z.dtype).eps * (right.abs().amax(dim=1) + z.abs().amax(dim=1))[:, None]
    x, multipliers = onto(z, matrix, right, active)
    gap = _times(matrix, x) - right
    beyond = torch.where(~active & (gap > rounding), gap, 0)
    unmet = (active & (gap.abs() > 1e4 * rounding)).any(dim=1)
    return active & ~fixed & (multipliers < -rounding), beyond, unmet


def _corrected(z: Tensor, matrix: Tensor, right: Tensor, equalities: int, fixed: Tensor) -> Tensor:
    """The active rows as an interior-point method finds them, and then row by row."""
    active = torch.cat((fixed[:, :equalities], _interior(z, matrix, right, equalities)), dim=1)
    for _ in range(CHANGES):
        pulls, beyond, _ = _wrong(z, matrix, right, fixed, active)
        if not bool((pulls | (beyond > 0)).any()):
            break
        # what pulls the wrong way is let go first; then the worst violation comes in
        worst = (beyond > 0) & (beyond == beyond.amax(dim=1, keepdim=True))
        active = torch.where(pulls.any(dim=1, keepdim=True), active & ~pulls, active | worst)
    return active


def _interior(z: Tensor, matrix: Tensor, right: Tensor, equalities: int) -> Tensor:
    """Which inequalities are active, by Mehrotra's predictor-corrector method (Nocedal and Wright 2006, algorithm
    16.4). Everything is in units of the sample's size."""
    size = right.abs().amax(dim=1, keepdim=True) + z.abs().amax(dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1)
    y, d = z / size, right / size
    a, g = matrix[:, :equalities], matrix[:, equalities:]
    b, h = d[:, :equalities], d[:, equalities:]
    dim = z.shape[1]
    eye = torch.eye(dim, dtype=z.dtype, device=z.device)
    x = y
    s = (h - _times(g, x)).clamp_min(1.0)
    pull = torch.ones_like(s)
    nu = torch.zeros_like(b)
    floor = torch.finfo(z.dtype).eps
    near = floor**0.6
    corner = torch.zeros(*b.shape, equalities, dtype=z.dtype, device=z.device)
    for _ in range(STEPS):
        dual = x - y + _times(a.mT, nu) + _times(g.mT, pull)
        equal, less = _times(a, x) - b, _times(g, x) + s - h
        mean = (s * pull).mean(dim=1, keepdim=True)
        worst = torch.cat((dual, equal, less, mean), dim=1).abs().amax(dim=1)
        if bool((worst <= near).all()):
            break
        weight = pull / s
        system = eye + g.mT @ (weight[:, :, None] * g)
        system = torch.cat((torch.cat((system, a.mT), dim=2), torch.cat((a, corner), dim=2)), dim=1)

        factors = torch.linalg.lu_factor_ex(system)

        def direction(
            center: Tensor, factors: Any = factors, weight: Tensor = weight, parts: tuple[Tensor, ...] = ()
        ) -> tuple[Tensor, ...]:
            dual, equal, less, s, pull = parts
            first = -dual - _times(g.mT, weight * less + (center / s - pull))
            right = torch.cat((first, -equal), dim=1)[:, :, None]
            solved = torch.linalg.lu_solve(factors.LU, factors.pivots, right)[:, :, 0]
            dx = solved[:, :dim]
            ds = -less - _times(g, dx)
            return dx, solved[:, dim:], ds, (center - pull * s - pull * ds) / s

        parts = (dual, equal, less, s, pull)
        _, _, ds, dp = direction(torch.zeros_like(s), parts=parts)
        share = torch.minimum(_room(s, ds), _room(pull, dp))
        ahead = ((s + share * ds) * (pull + share * dp)).mean(dim=1, keepdim=True)
        center = (ahead / mean.clamp_min(torch.finfo(z.dtype).tiny)) ** 3 * mean
        dx, dn, ds, dp = direction(center - ds * dp, parts=parts)
        share = (0.995 * torch.minimum(_room(s, ds), _room(pull, dp))).clamp_max(1)
        good = torch.cat((dx, dn, ds, dp), dim=1).isfinite().all(dim=1, keepdim=True) & (mean > floor**2)
        share = torch.where(good, share, 0)
        x, nu, s, pull = (t + share * torch.where(good, dt, 0) for t, dt in ((x, dx), (nu, dn), (s, ds), (pull, dp)))
    return pull > s


def _room(t: Tensor, dt: Tensor) -> Tensor:
    """How far, at most 1, ``t`` can go along ``dt`` and stay positive, ``[rows, 1]``."""
    return torch.where(dt < 0, -t / torch.where(dt < 0, dt, 1), 1).amin(dim=1, keepdim=True).clamp_max(1)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v[:, :, None])[:, :, 0]
