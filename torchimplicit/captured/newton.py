"""The step of Newton's method as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.linear import ASSEMBLED, Product, Right, assembled, by_method
from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.rings import Rings
from torchimplicit.captured.search import Fields, Ground, Moved, Searching, fields, search
from torchimplicit.linear import CG, GMRES, MINRES, BiCGStab, Dense, LinearSolver
from torchimplicit.linear.confirmed import SLACK
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.precision import UnitRows
from torchimplicit.problems import Minimum, Point, Problem
from torchimplicit.solvers import NewtonKrylov
from torchimplicit.solvers.base import Progress
from torchimplicit.solvers.newton_krylov import SMALL
from torchimplicit.state import Layout, row_norm


@dataclass(frozen=True)
class Inner:
    """How Newton's equation is solved: by which ``method``, to which relative and absolute ``tolerances``, in how many
    steps."""

    method: IterativeSolver | Dense
    tolerances: tuple[float, float]
    max_steps: int

    @staticmethod
    def of(solver: LinearSolver | None, problem: Problem, layout: Layout) -> Inner | None:
        """The inner solver for the user's ``solver``; ``None`` where that is not compiled. By default it is that of
        the eager path, but for :class:`BiCGStab`, which has no memory, in the place of GMRES; and a single system is
        assembled up to ``ASSEMBLED`` unknowns."""
        least = isinstance(problem, Minimum)
        if solver is None:
            small = layout.dim <= (ASSEMBLED if least or not layout.batched else SMALL)
            solver = Dense() if small else MINRES() if least else BiCGStab()
        tolerances = solver.tolerances(layout.dtype)
        if isinstance(solver, Dense):
            return Inner(solver, tolerances, 1) if layout.dim <= ASSEMBLED else None
        if not isinstance(solver, IterativeSolver) or solver.preconditioner is not None:
            return None
        if isinstance(solver, GMRES):
            return Inner(BiCGStab(), tolerances, solver.max_steps)
        return Inner(solver, tolerances, solver.max_steps) if isinstance(solver, CG | MINRES | BiCGStab) else None


class _Halving(NamedTuple):
    trial: Tensor
    searching: Tensor
    damped: Tensor
    size: Tensor
    reached: Fields
    last: Fields


class Newton(Searching):
    """Of :class:`~torchimplicit.solvers.NewtonKrylov`. Samples that meet negative curvature, or a singular matrix, are
    left where they are, to the eager loop.

    Args:
        inner: how the equation is solved.
        before, product: ``before(z, *constants)`` is what ``product(v, *saved)`` takes beside the vector.
        minimizes: whether it descends on an energy.
    """

    def __init__(
        self, solver: NewtonKrylov, inner: Inner, before: Callable[..., Any], product: Product, minimizes: bool
    ):
        self.halvings, self.inner, self.before, self.product = solver.halvings, inner, before, product
        self.minimizes = minimizes
        self.confirms = minimizes and isinstance(inner.method, Dense)

    def start(self, point: Point) -> Any:
        return ()

    def move(self, ground: Ground, at: Point, state: Any, rings: Rings) -> Moved:
        residual = torch.where(ground.running[:, None], at.residual, 0)
        direction, exact, lost = self._solved(residual, self.before(at.z, *ground.constants))
        judge, error = ground.judge, at.error
        if judge.measure is not None:
            error = judge.measure.system.norms(at.residual)
        done = torch.zeros_like(exact) if self.confirms else None
        solved = Progress(ground.running, False, judge, done).short(at.changed(error=error), direction, exact)
        searching = ground.running & ~lost
        if solved is not None:
            solved = solved & ~lost
            searching = searching & ~solved
        if self.minimizes:
            searched = search(ground, at, direction, searching, self.halvings + 1)
            to, failed, refused, last, spent = (
                searched.point,
                searched.failed,
                searched.trials > 1,
                searched.last,
                searched.spent,
            )
        else:
            to, failed, refused, last, spent = self._search(ground, at, direction, searching)
        # a sample that met nothing but NaN and infinity is shown them, so that it counts as non-finite
        to = last.select(failed & ~torch.isfinite(row_norm(last.residual)), to)
        return Moved(to, (), failed | (lost & ground.running), spent, solved, refused | ~exact)

    def _solved(self, residual: Tensor, saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The solution of Newton's equation, ``[batch, dim]``; bool ``[batch]``, where it is one; and where there is
        none to go along."""
        unit = UnitRows.of(residual)
        b = unit.unit
        scale = torch.linalg.vector_norm(b, dim=1)
        rtol, atol = self.inner.tolerances
        tolerance = atol * unit.factor[:, 0] + rtol * scale
        sound = unit.finite[:, 0]
        right = Right(b, scale, unit.factor[:, 0])
        if isinstance(self.inner.method, Dense):
            solution = assembled(self.product, saved, right, self.minimizes)
            sound = sound & solution.solved
        else:
            method, steps = self.inner.method, self.inner.max_steps
            solution = by_method(method, tolerance, steps, self.product, saved, right, self.minimizes)
        x, left = solution.x, b - self.product(solution.x, *saved)
        sound = sound & x.isfinite().all(dim=1)
        if self.minimizes:
            sound = sound & solution.convex & (((x * b).sum(dim=1) > 0) | (scale == 0))
        rounding = 16 * torch.finfo(b.dtype).eps * scale
        exact = sound & (torch.linalg.vector_norm(left, dim=1) <= SLACK * tolerance + rounding)
        return torch.where(sound[:, None], x / unit.factor, 0), exact, ~sound

    def _search(
        self, ground: Ground, at: Point, direction: Tensor, searching: Tensor
    ) -> tuple[Point, Tensor, Tensor, Point, Tensor]:
        """Steps halved until the residual falls: where that led, which samples found nothing, whose steps were not
        taken as a whole, the points that were tried last, and the number of evaluations."""
        here, none = fields(at), torch.zeros((), dtype=torch.int64, device=at.z.device)
        norm = row_norm(at.residual)
        now = _Halving(none, searching, torch.zeros_like(searching), torch.ones_like(norm), here, here)

        def body(now: _Halving, outer: Any, rings: Any) -> _Halving:
            constants, z, direction, norm = outer
            chosen, reached = now.searching, Point(**now.reached)
            to = z + now.size[:, None].to(z.dtype) * direction
            trial = ground.evaluate(torch.where(chosen[:, None], to, reached.z), constants).select(chosen, reached)
            accepted = chosen & (row_norm(trial.residual) <= (1 - 1e-4 * now.size) * norm)
            left = chosen & ~accepted
            after = fields(trial.select(accepted, reached))
            return _Halving(now.trial + 1, left, now.damped | left, 0.5 * now.size, after, fields(trial))

        def on(now: _Halving) -> Tensor:
            return (now.trial <= self.halvings) & (now.searching.sum() > 0)

        end = while_loop(on, body, now, (ground.constants, at.z, direction, norm))
        return Point(**end.reached), end.searching, end.damped, Point(**end.last), end.trial
