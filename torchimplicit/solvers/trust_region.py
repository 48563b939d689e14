"""Newton's method for maps with a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear import LinearSolver
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.line_search import evaluate_some, rows_apart, showing_nonfinite
from torchimplicit.solvers.newton_model import PATIENCE, assembles, only_maps, solved_dense
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_positive, check_type


class TrustRegionState(NamedTuple):
    """The trust region.

    Attributes:
        radius: ``[batch]``.
        unit: ``[batch, dim]``, the unit of each unknown, in which the radius is measured.
        idle: int64 ``[batch]``, how many steps in a row have brought next to nothing.
    """

    radius: Tensor
    unit: Tensor
    idle: Tensor


class _Model(NamedTuple):
    """The linear model :math:`r - As` of the residual, and the corners of Powell's path.

    Attributes:
        residual: r, ``[batch, dim]``.
        unit: ``[batch, dim]``, the unit of each unknown.
        newton: Newton's step, ``[batch, dim]``.
        newton_image: its product with A.
        cauchy: the minimum of the model along its steepest descent, ``[batch, dim]``.
        cauchy_image: its product with A.
        exact: bool ``[batch]``, where ``newton`` solves :math:`As=r`.
    """

    residual: Tensor
    unit: Tensor
    newton: Tensor
    newton_image: Tensor
    cauchy: Tensor
    cauchy_image: Tensor
    exact: Tensor

    def dogleg(self, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The point of Powell's path at distance ``radius`` (``[batch]``), or its end where that lies within.

        Returns:
            The step ``[batch, dim]``, the norm of the residual that the model predicts there ``[batch]``, and the
            step's length in the units ``[batch]``.
        """
        first, whole = self.cauchy / self.unit, self.newton / self.unit
        inner, outer = row_norm(first), row_norm(whole)
        way = whole - first
        a, b = (way * way).sum(dim=1), (first * way).sum(dim=1)
        c = inner * inner - radius * radius
        # |first + t way|^2 = radius^2, by the form of the quadratic formula that does not cancel
        root = (b * b - a * c).clamp_min(0).sqrt()
        share = torch.where(b > 0, -c / (b + root), (root - b) / torch.where(a > 0, a, 1)).nan_to_num(0, 0, 0)
        share = torch.where(outer <= radius, 1, share.clamp(0, 1))
        short = torch.where(inner > radius, radius / inner, 1)
        share, short = torch.where(inner >= radius, 0, share)[:, None], short[:, None]
        short = torch.where(outer[:, None] <= radius[:, None], 1, short)

        def joined(first: Tensor, whole: Tensor) -> Tensor:
            # Newton's step exactly at its end: the test for ``cut`` compares by equality
            return torch.where(share == 1, whole, short * first + share * (whole - short * first))

        step = joined(self.cauchy, self.newton)
        expected = row_norm(self.residual - joined(self.cauchy_image, self.newton_image))
        return step, expected, row_norm(step / self.unit)


@final
@dataclass(frozen=True, kw_only=True)
class TrustRegion(Solver):
    """Newton's method for maps with a trust region, by Powell's dogleg in the unknowns' own units (Powell 1970).

    The path runs from the minimum of the linear model along its steepest descent to Newton's step, and ends where it
    leaves the region. The unit of an unknown is the inverse of the largest norm so far of its column of the Jacobian
    (as in MINPACK; Moré 1978). Where the Jacobian is not assembled, Newton's equation is solved by products, the path
    leads to that inexact solution (inexact dogleg; Pawlowski et al. 2008), and the units are those of the state.

    A sample breaks down where no region is small enough, or where ten steps in a row bring next to nothing: it has come
    to a local minimum of the residual's norm that is not a root. Products with the Jacobian are not counted in
    ``solution.evaluations``.

    Args:
        linear_solver: for the Newton equation; ``None``: the Jacobian is assembled up to 128 unknowns, else the
            problem's default.
        radius: radius of the first region, as a multiple of the state's norm in those units (of 1 where that is zero).
        trials: the most regions that are tried in one step.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    linear_solver: LinearSolver | None = None
    radius: float = 100.0
    trials: int = 20
    max_steps: int = 200
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit, or unroll Anderson, Broyden or FixedPointIteration"

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_positive(self, "radius")
        check_count(self, "trials")

    def supports(self, system: System) -> None:
        only_maps(self, system)

    def start(self, point: Point) -> Any:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: TrustRegionState | None, progress: Progress) -> Move:
        residual, active = point.residual, progress.active
        if active is not None:
            # a sample that is done needs no step, and must not keep the linear solver busy
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
            # the relative decrease of the square, factored so that no square overflows
            actual = (1 - after / norm) * (1 + after / norm)
            ratio = (actual / ((1 - expected / norm) * (1 + expected / norm))).nan_to_num(-1, -1, -1)
            # steps are accepted from a ratio of 1e-4 on, as in MINPACK; regions change by algorithm 4.1 of Nocedal and
            # Wright (2006), and grow too where the model is right to a tenth, as in MINPACK
            accepted = searching & (ratio >= 1e-4) & (after < norm)
            cut = cut | (searching & (step != model.newton).any(dim=1))
            shrunk = length * (0.5 if dtype == torch.float32 else 0.25)
            grown = torch.maximum(radius, 2 * length)
            near = (ratio - 1).abs() <= 0.1
            adapted = torch.where(ratio < 0.25, shrunk, torch.where((ratio >= 0.75) | near, grown, radius))
            radius = torch.where(searching, adapted, radius)
            reached = trial.select(accepted, reached)
            searching = searching & ~accepted
            left = int(searching.sum())
            if not left:
                break
            rows = rows_apart(evaluate, searching, left)
        progress.refuse(cut | ~model.exact)
        idle = torch.where(row_norm(reached.residual) > 0.999 * norm, state.idle + 1, 0)
        breakdown = idle >= PATIENCE
        to = reached
        if left:
            breakdown = breakdown | searching
            to = showing_nonfinite(trial, searching, reached)
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
            down = unit * unit * (matrix.mT @ r[:, :, None])[:, :, 0]  # steepest descent in the unknowns' own units
            images = matrix @ torch.stack((newton, down), dim=2)
            newton_image, down_image = images[:, :, 0], images[:, :, 1]
        else:
            assert operator.transposed_product is not None
            unit, r = torch.ones_like(z), residual
            solver = self.linear_solver or system.default_linear_solver(dim, batch)
            solution = system.solve_linear(tape, False, residual, solver)
            newton, exact = solution.value, solution.report.converged
            down = operator.transposed_product(residual)
            newton_image, down_image = operator.product(newton), operator.product(down)
        # the minimum of |r - t A d| along the descent direction d is at t = r.Ad / |Ad|^2; no square may overflow
        size = row_norm(down_image)
        length = (r * (down_image / size[:, None])).sum(dim=1) / size
        length = torch.where(size > 0, length, 0)[:, None]
        cauchy, cauchy_image = length * down, length * down_image
        # a linear solver that does no better than one gradient step has failed: take that step
        worse = ~(row_norm(r - newton_image) <= row_norm(r - cauchy_image))[:, None]
        newton = torch.where(worse, cauchy, newton)
        newton_image = torch.where(worse, cauchy_image, newton_image)
        return _Model(r, unit, newton, newton_image, cauchy, cauchy_image, exact & ~worse[:, 0])
