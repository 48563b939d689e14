"""Newton's method with a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.line_search import evaluate_some, rows_apart
from torchimplicit.solvers.newton_model import PATIENCE, assembles, only_maps, solved_dense
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_positive, check_type


class TrustRegionState(NamedTuple):
    """The radius ``[batch]``, the unit of each unknown ``[batch, dim]``, and how many steps in a row have brought
    little, int64 ``[batch]``."""

    radius: Tensor
    unit: Tensor
    idle: Tensor


class _Model(NamedTuple):
    """:math:`r - As` where it is sought to be least, in the unknowns' units.

    ``newton`` and ``cauchy`` are steps ``[batch, dim]``, ``newton_image`` and ``cauchy_image`` their products with A;
    ``exact`` (bool ``[batch]``) says where the first solves :math:`As=r`.
    """

    residual: Tensor
    unit: Tensor
    newton: Tensor
    newton_image: Tensor
    cauchy: Tensor
    cauchy_image: Tensor
    exact: Tensor

    def dogleg(self, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step along Powell's path that reaches ``radius`` or ends within it, the norm ``[batch]`` of the residual
        that the model expects there, and the step's length."""
        first, whole = self.cauchy / self.unit, self.newton / self.unit
        inner, outer = row_norm(first), row_norm(whole)
        way = whole - first
        a, b = (way * way).sum(dim=1), (first * way).sum(dim=1)
        c = inner * inner - radius * radius
        root = (b * b - a * c).clamp_min(0).sqrt()
        share = torch.where(b > 0, -c / (b + root), (root - b) / torch.where(a > 0, a, 1)).nan_to_num(0, 0, 0)
        share = torch.where(outer <= radius, 1, share.clamp(0, 1))
        short = torch.where(inner > radius, radius / inner, 1)
        share, short = torch.where(inner >= radius, 0, share)[:, None], short[:, None]
        short = torch.where(outer[:, None] <= radius[:, None], 1, short)

        def joined(first: Tensor, whole: Tensor) -> Tensor:
            return torch.where(share == 1, whole, short * first + share * (whole - short * first))

        step = joined(self.cauchy, self.newton)
        expected = row_norm(self.residual - joined(self.cauchy_image, self.newton_image))
        return step, expected, row_norm(step / self.unit)


