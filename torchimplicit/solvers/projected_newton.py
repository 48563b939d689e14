"""Newton's method for minima on sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear import LinearSolver
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.projected import ProjectedSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.descent import DENSE, PROBES
from torchimplicit.solvers.line_search import SUFFICIENT, evaluate_some, rows_apart, showing_nonfinite
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count, check_type

RUN_OFF = 1e9
"""A state that grows beyond this many times its first size has diverged if the energy is flat along the step, and so
unbounded below; elsewhere beyond the square of it."""


class ProjectedNewtonState(NamedTuple):
    """State that a step passes to the next one; all ``[batch]``.

    Attributes:
        step: the size of the last good projected gradient step; NaN before there was one.
        first: the size of the state at first.
        modelled: bool, whether the last step was the whole step to the minimum of a convex model.
    """

    step: Tensor
    first: Tensor
    modelled: Tensor


def _downward(system: ProjectedSystem, tape: Linearization) -> tuple[Tensor, Tensor]:
    """Where the energy has negative curvature along the set, bool ``[batch]``, and the unit direction ``[batch, dim]``.

    :math:`A^T=I-(I-\\sigma H)\\Pi'` is self-adjoint in the inner product of :math:`\\Pi'`, which is symmetric and
    semidefinite, so its eigenvalues are real. They are exact up to ``DENSE`` unknowns. Beyond, they are Ritz values of
    ``PROBES`` Lanczos steps: a negative one proves negative curvature, but some may be missed.
    """
    operator, onto = system.operator(tape, True), system.tangent(tape)[0]
    dtype, eps = working_dtype(operator.dtype), torch.finfo(operator.dtype).eps
    batch, dim = operator.batch, operator.dim
    if dim <= DENSE:
        matrix = operator.dense().to(dtype)
        finite = matrix.isfinite().all(dim=2).all(dim=1)
        values, vectors = torch.linalg.eig(matrix.where(finite[:, None, None], 0))
        values, vectors = values.real, vectors.real
    else:
        start = torch.randn(dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v = start.to(operator.device, operator.dtype).expand(batch, -1).contiguous()
        basis = tangents = images = v.new_zeros(batch, dim, 0).to(dtype)
        for _ in range(PROBES):
            v = v.to(dtype)
            for _ in range(2):  # orthogonalize twice: once leaves rounding behind
                v = v - (basis @ (tangents.mT @ v[:, :, None]))[:, :, 0]
            tangent = onto(v.to(operator.dtype)).to(dtype)
            size = (v * tangent).sum(dim=1, keepdim=True).clamp_min(0).sqrt()
            size = torch.where(size > eps**0.5 * torch.linalg.vector_norm(v, dim=1, keepdim=True), size, torch.inf)
            v, tangent = v / size, tangent / size
            image = operator.product(v.to(operator.dtype)).to(dtype)
            kept = ((basis, v), (tangents, tangent), (images, image))
            basis, tangents, images = (torch.cat((t, c[:, :, None]), dim=2) for t, c in kept)
            v = image
        matrix = tangents.mT @ images
        finite = matrix.isfinite().all(dim=2).all(dim=1)
        values, vectors = torch.linalg.eigh((0.5 * (matrix + matrix.mT)).where(finite[:, None, None], 0))
        vectors = basis @ vectors
    least, where = values.min(dim=1)
    rounding = dim * eps**0.75 * values.abs().amax(dim=1)
    vector = vectors.gather(2, where[:, None, None].expand(-1, dim, 1))[:, :, 0].to(operator.dtype)
    return least < -rounding, torch.nn.functional.normalize(onto(vector), dim=1)


@final
@dataclass(frozen=True, kw_only=True)
class ProjectedNewton(Solver):
    """Newton steps where they descend, projected gradient steps where they do not.

    For a :class:`Minimum` on a set, or with a :class:`Proximal` penalty. On linear equalities and inequalities, where
    the energy's quadratic model is convex, Newton's step leads to the minimum of that model on the set, so a quadratic
    program is solved in one step. Elsewhere the step d solves the semismooth equation
    :math:`(I-\\Pi'(I-\\sigma H))d=\\Pi(z-\\sigma\\nabla E)-z` (Qi and Sun 1993), which for a box is the step of the
    primal-dual active set method (Hintermüller, Ito and Kunisch 2003). :math:`\\Pi(z+td)` is tried for a few t; where
    the energy does not decrease sufficiently, a projected (proximal) gradient step is taken, with a step size per
    sample. Every iterate lies in the set, and the energy never rises.

    Args:
        linear_solver: for the semismooth equation, which is then solved for every set; ``None``: :class:`Dense` up to
            128 unknowns, else :class:`GMRES`.
        trials: number of lengths of Newton's step that are tried.
        halvings: the most times that a step along the gradient is halved.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    linear_solver: LinearSolver | None = None
    trials: int = 4
    halvings: int = 30
    max_steps: int = 200
    by_products: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit, or unroll FixedPointIteration or Anderson"

    def check(self) -> None:
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_count(self, "trials", least=0)
        check_count(self, "halvings")

    def supports(self, system: System) -> None:
        if not isinstance(system, ProjectedSystem):
            raise ValueError(
                "ProjectedNewton is for a Minimum on a set (Box, L2Ball, Simplex, inequalities, a Projection, a "
                "Proximal): without one, or on a single LinearEquality, take LBFGS or NewtonKrylov"
            )

    def confirms(self, system: System, z: Tensor) -> bool:
        """A residual does not tell a minimum from a saddle, but the curvature along the set does."""
        return True

    def start(self, point: Point) -> ProjectedNewtonState:
        unknown = torch.full_like(row_norm(point.z), torch.nan)
        return ProjectedNewtonState(unknown, unknown, unknown > 0)

    def step(self, evaluate: Evaluator, point: Point, state: ProjectedNewtonState, progress: Progress) -> Move:
        system = evaluate.system
        assert isinstance(system, ProjectedSystem)
        assert point.energy is not None
        residual = point.residual
        searching = torch.ones_like(point.energy, dtype=torch.bool)
        if progress.active is not None:
            searching = progress.active
            residual = torch.where(searching[:, None], residual, 0)
        if progress.solved is not None and bool((progress.solved & state.modelled | ~searching).all()):
            # One step to the minimum of a convex model that meets the tolerance at once: the model was exact, the
            # energy quadratic, and a second step would only confirm it at the price of another program.
            return Move(point, state, solved=searching)
        settled = progress.solved if point.z.shape[1] > DENSE else None
        if settled is not None and bool((settled | ~searching).all()):  # only the curvature is left to test
            curved, _ = _downward(system, system.linearize(point.z, evaluate.params))
            if not bool((curved & searching).any()):
                return Move(point, state, solved=searching)
        convex = flat = torch.zeros_like(searching)
        known = None if self.linear_solver is not None else system.newton_step(point, evaluate.params)
        program = None
        if known is not None:
            program, flat, slope = known
            convex = program.isfinite().all(dim=1)
        tape = None
        if program is not None and bool((convex | ~searching).all()):
            direction, exact = program, convex
        else:
            solver = self.linear_solver or system.default_linear_solver(point.z.shape[1], point.z.shape[0])
            tape = system.linearize(point.z, evaluate.params)
            slope = tape.out.detach()
            newton = system.solve_linear(tape, False, torch.where(convex[:, None], 0, residual), solver)
            direction, exact = newton.value, newton.report.converged & newton.value.isfinite().all(dim=1)
            if program is not None:
                direction, exact = torch.where(convex[:, None], program, direction), convex | exact
        # along a flat direction Newton's step is regularized, and may be short for that reason: the projected gradient
        # has to be short as well
        longer = flat & (row_norm(residual) > row_norm(direction))
        solved = progress.short(point, torch.where(longer[:, None], residual, direction), exact)
        saddle = None
        if settled is not None and solved is not None:
            solved = solved | settled
        if tape is not None and solved is not None:
            doubtful = solved & searching & ~convex
            if bool(doubtful.any()):
                saddle, downward = _downward(system, tape)
                saddle = saddle & doubtful
                solved = solved & ~saddle
        length = torch.maximum(system.size(point.z, evaluate.params), row_norm(point.residual))
        first = torch.where(state.first > 0, state.first, length)
        astray = searching & (row_norm(point.z) > torch.where(flat, RUN_OFF, RUN_OFF**2) * first)
        if solved is not None:
            solved = solved & ~astray  # relative to a state that has diverged every step is short
            searching = searching & ~solved
        searching = searching & ~astray
        usual = system.steps(point.z, evaluate.params)[:, 0].to(point.energy.dtype)
        size = row_norm(residual).square() / usual
        if saddle is not None:
            length = row_norm(point.z)
            length = torch.where(length > 0, length, 1) * torch.where((downward * slope).sum(dim=1) > 0, -1, 1)
            direction = torch.where(saddle[:, None], downward * length[:, None], direction)
        # energies that differ by less than this differ by rounding
        lost = torch.finfo(point.z.dtype).eps ** 0.6 * (point.energy.abs() + (slope * point.z).abs().sum(dim=1))
        reached, rows, trial = point, None, point
        damped, left = ~exact, int(searching.sum())
        for halved in range(self.trials if left else 0):
            usable = searching & direction.isfinite().all(dim=1)
            to = point.z + 0.5**halved * torch.where(usable[:, None], direction, 0)
            trial = evaluate_some(evaluate, to, searching, rows, reached)
            good = usable & self._falls(point, trial, 0.5**halved * SUFFICIENT * size, lost)
            reached, searching = trial.select(good, reached), searching & ~good
            left = int(searching.sum())
            if not left:
                break
            damped = damped | searching
            rows = rows_apart(evaluate, searching, left)
        # twice the last good size, so that a size once halved can recover
        share = torch.where(state.step.isnan(), usual, 2 * state.step)
        if left:
            damped = damped | searching
            for _ in range(self.halvings):
                step = share[:, None].to(point.z.dtype)
                to = system.projection((point.z - step * slope, step), *evaluate.params)
                trial = evaluate_some(evaluate, to, searching, rows, reached)
                moved = trial.z - point.z
                enough = SUFFICIENT * row_norm(moved).square() / share
                good = searching & self._falls(point, trial, enough, lost) & (moved != 0).any(dim=1)
                reached, searching = trial.select(good, reached), searching & ~good
                left = int(searching.sum())
                if not left:
                    break
                share = torch.where(searching, 0.5 * share, share)
                rows = rows_apart(evaluate, searching, left)
        progress.refuse(damped)
        after = ProjectedNewtonState(torch.where(damped, share, state.step), first, convex & ~flat & ~damped)
        searching = searching | astray
        if not left and not bool(astray.any()):
            return Move(reached, after, solved=solved, left=saddle)
        shown = showing_nonfinite(trial, searching, reached)
        stuck = None if saddle is None else saddle & searching
        left_behind = None if saddle is None else saddle & ~searching
        return Move(shown, after, breakdown=searching, solved=solved, saddle=stuck, left=left_behind)

    @staticmethod
    def _falls(point: Point, trial: Point, enough: Tensor, lost: Tensor) -> Tensor:
        """bool ``[batch]``: whether the energy has fallen by ``enough``, or the residual where rounding hides that."""
        assert point.energy is not None
        assert trial.energy is not None
        change = trial.energy - point.energy
        level = (change.abs() <= lost) & (enough <= lost)
        return (change <= -enough) & ~level | level & (row_norm(trial.residual) < row_norm(point.residual))
