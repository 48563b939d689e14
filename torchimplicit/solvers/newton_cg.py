"""Newton's method for minima, with a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear import LinearOperator
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.gradient_descent import only_minimum
from torchimplicit.solvers.line_search import evaluate_some, rows_apart, showing_nonfinite
from torchimplicit.solvers.newton_model import PATIENCE
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count

SMALL = 512
"""The Hessian is assembled and factorized up to this many unknowns per sample."""

ENTRIES = 2**24
"""The most entries of the assembled Hessians of a batch."""


class NewtonCGState(NamedTuple):
    """The trust region.

    Attributes:
        radius: ``[batch]``, infinite until a step has been too long.
        first: ``[batch]``, the norm of the first gradient.
        idle: int64 ``[batch]``, how many steps in a row have brought no progress.
    """

    radius: Tensor
    first: Tensor
    idle: Tensor


class _Step(NamedTuple):
    """A step ``[batch, dim]``, the decrease of the energy that the model predicts ``[batch]``, and where the step is
    Newton's, bool ``[batch]``."""

    step: Tensor
    decrease: Tensor
    newton: Tensor


class _Assembled:
    """The exact minimum of the quadratic model in a ball (Moré and Sorensen 1983): by a Cholesky factorization where
    Newton's step lies in the ball, by the eigenvalues elsewhere."""

    def __init__(self, operator: LinearOperator, residual: Tensor):
        dtype = working_dtype(operator.dtype)
        self.operator = operator
        matrix = operator.spectrum_matrix(dtype)
        r = operator.project(residual).to(dtype)
        self.finite = matrix.isfinite().all(dim=2).all(dim=1) & r.isfinite().all(dim=1)
        eye = torch.eye(operator.dim, dtype=dtype, device=r.device)
        self.matrix, self.r = matrix.where(self.finite[:, None, None], eye), r.where(self.finite[:, None], 0)
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        newton = torch.cholesky_solve(self.r[:, :, None], factor)
        # one step of iterative refinement, for ill-conditioned Hessians
        newton = newton + torch.cholesky_solve(self.r[:, :, None] - self.matrix @ newton, factor)
        self.newton = newton[:, :, 0]
        self.definite = self.finite & (info == 0) & self.newton.isfinite().all(dim=1)
        self.least: Tensor | None = None
        self._values: Tensor | None = None

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvalues, the eigenvectors, and the residual in their basis; computed once, when first needed."""
        if self._values is None:
            self._values, self._vectors = torch.linalg.eigh(self.matrix)
            self._parts = (self._vectors.mT @ self.r[:, :, None])[:, :, 0]
            rounding = self.r.shape[1] * torch.finfo(self.operator.dtype).eps * self._values.abs().amax(dim=1)
            self.least = torch.where(self._values[:, 0] < -rounding, self._values[:, 0], 0)
        return self._values, self._vectors, self._parts

    def negative(self) -> Tensor:
        """bool ``[batch]``: where an eigenvalue is negative beyond rounding."""
        if bool(self.definite.all()):
            return torch.zeros_like(self.definite)
        self.spectrum()
        assert self.least is not None
        return ~self.definite & (self.least < 0)

    def within(self, radius: Tensor, usual: Tensor, searching: Tensor) -> _Step:
        """The step within ``radius``; ``usual`` replaces a radius that is still infinite. All ``[batch]``."""
        inside = self.definite & (row_norm(self.newton) <= radius)
        step = self.newton
        if not bool((inside | ~searching).all()):
            values, vectors, parts = self.spectrum()
            radius = torch.where(radius < torch.inf, radius, usual)
            step = torch.where(inside[:, None], step, (vectors @ _in_ball(values, parts, radius)[:, :, None])[:, :, 0])
        curved = (self.matrix @ step[:, :, None])[:, :, 0]
        decrease = ((self.r - 0.5 * curved) * step).sum(dim=1)
        step = self.operator.project(step.to(self.operator.dtype))
        return _Step(step, decrease, inside & self.finite)


def _in_ball(values: Tensor, parts: Tensor, radius: Tensor) -> Tensor:
    """The minimum of the model in the ball, in the eigenvectors' basis (Moré and Sorensen 1983).

    It is :math:`(\\Lambda+\\mu)^{-1}p` with the smallest :math:`\\mu` for which :math:`\\Lambda+\\mu` is semidefinite
    and the step no longer than the radius. In the hard case, where that is shorter than the radius although the least
    eigenvalue is negative, the first eigenvector makes up the missing length.

    Args:
        values: eigenvalues ``[batch, dim]``, ascending.
        parts: minus the gradient in the eigenvectors' basis, ``[batch, dim]``.
        radius: ``[batch]``.
    """
    size, least = values.abs().amax(dim=1), values[:, 0]
    tiny = torch.finfo(values.dtype).eps * torch.where(size > 0, size, 1)
    low = (-least).clamp_min(0)
    high = low + row_norm(parts) / radius + tiny

    def at(shift: Tensor) -> Tensor:
        shifted = values + shift[:, None]
        return torch.where(shifted > tiny[:, None], parts / shifted, 0)

    lower = low
    for _ in range(60):  # bisection to the last digit of float64: cheap beside the eigenvalues, and it cannot fail
        middle = 0.5 * (lower + high)
        long = row_norm(at(middle)) > radius
        lower, high = torch.where(long, middle, lower), torch.where(long, high, middle)
    free = (least > tiny) & (row_norm(at(torch.zeros_like(low))) <= radius)
    step = at(torch.where(free, 0, high))
    missing = (radius.square() - step.square().sum(dim=1)).clamp_min(0).sqrt()
    # along the first eigenvector, to the side that the gradient prefers
    more = torch.where((least < -tiny) & ~free, missing, 0) * torch.where(parts[:, 0] < 0, -1, 1)
    hard = more.abs() > 1e-3 * radius
    return torch.cat((torch.where(hard, step[:, 0] + more, step[:, 0])[:, None], step[:, 1:]), dim=1)


class _ByProducts:
    """Conjugate gradients to the ball's boundary, or along a direction of negative curvature to it (Steihaug 1983)."""

    def __init__(self, operator: LinearOperator, residual: Tensor, most: int, share: Tensor):
        self.operator, self.r, self.most, self.share = operator, operator.project(residual), most, share
        self.finite = self.r.isfinite().all(dim=1)
        self.r = self.r.where(self.finite[:, None], 0)
        self.found_negative = torch.zeros_like(self.finite)

    def negative(self) -> Tensor:
        return self.found_negative

    def within(self, radius: Tensor, usual: Tensor, searching: Tensor) -> _Step:
        """The step within ``radius``; ``usual`` bounds one along negative curvature while the radius is infinite."""
        r, x = self.r, torch.zeros_like(self.r)
        first = rr = (r * r).sum(dim=1)
        goal = first * (self.share * self.share)
        p, live, ended = r, searching & (first > 0), torch.zeros_like(searching)
        image = torch.zeros_like(r)  # H x, for the model's decrease
        for _ in range(self.most):
            product = self.operator.product(p)
            curvature, square = (p * product).sum(dim=1), (p * p).sum(dim=1)
            down = live & (curvature <= torch.finfo(r.dtype).eps * square)
            self.found_negative = self.found_negative | (live & (curvature < 0))
            alpha = torch.where(down, torch.inf, rr / torch.where(curvature > 0, curvature, 1))
            beyond = live & (down | (row_norm(x + torch.where(down, 0, alpha)[:, None] * p) > radius))
            along = (x * p).sum(dim=1)
            ball = torch.where(radius < torch.inf, radius, usual + row_norm(x))
            room = (ball * ball - (x * x).sum(dim=1)).clamp_min(0)
            # the positive root of |x + t p|^2 = ball^2, by the form that does not cancel
            reach = (along * along + square * room).sqrt()
            to_edge = torch.where(along > 0, room / (along + reach), (reach - along) / square)
            size = torch.where(live, torch.where(beyond, to_edge, alpha), 0).nan_to_num(0, 0, 0)[:, None]
            x, image, r = x + size * p, image + size * product, r - size * product
            ended = ended | beyond
            after = (r * r).sum(dim=1)
            live = live & ~beyond & (after > goal)
            if not bool(live.any()):
                break
            p = r + torch.where(live, after / torch.where(rr > 0, rr, 1), 0)[:, None] * p
            rr = after
        decrease = ((self.r - 0.5 * image) * x).sum(dim=1)
        return _Step(self.operator.project(x), decrease, ~ended & (r.square().sum(dim=1) <= goal))