@final
@dataclass(frozen=True, kw_only=True)
class TrustRegion(Solver):
    """Newton's method for maps with a trust region, by Powell's dogleg in the unknowns' own units (Powell 1970).

    The step runs from the point where the linear model of the residual is least along its steepest descent to Newton's
    own, and ends where it leaves the region. What a unit of each unknown is the largest column of the Jacobian tells
    that has been met (as in MINPACK; Moré 1978). Where the Jacobian is assembled, it is factorized; elsewhere Newton's
    equation is solved by products and the path made of what comes out (an inexact dogleg; Pawlowski et al. 2008), in
    the state's units.
    A sample breaks down where no region is small enough, or where ten steps in a row bring next to nothing: it has come
    to a place where the norm of the residual, but not the residual, is at its least. Products with the Jacobian are not
    counted in ``solution.evaluations``.

    Args:
        linear_solver: for the Newton equation; ``None``: the Jacobian is assembled up to 128 unknowns, else the
            problem's default.
        radius: of the first region, as a multiple of the length of the state in those units (of one where that is
            zero).
        trials: the most regions that are tried in one step.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.
    """

    linear_solver: LinearSolver | None = None
    radius: float = 100.0
    trials: int = 20
    max_steps: int = 200
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_positive(self, "radius")
        check_count(self, "trials")

    def supports(self, system: System) -> None:
        only_maps(self, system)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: TrustRegionState | None, progress: Progress) -> Move:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                "Unrolled cannot differentiate through TrustRegion's linear solves: use Implicit, or unroll Anderson, "
                "Broyden or FixedPointIteration"
            )
        residual, active = point.residual, progress.active
        if active is not None:
            # a sample that is done asks for no step, and must not keep the linear solver busy
            residual = torch.where(active[:, None], residual, 0)
        model = self._model(evaluate, point.z, residual, None if state is None else state.unit)
        searching = torch.ones_like(model.exact) if active is None else active
        solved = progress.short(point, model.newton, model.exact)
        if solved is not None:
            searching = searching & ~solved
        if state is None:
            size = row_norm(point.z / model.unit)
            radius = self.radius * torch.where(size > 0, size, 1)
            state = TrustRegionState(radius, model.unit, torch.zeros_like(radius, dtype=torch.int64))
        norm, radius, dtype = row_norm(residual), state.radius, point.z.dtype
        reached, rows, trial, left = point, None, point, 0
        cut = torch.zeros_like(searching)
        for _ in range(self.trials):
            step, expected, length = model.dogleg(radius)
            trial = evaluate_some(evaluate, point.z + step.to(dtype), searching, rows, reached)
            after = row_norm(trial.residual)
            # of squares, without their overflow
            actual = (1 - after / norm) * (1 + after / norm)
            ratio = (actual / ((1 - expected / norm) * (1 + expected / norm))).nan_to_num(-1, -1, -1)
            accepted = searching & (ratio >= 1e-4) & (after < norm)
            cut = cut | (searching & (step != model.newton).any(dim=1))
            shrunk = length * (0.5 if dtype == torch.float32 else 0.25)
            grown = torch.maximum(radius, 2 * length)
            near = (ratio - 1).abs() <= 0.1
            wanted = torch.where(ratio < 0.25, shrunk, torch.where((ratio >= 0.75) | near, grown, radius))
            radius = torch.where(searching, wanted, radius)
            reached = trial.select(accepted, reached)
            searching = searching & ~accepted
            left = int(searching.sum())
            if not left:
                break
            rows = rows_apart(evaluate, searching, left)
        if progress.judge is not None and progress.judge.measure is not None:
            progress.judge.measure.refuse(cut | ~model.exact)
        idle = torch.where(row_norm(reached.residual) > 0.999 * norm, state.idle + 1, 0)
        breakdown = idle >= PATIENCE
        to = reached
        if left:
            breakdown = breakdown | searching
            # a sample that met nothing but NaN and infinity is shown them, so that it counts as non-finite
            to = trial.select(searching & ~torch.isfinite(row_norm(trial.residual)), reached)
        if solved is not None:
            breakdown = breakdown & ~solved
        return Move(to, TrustRegionState(radius, model.unit, idle), breakdown=breakdown, solved=solved)

    def _model(self, evaluate: Evaluator, z: Tensor, residual: Tensor, before: Tensor | None) -> _Model:
        system, (batch, dim) = evaluate.system, z.shape
        tape = system.linearize(z, evaluate.params)
        operator = system.operator(tape, False)
        if self.linear_solver is None and assembles(z):
            dtype = working_dtype(z.dtype)
            matrix, r = operator.dense().to(dtype), residual.to(dtype)
            column = torch.linalg.vector_norm(matrix, dim=1)
            unit = 1 / torch.where(column > 0, column, 1)
            unit = unit if before is None else torch.minimum(unit, before)
            newton, exact = solved_dense(matrix, r, unit)
            down = unit * unit * (matrix.mT @ r[:, :, None])[:, :, 0]
            images = matrix @ torch.stack((newton, down), dim=2)
            newton_image, down_image = images[:, :, 0], images[:, :, 1]
        else:
            assert operator.transposed_product is not None
            unit, r = torch.ones_like(z), residual
            solver = self.linear_solver or system.default_linear_solver(dim, batch)
            found = system.solve_linear(tape, False, residual, solver)
            newton, exact = found.value, found.report.converged
            down = operator.transposed_product(residual)
            newton_image, down_image = operator.product(newton), operator.product(down)
        size = row_norm(down_image)
        length = (r * (down_image / size[:, None])).sum(dim=1) / size
        length = torch.where(size > 0, length, 0)[:, None]
        cauchy, cauchy_image = length * down, length * down_image
        # a solution of Newton's equation that is no better than that is none
        worse = ~(row_norm(r - newton_image) <= row_norm(r - cauchy_image))[:, None]
        newton = torch.where(worse, cauchy, newton)
        newton_image = torch.where(worse, cauchy_image, newton_image)
        return _Model(r, unit, newton, newton_image, cauchy, cauchy_image, exact & ~worse[:, 0])
