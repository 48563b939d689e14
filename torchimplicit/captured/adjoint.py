"""The adjoint solve, compiled. The series' loop is that of the forward solve, for the map
:math:`y\\mapsto y+(b-A^Ty)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchimplicit.captured.compiled import Compiled, compiled
from torchimplicit.captured.gmres import by_gmres
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Rule, Way, run
from torchimplicit.captured.linear import ASSEMBLED, Parts, Product, Right, Solved, assembled, by_method
from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.steps import Hurried, Plain, Step
from torchimplicit.constraints import project
from torchimplicit.linear import CG, GMRES, MINRES, BiCGStab, Dense, LinearSolver, Neumann
from torchimplicit.linear.confirmed import SLACK
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.precision import UnitRows, default_rtol, safe_norm
from torchimplicit.problems import FixedPoint, JointInference, Minimum, Point, Problem, System
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.problems.system import UNLIKE
from torchimplicit.solution import Status
from torchimplicit.solvers import FixedPointIteration, Solver
from torchimplicit.solvers.tolerance import Judge

_DOUBT = 1e-2
"""The relative error that a derivative may have by what is known of the condition, at the default tolerance: one that
was asked to be looser is no doubt."""


@dataclass(frozen=True)
class Adjoint:
    """How the adjoint system is solved.

    Attributes:
        rtol, atol: of each sample.
        max_steps: the most that it may take.
        damping: of the series; ``None``: none is tried.
        method: an iterative solver that has no memory, or ``Dense``; ``None``: the series, or GMRES.
        restart: how many vectors GMRES may keep, which takes the place of a series that is slow; ``None``: nothing
            does.
        limited: whether rows that GMRES has not solved in ``max_steps`` are left so.
        terms: of a series that is cut off, and estimates the inverse: how many it has; none stands for the identity.
            ``None``: the system is solved.
    """

    rtol: float
    atol: float
    max_steps: int
    damping: float = 1.0
    method: LinearSolver | None = None
    restart: int | None = None
    limited: bool = False
    terms: int | None = None

    @staticmethod
    def estimate(terms: int, damping: float = 1.0) -> Adjoint:
        """:math:`\\lambda\\sum_{i<k}(I-\\lambda A^T)^i` in the place of the inverse; the identity for no term."""
        return Adjoint(0.0, 0.0, max(terms, 1), damping, terms=terms)

    @staticmethod
    def of(
        linear_solver: LinearSolver | None, solver: Solver, problem: Problem, dim: int, dtype: torch.dtype
    ) -> Adjoint | None:
        """The captured form of ``linear_solver``; ``None`` where it has none.

        Where none is named for a fixed point, it is the series: nothing is as cheap, and where the map contracts enough
        for plain iteration, so does its transpose. Where it is slow, GMRES takes its place. A root or a minimum has
        what the eager path takes by default, with :class:`BiCGStab`, which has no memory, for GMRES.
        """
        if linear_solver is None:
            if isinstance(problem, FixedPoint):
                plain = isinstance(solver, FixedPointIteration)
                damping = solver.damping if isinstance(solver, FixedPointIteration) else 1.0
                return Adjoint(default_rtol(dtype), 0.0, 200, damping, restart=None if plain else GMRES.restart)
            least = isinstance(problem, Minimum)
            # to assemble a matrix of joined parts, torch would have to be told the size of the batch
            small = dim <= (ASSEMBLED if least else 32) and not isinstance(problem, JointInference)
            linear_solver = Dense() if small else MINRES() if least else BiCGStab()
        if isinstance(linear_solver, Dense):
            plain_dense = linear_solver == type(linear_solver)() and dim <= ASSEMBLED
            return Adjoint(default_rtol(dtype), 0.0, 1, method=linear_solver) if plain_dense else None
        if not isinstance(linear_solver, IterativeSolver) or linear_solver.preconditioner is not None:
            return None
        settings = Adjoint(*linear_solver.tolerances(dtype), linear_solver.max_steps)
        if isinstance(linear_solver, Neumann):
            return None if linear_solver.truncated else _replaced(settings, linear_solver.damping)
        if isinstance(linear_solver, CG | MINRES | BiCGStab):
            return _replaced(settings, method=linear_solver)
        if isinstance(linear_solver, GMRES):
            if isinstance(problem, FixedPoint):
                limited = linear_solver.max_steps <= linear_solver.restart
                return _replaced(settings, restart=linear_solver.restart, limited=limited)
            return _replaced(settings, method=BiCGStab())
        return None

    def step(self) -> Step:
        """The step of the series' loop."""
        return Plain(self.damping) if self.restart is None else Hurried(self.damping, self.rtol)


