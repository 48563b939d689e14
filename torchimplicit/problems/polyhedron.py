"""Projection onto a polyhedron, and quadratic programs, by a search for the active constraints.

The active set is found by a primal-dual method that flips all wrong constraints at once (Hintermüller, Ito and Kunisch
2003). Where that does not settle, an interior-point method supplies the set, which is then corrected constraint by
constraint. Given the active set, the solution is that of a linear system, differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.problems.interior_point import Program, interior, times
from torchimplicit.problems.unseen import unseen

CRAWL = 0.7
"""The interior-point method is called where a correction leaves more than this share of the wrong constraints, and at
least one per sample on average."""

STARTS = 3
"""How often the interior-point method is restarted from where it ended."""

DAMPING = 1e-3
"""The most that is added to the diagonal of a flat Hessian, relative to the size of the energy's terms."""

CHANGES = 8
"""How often the active set is corrected before the interior-point method is called, and afterwards."""


def doubled(t: Tensor) -> Tensor:
    """``t`` in double precision, where the device has it (mps does not)."""
    return t if t.device.type == "mps" else t.to(torch.float64)


def unit_rows(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale constraints to rows of unit length, ``[rows or 1, m, dim]`` and ``[rows or 1, m]``; a row of zeros stays
    so. Their residuals are then distances."""
    square = matrix.square().sum(dim=2)
    length = torch.where(square > 0, square, 1).sqrt()
    return matrix / length[:, :, None], right / length


class Memory:
    """The active rows of the last projection onto a polyhedron, tried first in the next one."""

    def __init__(self) -> None:
        self._active: Tensor | None = None

    def guess(self, like: Tensor) -> Tensor | None:
        """The active rows of the last time, bool, if they have the shape of ``like``; else ``None``."""
        fits = self._active is not None and self._active.shape == like.shape and self._active.device == like.device
        return self._active if fits else None

    def keep(self, active: Tensor) -> None:
        """Remember ``active`` for the next time."""
        self._active = active


@torch.no_grad()
def minimized(
    hessian: Tensor,
    slope: Tensor,
    size: Tensor,
    moved: Tensor,
    matrix: Tensor,
    right: Tensor,
    equalities: int,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve convex quadratic programs: minimize :math:`\\langle g,s\\rangle+\\frac12 s^THs` subject to :math:`Cs=d` in
    the first ``equalities`` rows and :math:`Cs\\le d` in the others.

    With the Cholesky factor L of H, :math:`s=L^{-T}u`, it is a Euclidean projection. To a singular Hessian, such as
    that of a linear energy, a multiple of the identity is added: the step is then that of the proximal point method
    (Rockafellar 1976), which ends after finitely many steps for a linear energy. The multiple vanishes with the
    distance from the solution (Fan and Yuan 2005).

    Args:
        hessian, slope: H ``[rows, dim, dim]`` and g ``[rows, dim]``.
        size: size of the state, or the typical distance of the constraints, ``[rows]``.
        moved: the length of the projected gradient step, ``[rows]``.
        matrix, right: C ``[rows, m, dim]`` and d ``[rows, m]``.
        equalities: number of equalities, the first of the m rows.
        memory: memory of the last active set.

    Returns:
        The steps ``[rows, dim]``, NaN where H has a negative eigenvalue beyond rounding; and bool ``[rows]``, where H
        was singular.
    """
    dim, dtype = slope.shape[1], slope.dtype
    eye = torch.eye(dim, dtype=dtype, device=slope.device)
    rounding = 64 * dim * torch.finfo(dtype).eps
    curved = hessian.abs().amax(dim=(1, 2))
    factor, definite = _factored(hessian, rounding * curved)
    flat, model = torch.zeros_like(definite), hessian
    rows = (~definite & curved.isfinite() & slope.isfinite().all(dim=1)).nonzero().squeeze(1)
    if len(rows):
        size = torch.maximum(size, moved)
        size = torch.where(size > 0, size, 1)
        share = (moved / size).clamp(torch.finfo(dtype).eps ** 0.25, 1)
        damping = DAMPING * share * torch.maximum(curved, slope.abs().amax(dim=1) / size)
        damping = torch.maximum(damping, 4 * rounding * curved)[rows]
        damped = hessian[rows] + damping[:, None, None] * eye
        other, positive = _factored(damped, torch.zeros_like(damping))
        # the damping may have hidden a negative eigenvalue: such an energy is not convex
        positive = positive & (torch.linalg.eigvalsh(hessian[rows])[:, 0] >= -rounding * curved[rows])
        factor, flat = factor.index_copy(0, rows, other), flat.index_copy(0, rows, positive)
        model = hessian.index_copy(0, rows, damped)
    good = definite | flat
    factor = torch.where(good[:, None, None], factor, eye)
    metric, bound = unit_rows(torch.linalg.solve_triangular(factor, matrix.mT, upper=False).mT, right)
    free = -torch.linalg.solve_triangular(factor, slope[:, :, None], upper=False)[:, :, 0]

    def program() -> Program:
        far = torch.linalg.solve_triangular(factor.mT, free[:, :, None], upper=True)[:, :, 0].abs().amax(dim=1)
        return Program.of(model, slope, far, matrix, right, equalities)

    active = active_rows(free, metric, bound, equalities, memory, program)
    u, pull = onto(free, metric, bound, active)
    if bool(flat.any()):
        # A small damping puts the unconstrained minimum far away, and from there the distances of the rows are lost in
        # rounding: search again from the projection.
        again = active_rows(u, metric, bound, equalities, program=program, guess=active, known=pull)
        dropped = torch.where(again, 0, pull)
        there, _ = onto(u + times(metric.mT, dropped), metric, bound, again)
        u = torch.where(flat[:, None], there, u)
    step = torch.linalg.solve_triangular(factor.mT, u[:, :, None], upper=True)[:, :, 0]
    return step.where(good[:, None], torch.nan), flat


def _near(gram: Tensor) -> Tensor:
    """The squared distance from the span of other rows below which a unit row counts as dependent on them,
    ``[rows]``."""
    return gram.new_full((len(gram),), 64 * gram.shape[1] * torch.finfo(gram.dtype).eps)


def _factored(matrix: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and bool ``[rows]``, where the squares of all pivots exceed ``least`` (``[rows]``)."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    return factor, (info == 0) & (pivots > least[:, None]).all(dim=1)


def onto(z: Tensor, matrix: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Project ``z`` (``[rows, dim]``) onto the ``active`` rows, bool ``[rows, m]``, taken as equalities;
    differentiable.

    Returns:
        The projections, and the multipliers ``[rows, m]``.
    """
    # under a transform the number of active rows cannot be read: work with all rows, masked
    if any(is_transformed(t) for t in (z, matrix, right, active)):
        rows = torch.where(active[:, :, None], matrix, 0)
        gap = torch.where(active, times(matrix, z) - right, 0)
        gram = rows @ rows.mT + torch.diag_embed((~active).to(z.dtype))
        multipliers = times(torch.linalg.pinv(gram, hermitian=True), gap)
        return z - times(rows.mT, multipliers), multipliers
    place, chosen, rows = _chosen(matrix, active)
    gap = torch.where(chosen, times(rows, z) - right.gather(1, place), 0)
    few = _solved(rows @ rows.mT, gap[:, :, None], chosen)[:, :, 0]
    multipliers = torch.zeros(active.shape, dtype=z.dtype, device=z.device).scatter(1, place, few)
    return z - times(rows.mT, few), multipliers


def projector(matrix: Tensor, active: Tensor) -> Tensor:
    """The derivative of :func:`onto` with respect to z, ``[rows, dim, dim]``: an orthogonal projector."""
    _, chosen, rows = _chosen(matrix, active)
    eye = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    return eye - rows.mT @ _solved(rows @ rows.mT, rows, chosen)


def _chosen(matrix: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the active rows of each sample to the front, k being the most that any sample has.

    Returns:
        Their places, int64 ``[rows, k]``; bool ``[rows, k]``, which of these are active; and the rows, zeros where not
        active, ``[rows, k, dim]``.
    """
    most = int(active.sum(dim=1).amax()) if active.numel() else 0
    place = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = active.gather(1, place)
    rows = matrix.gather(1, place[:, :, None].expand(-1, -1, matrix.shape[2]))
    return place, chosen, torch.where(chosen[:, :, None], rows, 0)


def independent(matrix: Tensor) -> bool:
    """Return whether the unit rows ``[rows, m, dim]`` of every sample are linearly independent."""
    # a Cholesky factor of the Gram matrix with large pivots proves it cheaply; else the rank decides
    _, surely = _factored(matrix @ matrix.mT, matrix.new_full((len(matrix),), torch.finfo(matrix.dtype).eps ** 0.75))
    return bool(surely.all()) or bool((torch.linalg.matrix_rank(matrix) == matrix.shape[1]).all())


def dependent(z: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """bool ``[rows]``: whether more constraints hold with equality at ``z`` than are linearly independent."""
    gap = times(matrix, z) - right
    near = gap.abs() <= torch.finfo(z.dtype).eps ** 0.6 * (right.abs() + z.abs().amax(dim=1, keepdim=True))
    near = near & (matrix != 0).any(dim=2)
    held = near[:, :, None] * matrix
    return torch.linalg.matrix_rank(held, rtol=torch.finfo(z.dtype).eps ** 0.6) < near.sum(dim=1)


def active_rows(
    z: Tensor,
    matrix: Tensor,
    right: Tensor,
    equalities: int,
    memory: Memory | None = None,
    program: Callable[[], Program] | None = None,
    guess: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """The active constraints at the projection of ``z`` onto a polyhedron, bool ``[rows, m]``.

    Args:
        z: ``[rows, dim]``.
        matrix, right: C ``[rows, m, dim]``, with rows of unit length, and d ``[rows, m]``: :math:`Cx=d` in the first
            ``equalities`` rows, which are always active, and :math:`Cx\\le d` in the others.
        equalities: number of equalities, the first of the rows.
        memory: memory of the last active set.
        program: makes the same problem as a quadratic program, in other coordinates; ``None``: in these.
        guess: bool ``[rows, m]``, the active set to try first.
        known: multipliers :math:`\\lambda` ``[rows, m]``: the point to project is then :math:`z+C^T\\lambda`, and ``z``
            is near its projection. This keeps digits where that point is far away.
    """
    fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
    if equalities == matrix.shape[1]:
        return fixed

    def searched(z: Tensor, matrix: Tensor, right: Tensor) -> tuple[Tensor]:
        fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
        return (_active(z, matrix, right, equalities, fixed, memory, program, guess, known),)

    # in double precision, since rounding decides which constraints count as active
    return unseen(searched, len(z), *map(doubled, (z, matrix, right)))[0]


class _Dual(NamedTuple):
    """The dual of the projection, in the multipliers :math:`\\lambda` with :math:`x=z-C^T\\lambda`. An active set is
    tested without computing x, at a cost that does not depend on its dimension.

    Attributes:
        gram: :math:`CC^T`, ``[rows, m, m]``.
        gap: :math:`Cz-d`, ``[rows, m]``.
        bound: the modulus of d, ``[rows, m]``.
        size: that of z, ``[rows, 1]``.
        fixed: bool ``[rows, m]``, the equalities.
        known: see :func:`active_rows`, ``[rows, m]``.
    """

    gram: Tensor
    gap: Tensor
    bound: Tensor
    size: Tensor
    fixed: Tensor
    known: Tensor | None = None

    def take(self, rows: Tensor) -> _Dual:
        """The samples ``rows`` alone."""
        return _Dual(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    @property
    def outside(self) -> Tensor:
        """Violation of each constraint by z, zero up to rounding, ``[rows, m]``."""
        rounding = 64 * torch.finfo(self.gap.dtype).eps * (self.size + self.bound)
        gap = torch.where(self.fixed, self.gap.abs(), self.gap)
        return torch.where(gap > rounding, gap, 0)

    def wrong(self, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test an active set (bool ``[rows, m]``).

        Returns:
            bool ``[rows, m]``, the active inequalities whose multiplier has the wrong sign; the violations of the other
            constraints, ``[rows, m]``; and bool ``[rows]``, where the active rows contradict each other.
        """
        most = int(active.sum(dim=1).amax()) if active.numel() else 0
        place = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = active.gather(1, place)
        columns = self.gram.gather(2, place[:, None, :].expand(-1, active.shape[1], -1))
        gram = columns.gather(1, place[:, :, None].expand(-1, -1, most))
        gap, held = self.gap, self.size + torch.where(active, self.bound, 0).amax(dim=1, keepdim=True)
        if self.known is not None:  # a constraint that is no longer active loses its known multiplier, which moves z
            gap = gap + times(self.gram, torch.where(active, 0, self.known))
        few = _solved(gram, torch.where(chosen, gap.gather(1, place), 0)[:, :, None], chosen)[:, :, 0]
        gap = gap - times(columns, few)
        multipliers = torch.zeros_like(gap).scatter(1, place, few)
        rounding = 64 * torch.finfo(gap.dtype).eps
        beyond = torch.where(~active & (gap > rounding * (self.size + self.bound)), gap, 0)
        unmet = (active & (gap.abs() > 1e4 * rounding * held)).any(dim=1)
        if self.known is not None:
            multipliers, held = multipliers + self.known, held + self.known.abs().amax(dim=1, keepdim=True)
        return active & ~self.fixed & (multipliers < -rounding * held), beyond, unmet


def _solved(gram: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """Solve with the Gram matrices of the ``chosen`` rows (bool ``[rows, m]``); the minimum-norm solution where the
    rows depend on each other. ``right`` and the result are ``[rows, m, k]``."""
    pair = chosen[:, :, None] & chosen[:, None, :]
    gram = torch.where(pair, gram, 0) + torch.diag_embed((~chosen).to(gram.dtype))
    # a squared pivot is the squared distance of a row from the span of the rows before it
    factor, apart = _factored(gram.detach(), _near(gram))
    odd = (~apart).nonzero().squeeze(1)
    if gram.requires_grad or len(odd):
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand(len(odd), -1, -1)
        factor, _ = torch.linalg.cholesky_ex(gram.index_copy(0, odd, eye))
    multipliers = torch.cholesky_solve(right, factor)
    if len(odd):
        inverse = torch.linalg.pinv(gram[odd], hermitian=True)
        multipliers = multipliers.index_copy(0, odd, inverse @ right[odd])
    return multipliers


def _active(
    z: Tensor,
    matrix: Tensor,
    right: Tensor,
    equalities: int,
    fixed: Tensor,
    memory: Memory | None,
    program: Callable[[], Program] | None,
    guess: Tensor | None,
    known: Tensor | None,
) -> Tensor:
    gap, size = times(matrix, z) - right, z.abs().amax(dim=1, keepdim=True)
    dual = _Dual(matrix @ matrix.mT, gap, right.abs(), size, fixed, known)
    if known is None and not bool(dual.outside.any()):  # z itself is in the set (with ``known`` it is not the point)
        return fixed
    if guess is None and memory is not None:
        guess = memory.guess(fixed)
    active, rows = fixed if guess is None else guess, None
    part, before = active, 0
    # flipping all wrong constraints at once seldom fails, and takes the fewest iterations
    for change in range(CHANGES + 1):
        pulls, beyond, unmet = dual.wrong(part)
        wrong = pulls | (beyond > 0)
        left = (wrong.any(dim=1) | unmet).nonzero().squeeze(1)
        if not len(left):
            break
        part, count = part ^ wrong, int(wrong.sum())
        crawls, before = change >= 2 and count > max(CRAWL * before, len(fixed)), count
        if len(left) < len(part):  # samples whose set is right leave
            rows = left if rows is None else rows[left]
            part, dual = part[left], dual.take(left)
        if change == CHANGES or crawls:
            if program is None:
                eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
                whole = Program.of(eye, torch.zeros_like(z), size[:, 0], matrix, -gap, equalities)
            else:
                whole = program()
            part = _corrected(dual, whole if rows is None else whole.take(rows), equalities)
        active = part if rows is None else active.index_copy(0, rows, part)
        if crawls:
            break
    if memory is not None:
        memory.keep(active)
    return active


def _corrected(dual: _Dual, program: Program, equalities: int) -> Tensor:
    """The active rows by an interior-point method, then corrected row by row. Where that is not enough, the method is
    restarted at the point it reached, in the units of what is left."""
    active = dual.fixed
    for _ in range(STARTS):
        x, multipliers, inequalities = interior(program, equalities)
        candidates = torch.cat((dual.fixed[:, :equalities], inequalities), dim=1)
        active, done = _row_by_row(dual, _basis(dual, multipliers, candidates))
        if done:
            break
        program = program.from_there(x, equalities)
    return active


def _row_by_row(dual: _Dual, active: Tensor) -> tuple[Tensor, bool]:
    """Correct the active set one constraint at a time, ``CHANGES`` times at most; returns it, and whether it is
    right."""
    for _ in range(CHANGES):
        pulls, beyond, unmet = dual.wrong(active)
        if not bool((pulls | (beyond > 0)).any()):
            return active, not bool(unmet.any())
        # first drop constraints with multipliers of the wrong sign, then add the worst violation
        worst = (beyond > 0) & (beyond == beyond.amax(dim=1, keepdim=True))
        active = torch.where(pulls.any(dim=1, keepdim=True), active & ~pulls, active | worst)
    return active, False


def _basis(dual: _Dual, multipliers: Tensor, active: Tensor) -> Tensor:
    """Reduce active rows to independent ones with the same sum and nonnegative multipliers (Carathéodory's theorem).

    At a degenerate vertex, where more rows meet than are independent, the minimum-norm multipliers of all of them need
    not be nonnegative, and the test of the active set would fail.

    Args:
        dual: the projection.
        multipliers: nonnegative for the inequalities, ``[rows, m]``.
        active: bool ``[rows, m]``.

    Returns:
        bool ``[rows, m]``, the rows that stay.
    """
    for _ in range(active.shape[1]):
        pair = active[:, :, None] & active[:, None, :]
        gram = torch.where(pair, dual.gram, 0) + torch.diag_embed((~active).to(dual.gram.dtype))
        _, apart = _factored(gram, _near(gram))
        odd = (~apart & (active & ~dual.fixed).any(dim=1)).nonzero().squeeze(1)
        if not len(odd):
            break
        way = torch.linalg.eigh(gram[odd]).eigenvectors[:, :, 0]  # coefficients of a vanishing sum of the rows
        loose, held = (active & ~dual.fixed)[odd], multipliers[odd]
        first = torch.where(loose, way, 0).abs().argmax(dim=1, keepdim=True)
        way = way * way.gather(1, first).sign()
        # move along it until the first multiplier becomes zero: that row is not needed
        reach = torch.where(loose & (way > 1e-9), held.clamp_min(0) / way.clamp_min(1e-9), torch.inf)
        share, goes = reach.min(dim=1, keepdim=True)
        multipliers = multipliers.index_copy(0, odd, held - torch.where(share.isfinite(), share, 0) * way)
        active = active.index_copy(0, odd, active[odd].scatter(1, goes, False))
    return active
