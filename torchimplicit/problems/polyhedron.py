"""The nearest point of a polyhedron."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.problems.interior_point import Program, interior, times
from torchimplicit.problems.unseen import unseen

CRAWL = 0.7
"""Where a change leaves more than this share of what was wrong, of a row a sample at least, that method is next."""

STARTS = 3
"""From how many points that method starts, each where it came to last."""

DAMPING = 1e-3
"""What is added to the diagonals of flat Hessians, at most, relative to the size of the energy's terms."""

CHANGES = 8
"""How often the active set is corrected before the interior-point method looks for it, and afterwards."""


def doubled(t: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return t if t.device.type == "mps" else t.to(torch.float64)


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
    hessian: Tensor,
    slope: Tensor,
    size: Tensor,
    moved: Tensor,
    matrix: Tensor,
    right: Tensor,
    equalities: int,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """The steps :math:`s` of least :math:`\\langle g,s\\rangle+\\frac12 s^THs` with :math:`Cs=d`, or :math:`\\le d`, as
    :func:`active_rows` has it: the projection in the metric of the Hessians, ``[rows, dim, dim]``. NaN where a Hessian
    has a negative eigenvalue, beyond rounding.

    One that is singular, as a linear energy's, has something added to its diagonal: the step is that of the proximal
    point method (Rockafellar 1976), which ends after finitely many where the energy is linear. It is the less the
    nearer the solution is (Fan and Yuan 2005). Also returns where that is so, bool ``[rows]``.

    Args:
        size: of the state, or of how far away most rows are, ``[rows]``.
        moved: by how much the projected gradient's step moves it, ``[rows]``.
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
        other, found = _factored(damped, torch.zeros_like(damping))
        found = found & (torch.linalg.eigvalsh(hessian[rows])[:, 0] >= -rounding * curved[rows])
        factor, flat = factor.index_copy(0, rows, other), flat.index_copy(0, rows, found)
        model = hessian.index_copy(0, rows, damped)
    good = definite | flat
    factor = torch.where(good[:, None, None], factor, eye)
    metric, bound = unit_rows(torch.linalg.solve_triangular(factor, matrix.mT, upper=False).mT, right)
    free = -torch.linalg.solve_triangular(factor, slope[:, :, None], upper=False)[:, :, 0]

    def program() -> Program:
        far = torch.linalg.solve_triangular(factor.mT, free[:, :, None], upper=True)[:, :, 0].abs().amax(dim=1)
        return Program.of(model, slope, far, matrix, right, equalities)

    active = active_rows(free, metric, bound, equalities, memory, program)
    found, pull = onto(free, metric, bound, active)
    if bool(flat.any()):  # seen from far away the rows were in rounding: look again from here
        again = active_rows(found, metric, bound, equalities, program=program, guess=active, known=pull)
        dropped = torch.where(again, 0, pull)
        there, _ = onto(found + times(metric.mT, dropped), metric, bound, again)
        found = torch.where(flat[:, None], there, found)
    step = torch.linalg.solve_triangular(factor.mT, found[:, :, None], upper=True)[:, :, 0]
    return step.where(good[:, None], torch.nan), flat


def _near(gram: Tensor) -> Tensor:
    """The square of the distance, ``[rows]``, at which a unit row counts as dependent on others."""
    return gram.new_full((len(gram),), 64 * gram.shape[1] * torch.finfo(gram.dtype).eps)


def _factored(matrix: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors, and bool ``[rows]``, where the squares of all pivots exceed ``least`` (``[rows]``)."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    return factor, (info == 0) & (pivots > least[:, None]).all(dim=1)


def onto(z: Tensor, matrix: Tensor, right: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The projection onto the ``active`` rows, bool ``[rows, m]``, as equalities; and their multipliers."""
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
    """The derivatives of :func:`onto` in z, ``[rows, dim, dim]``."""
    _, chosen, rows = _chosen(matrix, active)
    eye = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
    return eye - rows.mT @ _solved(rows @ rows.mT, rows, chosen)


def _chosen(matrix: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the active rows are, int64 ``[rows, k]``; which of those places one is at; and the rows themselves, or
    zeros, ``[rows, k, dim]``."""
    most = int(active.sum(dim=1).amax()) if active.numel() else 0
    place = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = active.gather(1, place)
    rows = matrix.gather(1, place[:, :, None].expand(-1, -1, matrix.shape[2]))
    return place, chosen, torch.where(chosen[:, :, None], rows, 0)


def independent(matrix: Tensor) -> bool:
    """Whether the unit rows ``[rows, m, dim]`` of every sample are independent of each other."""
    _, surely = _factored(matrix @ matrix.mT, matrix.new_full((len(matrix),), torch.finfo(matrix.dtype).eps ** 0.75))
    return bool(surely.all()) or bool((torch.linalg.matrix_rank(matrix) == matrix.shape[1]).all())


def dependent(z: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """bool ``[rows]``, where more rows hold with equality at ``z`` than are independent."""
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
    """bool ``[rows, m]``, the active rows at the nearest points to ``z`` (``[rows, dim]``) with :math:`Cx=d` in the
    first ``equalities`` rows, which all are, and :math:`Cx\\le d` in the others; ``[rows, m, dim]`` and ``[rows, m]``,
    with rows of unit length.

    Args:
        memory: of what was active last.
        program: makes the same problem in other coordinates; ``None``: in these.
        guess: which rows are tried first, bool ``[rows, m]``.
        known: multipliers ``[rows, m]`` with which ``z`` is near the nearest points to :math:`z+C^T\\lambda`, which are
            sought then.
    """
    fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
    if equalities == matrix.shape[1]:
        return fixed

    def found(z: Tensor, matrix: Tensor, right: Tensor) -> tuple[Tensor]:
        fixed = (torch.arange(matrix.shape[1], device=z.device) < equalities).expand(right.shape)
        return (_active(z, matrix, right, equalities, fixed, memory, program, guess, known),)

    # which rows are active is not seen in single precision
    return unseen(found, len(z), *map(doubled, (z, matrix, right)))[0]


class _Dual(NamedTuple):
    """The nearest points by their multipliers :math:`\\lambda`, :math:`x=z-C^T\\lambda`: what is active is tried
    without a look at x.

    Attributes:
        gram: :math:`CC^T`, ``[rows, m, m]``.
        gap: :math:`Cz-d`, ``[rows, m]``.
        bound: the sizes of d, ``[rows, m]``.
        size: of z, ``[rows, 1]``.
        fixed: bool ``[rows, m]``, the equalities.
        known: multipliers ``[rows, m]``, to those of z.
    """

    gram: Tensor
    gap: Tensor
    bound: Tensor
    size: Tensor
    fixed: Tensor
    known: Tensor | None = None

    def take(self, rows: Tensor) -> _Dual:
        known = None if self.known is None else self.known[rows]
        given = (self.gram, self.gap, self.bound, self.size, self.fixed)
        gram, gap, bound, size, fixed = (t[rows] for t in given)
        return _Dual(gram, gap, bound, size, fixed, known)

    @property
    def outside(self) -> Tensor:
        """How far z is beyond each of the rows, ``[rows, m]``."""
        rounding = 64 * torch.finfo(self.gap.dtype).eps * (self.size + self.bound)
        gap = torch.where(self.fixed, self.gap.abs(), self.gap)
        return torch.where(gap > rounding, gap, 0)

    def wrong(self, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The active inequalities that pull the wrong way; those that are violated, by how much; and bool ``[rows]``,
        where the active rows contradict each other."""
        most = int(active.sum(dim=1).amax()) if active.numel() else 0
        place = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = active.gather(1, place)
        columns = self.gram.gather(2, place[:, None, :].expand(-1, active.shape[1], -1))
        gram = columns.gather(1, place[:, :, None].expand(-1, -1, most))
        gap, held = self.gap, self.size + torch.where(active, self.bound, 0).amax(dim=1, keepdim=True)
        if self.known is not None:  # what is let go pulls no longer
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
    """The multipliers ``[rows, m, k]`` of the ``chosen`` rows, by their Gram matrices: those of least norm where the
    rows depend on each other."""
    pair = chosen[:, :, None] & chosen[:, None, :]
    gram = torch.where(pair, gram, 0) + torch.diag_embed((~chosen).to(gram.dtype))
    # the squares of the pivots are those of a row's distance from the span of the rows before it
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
    if known is None and not bool(dual.outside.any()):  # which tells nothing of points that lie elsewhere
        return fixed
    if guess is None and memory is not None:
        guess = memory.guess(fixed)
    active, rows = fixed if guess is None else guess, None
    part, before = active, 0
    # all that is wrong changed at once seldom fails (Hintermüller, Ito and Kunisch 2003), and costs less
    for change in range(CHANGES + 1):
        pulls, beyond, unmet = dual.wrong(part)
        wrong = pulls | (beyond > 0)
        left = (wrong.any(dim=1) | unmet).nonzero().squeeze(1)
        if not len(left):
            break
        part, count = part ^ wrong, int(wrong.sum())
        crawls, before = change >= 2 and count > max(CRAWL * before, len(fixed)), count
        if len(left) < len(part):  # those that are right leave
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
    """The active rows as an interior-point method finds them, and then row by row; again from where that has led, in
    its own units, where it is not right yet."""
    active = dual.fixed
    for _ in range(STARTS):
        x, multipliers, inequalities = interior(program, equalities)
        found = torch.cat((dual.fixed[:, :equalities], inequalities), dim=1)
        active, done = _row_by_row(dual, _basis(dual, multipliers, found))
        if done:
            break
        program = program.from_there(x, equalities)
    return active


def _row_by_row(dual: _Dual, active: Tensor) -> tuple[Tensor, bool]:
    """The active rows once the worst is changed a few times; and whether nothing is wrong then."""
    for _ in range(CHANGES):
        pulls, beyond, unmet = dual.wrong(active)
        if not bool((pulls | (beyond > 0)).any()):
            return active, not bool(unmet.any())
        # what pulls the wrong way is let go first; then the worst violation comes in
        worst = (beyond > 0) & (beyond == beyond.amax(dim=1, keepdim=True))
        active = torch.where(pulls.any(dim=1, keepdim=True), active & ~pulls, active | worst)
    return active, False


def _basis(dual: _Dual, multipliers: Tensor, active: Tensor) -> Tensor:
    """Of active rows with ``multipliers`` those that are independent and make the same sum with multipliers of the
    right sign (Carathéodory), bool ``[rows, m]``. Where more rows meet than are independent, as at a degenerate vertex,
    the multipliers of least norm need not have it."""
    for _ in range(active.shape[1]):
        pair = active[:, :, None] & active[:, None, :]
        gram = torch.where(pair, dual.gram, 0) + torch.diag_embed((~active).to(dual.gram.dtype))
        _, apart = _factored(gram, _near(gram))
        odd = (~apart & (active & ~dual.fixed).any(dim=1)).nonzero().squeeze(1)
        if not len(odd):
            break
        way = torch.linalg.eigh(gram[odd]).eigenvectors[:, :, 0]  # a sum of the rows that is zero
        loose, held = (active & ~dual.fixed)[odd], multipliers[odd]
        first = torch.where(loose, way, 0).abs().argmax(dim=1, keepdim=True)
        way = way * way.gather(1, first).sign()
        reach = torch.where(loose & (way > 1e-9), held.clamp_min(0) / way.clamp_min(1e-9), torch.inf)
        share, goes = reach.min(dim=1, keepdim=True)
        multipliers = multipliers.index_copy(0, odd, held - torch.where(share.isfinite(), share, 0) * way)
        active = active.index_copy(0, odd, active[odd].scatter(1, goes, False))
    return active