def _replaced(settings: Adjoint, damping: float = 1.0, **changes: Any) -> Adjoint:
    return Adjoint(settings.rtol, settings.atol, settings.max_steps, damping, **changes)


def compiled_adjoint(graph: Graph, adjoint: Adjoint, needs_grad: Sequence[bool], slow: bool = False) -> Compiled:
    """``(z, u, *inputs) -> (sound, status, steps, residual, condition, products, *grads)``.

    ``sound`` is a bool scalar: every sample is solved, as a product of the whole operator confirms, and the system is
    not nearly singular; or the steps that were asked for have been taken. Where it does not hold the rest is worth
    nothing. The figures are those of a
    :class:`~torchimplicit.solution.Report`, ``products`` those of the whole operator; of ``grads`` there is one for
    each wanted input.

    Args:
        slow: whether the series has been found to be slow, and GMRES takes its place.
    """
    asked = [w for w, example in zip(needs_grad, graph.others, strict=True) if isinstance(example, Tensor)]
    symmetric = isinstance(graph.problem, Minimum)
    on_plane = isinstance(graph.problem, Minimum) and graph.problem.constraint is not None

    def products(v: Tensor, g: Tensor, z: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        tape = system.linearize(z, params, asked)
        operator = system.operator(tape, True)
        if isinstance(system, MinimumSystem) and on_plane:
            operator, grads = operator.unprojected or operator, system.vjp_bordered(tape, g)
        else:
            grads = system.vjp_params(tape, g)
        return operator.product(v), *(grad for grad in grads if grad is not None)

    def solve(z: Tensor, u: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        parts = Parts.of(products, z, inputs, torch.cat((z, z[:, :1]), 1) if on_plane else None)
        saved = parts.before(z, *inputs)
        product, constants, within, null = parts.product, saved, u, None
        if isinstance(system, MinimumSystem) and on_plane:
            null = system.normal(z, params)
            within, constants = project(u, null), (null, *saved)

            def product(v: Tensor, null: Tensor, *saved: Any) -> Tensor:
                return project(parts.product(project(v, null), *saved), null)

        unit = UnitRows.of(within)
        b, factor, finite = unit.unit, unit.factor, unit.finite[:, 0]
        right = Right(b, torch.linalg.vector_norm(b, dim=-1), factor[:, 0])
        scale = right.scale
        if isinstance(adjoint.method, Dense):
            answer = assembled(product, constants, right, symmetric, null)
        elif isinstance(adjoint.method, IterativeSolver):
            tolerance = adjoint.atol * right.factor + adjoint.rtol * scale
            answer = by_method(adjoint.method, tolerance, adjoint.max_steps, product, constants, right, symmetric)
        elif slow:
            assert adjoint.restart is not None
            tolerance = adjoint.atol * right.factor + adjoint.rtol * scale
            answer = by_gmres(min(adjoint.restart, adjoint.max_steps), tolerance, product, constants, right)
        else:
            answer = _by_series(adjoint, system, product, constants, right)
        g = answer.x / factor
        # of the whole operator, in the units of the cotangents: rows that depend on each other were solved in others
        left = (within - product(g, *constants)) * factor
        true = torch.linalg.vector_norm(left, dim=-1)
        tolerance = SLACK * (adjoint.atol * right.factor + adjoint.rtol * scale) + 16 * torch.finfo(u.dtype).eps * scale
        length = torch.linalg.vector_norm(answer.x, dim=-1)
        condition = answer.size * length / torch.where(scale > 0, scale, 1)
        solved = answer.solved & (true <= tolerance) & finite & (condition * default_rtol(u.dtype) < _DOUBT)
        if symmetric:  # by which the matrix would not be that of a minimum
            solved = solved & ~((answer.x * b).sum(dim=-1) < -(torch.finfo(u.dtype).eps ** 0.5) * length * scale)
        status = torch.where(solved, int(Status.CONVERGED), int(Status.MAX_STEPS))
        if adjoint.limited and answer.spent is not None and answer.left is not None:
            # rows that depend on each other would have another residual than the one by which they were solved
            solved = solved | (answer.spent & (true <= 1.1 * answer.left + tolerance))
        sound = solved.all()
        if system.separate is not None:  # leaves of unlike size are solved for in units of their own
            sizes = system.separate.safe_norms(z)
            sizes = torch.where((sizes > 0) & (sizes < torch.inf), sizes, 1)
            sound = sound & (sizes.amax(dim=1) <= UNLIKE * sizes.amin(dim=1)).all()
        relative = true / torch.where(scale > 0, scale, 1)
        if null is not None:  # with the multiplier's part
            g = torch.cat((g, ((u - parts.product(g, *saved)) * null).sum(dim=1, keepdim=True)), 1)
        grads = parts.after(g, *saved)
        return sound, status, answer.steps, relative, condition, answer.products, *grads

    def estimate(z: Tensor, u: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        parts = Parts.of(products, z, inputs)
        saved = parts.before(z, *inputs)
        g, relative = _cut_off(adjoint, parts.product, saved, u)
        count = torch.full(u.shape[:1], adjoint.terms or 0, dtype=torch.int64, device=u.device)
        spent = torch.full((), max(0, (adjoint.terms or 0) - 1), dtype=torch.int64, device=u.device)
        none = torch.zeros_like(relative)
        status = torch.full_like(count, int(Status.STEPS_TAKEN))
        return u.isfinite().all(), status, count, relative, none, spent, *parts.after(g, *saved)

    z = graph.flat()
    way = solve if adjoint.terms is None else estimate
    return compiled(way, (z, torch.empty_like(z), *graph.others))


def _by_series(adjoint: Adjoint, system: System, product: Product, saved: Any, right: Right) -> Solved:
    def evaluate(y: Tensor, constants: Any) -> Point:
        b, scale, saved = constants
        return Point(y, b - product(y, *saved), scale=scale)

    b, scale, _ = right
    first = evaluate(b, (b, scale, saved))
    size = torch.linalg.vector_norm(b - first.residual, dim=-1) / torch.where(scale > 0, scale, 1)
    judge = Judge(system, first, adjoint.rtol, 0.0)
    judge.floor = adjoint.atol * right.factor
    rule = Rule(judge, torch.full_like(scale, torch.inf), (), False)
    result, count, _ = run(adjoint.step(), Way(evaluate), first, rule, (b, scale, saved), adjoint.max_steps)
    solved = result.status == Status.CONVERGED
    return Solved(result.z, solved, result.steps, count + 2, size, torch.ones_like(solved))


def _cut_off(adjoint: Adjoint, product: Product, saved: Any, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first terms of the series, and the relative residual of all but the last of them; NaN for no term.

    Nothing is tested, and no row is scaled: it is right for samples that depend on each other, too.
    """
    if not adjoint.terms:
        return u, torch.full_like(u[:, 0], torch.nan)

    def body(now: tuple[Tensor, Tensor, Tensor], constants: Any, rings: Any) -> tuple[Tensor, Tensor, Tensor]:
        taken, x, _ = now
        u, saved = constants
        r = u - product(x, *saved)
        return taken + 1, torch.add(x, r, alpha=adjoint.damping), r

    start = torch.ones((), dtype=torch.int64, device=u.device), adjoint.damping * u, u.clone()
    _, x, r = while_loop(lambda now: now[0] < adjoint.max_steps, body, start, (u, saved))
    scale = safe_norm(u)
    return x, safe_norm(r) / torch.where(scale > 0, scale, 1)
