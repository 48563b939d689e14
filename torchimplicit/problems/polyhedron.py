"""The nearest point of a polyhedron."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed

STEPS = 60
"""The most steps of the interior-point method."""

CHANGES = 12
"""How often the active set that it finds is corrected."""


def unit_rows(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same set, by rows of unit length; ``[rows or 1, m, dim]`` and ``[rows or 1, m]``. One of zeros stays so."""
    square = matrix.square().sum(dim=2)
    length = torch.where(square > 0, square, 1).sqrt()
    return matrix / length[:, :, None], right / length


def projected(z: Tensor, matrix: Tensor, right: Tensor, equalities: int) -> Tensor:
    """The nearest points to ``z`` (``[rows, dim]``) with :math:`Cx=d` in the first ``equalities`` rows, and
    :math:`Cx\\\\le d` in the others; ``[rows, m, dim]`` and ``[rows, m]``, with rows of unit length.

    Which inequalities are active is found out of autograd's sight; the projection onto these is a formula, which is
    differentiated to any order.
    """
    active = _active(z.detach(), matrix.detach(), right.detach(), equalities)
    return _onto(z, matrix, right, active.to(z.dtype))[0]


def _onto(z: Tensor, matrix: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The projection onto the ``active`` rows, 0 or 1 ``[rows, m]``, as equalities; and their multipliers."""
    chosen = active[:, :, None] * matrix
    gap = active * ((matrix @ z[:, :, None])[:, :, 0] - right)
    gram = chosen @ chosen.mT + torch.diag_embed(1 - active)
    multipliers = (torch.linalg.pinv(gram, hermitian=True) @ gap[:, :, None])[:, :, 0]
    return z - (chosen.mT @ multipliers[:, :, None])[:, :, 0], multipliers


def _active(z: Tensor, matrix: Tensor, right: Tensor, equalities: int) -> Tensor:
    """bool ``[rows, m]``."""
    fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
    if equalities == matrix.shape[1]:
        return fixed
    look = not (is_transformed(z) or is_transformed(matrix) or is_transformed(right))
    rounding = 64 * torch.finfo(z.dtype).eps * (right.abs().amax(dim=1) + z.abs().amax(dim=1))[:, None]

    def wrong(active: Tensor) -> tuple[Tensor, Tensor]:
        """The active inequalities that pull the wrong way; those that are violated, by how much."""
        x, multipliers = _onto(z, matrix, right, active.to(z.dtype))
        gap = (matrix @ x[:, :, None])[:, :, 0] - right
        beyond = torch.where(~active & (gap > rounding), gap, 0)
        return active & ~fixed & (multipliers < -rounding), beyond

    active = fixed
    if look:  # all that is wrong changed at once seldom fails (Hintermüller, Ito and Kunisch 2003), and costs less
        for _ in range(CHANGES):
            pulls, beyond = wrong(active)
            if not bool((pulls | (beyond > 0)).any()):
                return active
            active = (active & ~pulls) | (beyond > 0)
    active = torch.cat((fixed[:, :equalities], _interior(z, matrix, right, equalities)), dim=1)
    for _ in range(CHANGES):
        pulls, beyond = wrong(active)
        if look and not bool((pulls | (beyond > 0)).any()):
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
        if not is_transformed(z) and not is_transformed(matrix) and bool((worst <= near).all()):
            break
        weight = pull / s
        system = eye + g.mT @ (weight[:, :, None] * g)
        system = torch.cat((torch.cat((system, a.mT), dim=2), torch.cat((a, corner), dim=2)), dim=1)

        def direction(
            center: Tensor, system: Tensor = system, weight: Tensor = weight, parts: tuple[Tensor, ...] = ()
        ) -> tuple[Tensor, ...]:
            dual, equal, less, s, pull = parts
            first = -dual - _times(g.mT, weight * less + (center / s - pull))
            solved = torch.linalg.solve_ex(system, torch.cat((first, -equal), dim=1)[:, :, None]).result[:, :, 0]
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