@final
@dataclass(frozen=True, kw_only=True)
class NewtonCG(Solver):
    """Newton's method for a :class:`Minimum` with a trust region, by conjugate gradients (Steihaug 1983).

    Conjugate gradients run until they have solved Newton's equation well enough, until they leave the region, or until
    they meet negative curvature, which they follow to the region's boundary. Where the Hessian is small enough to be
    assembled (up to 512 unknowns), the model's minimum in the region is exact (Moré and Sorensen 1983), and a
    stationary point with a negative eigenvalue is left along its eigenvector; where that fails, its status is
    ``Status.SADDLE``. Convergence is quadratic even where the Hessian is ill-conditioned and L-BFGS crawls. Products
    with the Hessian are not counted in ``solution.evaluations``.

    Args:
        inner: the most steps of conjugate gradients for one step.
        trials: the most regions that are tried in one step.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
    """

    inner: int = 500
    trials: int = 20
    max_steps: int = 200
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit or EquilibriumPropagation, or unroll GradientDescent"

    def check(self) -> None:
        check_count(self, "inner")
        check_count(self, "trials")

    def supports(self, system: System) -> None:
        only_minimum(self, system)

    def wants_product(self) -> bool:
        return self.wants_relative()

    def confirms(self, system: System, z: Tensor) -> bool:
        return _assembles(z)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: NewtonCGState | None, progress: Progress) -> Move:
        system, active, residual = evaluate.system, progress.active, point.residual
        if active is not None:
            residual = torch.where(active[:, None], residual, 0)
        operator = system.operator(system.linearize(point.z, evaluate.params), False)
        assert point.energy is not None
        wide = working_dtype(point.z.dtype)
        energy, norm = point.energy.to(wide), row_norm(residual).to(wide)
        if state is None:
            unknown = torch.full_like(norm, torch.inf)
            state = NewtonCGState(unknown, torch.where(norm > 0, norm, 1), torch.zeros_like(norm).long())
        # as accurate as quadratic convergence needs (Nocedal and Wright 2006, theorem 7.2)
        share = (norm / state.first).clamp(torch.finfo(wide).eps, 0.01).sqrt()
        model: _Assembled | _ByProducts
        model = (
            _Assembled(operator, residual)
            if _assembles(point.z)
            else _ByProducts(operator, residual, self.inner, share)
        )
        searching = model.finite if active is None else active & model.finite
        # the length of a step while the radius is still infinite and the model unbounded: ten times that of the
        # gradient step (Cauchy's point), or of the state
        image = row_norm(operator.product(residual)).to(wide)
        cauchy = (norm * norm / image).nan_to_num(0, 0, 0)
        usual = 10 * torch.maximum(row_norm(point.z).to(wide), cauchy)
        usual = torch.where(usual > 0, usual, 1)
        solved = saddle = None
        if isinstance(model, _Assembled):
            negative = model.negative()
            solved = progress.short(point, model.newton.to(point.z.dtype), model.definite | (norm == 0))
            if solved is not None:
                singular = ~model.definite & ~negative & (norm == 0)
                solved = (solved & model.definite) | (solved & singular)
                searching = searching & ~solved
            saddle = negative
        # a Hessian that is not finite is shown to the loop, which then stops the sample as non-finite
        sound = model.finite if active is None else model.finite | ~active
        reached = point.changed(residual=torch.where(sound[:, None], point.residual, torch.nan))
        radius, rows, trial, left = state.radius, None, point, 0
        cut = lost = torch.zeros_like(searching)
        rounding = torch.finfo(point.energy.dtype).eps ** (2 / 3) * energy.abs()
        for _ in range(self.trials if solved is None or bool(searching.any()) else 0):
            planned = model.within(radius, usual, searching)
            trial = evaluate_some(evaluate, point.z + planned.step.to(point.z.dtype), searching, rows, reached)
            assert trial.energy is not None
            fall, length = energy - trial.energy.to(wide), row_norm(planned.step)
            ratio = (fall / torch.where(planned.decrease > 0, planned.decrease, 1)).nan_to_num(-1, -1, -1)
            # where rounding hides the decrease, the gradient decides
            hidden = (planned.decrease <= rounding) & (fall.abs() <= rounding)
            ratio = torch.where(hidden, torch.where(row_norm(trial.residual) < norm, 1, -1), ratio)
            accepted = searching & (ratio >= 1e-4)
            lost = lost | (searching & hidden & ~accepted)
            cut = cut | (searching & ~planned.newton)
            # thresholds 1/4 and 3/4 as in Nocedal and Wright 2006, algorithm 4.1
            grown = torch.where((ratio > 0.75) & (length > 0.9 * radius), 3 * radius, radius)
            radius = torch.where(searching, torch.where(ratio < 0.25, 0.25 * length, grown), radius)
            reached = trial.select(accepted, reached)
            searching = searching & ~accepted & ~lost
            left = int(searching.sum())
            if not left:
                break
            rows = rows_apart(evaluate, searching, left)
        progress.refuse(cut)
        assert reached.energy is not None
        fell = (energy - reached.energy.to(wide) > rounding) | (row_norm(reached.residual) < 0.9 * norm)
        idle = torch.where(fell, 0, state.idle + 1)
        breakdown = (idle >= PATIENCE) | lost | ~model.finite
        to = reached
        if left:
            breakdown = breakdown | searching
            to = showing_nonfinite(trial, searching, reached)
        if solved is not None:
            breakdown = breakdown & ~solved
        if saddle is not None:
            within = progress.solved if progress.solved is not None else norm == 0
            saddle = saddle & breakdown & within
        return Move(to, NewtonCGState(radius, state.first, idle), breakdown=breakdown, solved=solved, saddle=saddle)


def _assembles(z: Tensor) -> bool:
    batch, dim = z.shape
    return dim <= SMALL and batch * dim * dim <= ENTRIES
