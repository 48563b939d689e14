"""The Levenberg-Marquardt method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear import CG, LinearOperator, LinearSolver
from torchimplicit.linear.confirmed import solve_any
from torchimplicit.precision import working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.problems.linearization import Linearization
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.problems.root import RootSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.line_search import evaluate_some, rows_apart
from torchimplicit.validation import check_count, check_positive, check_type

SMALL = 256
"""The Jacobian is assembled up to this many unknowns or residuals, where no linear solver is named."""

ENTRIES = 2**24
"""The most entries of the assembled Jacobians of a batch."""

GOOD = 1e-4
"""The share of the predicted decrease that a step must bring."""

INEXACT = 1e-3
"""The relative residual to which an iterative solver solves for a step; the trial is judged by its own decrease."""


class LevenbergMarquardtState(NamedTuple):
    """The damping.

    Attributes:
        damping: ``[batch]``, :math:`\\lambda`.
        growth: ``[batch]``, the factor by which it rises next.
        scale: ``[batch, dim]``, the diagonal of D: the largest norm so far of each column of the Jacobian.
    """

    damping: Tensor
    growth: Tensor
    scale: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(Solver):
    """Damped Gauss-Newton steps for sums of squares: :math:`(J^TJ+\\lambda D^2)s=-J^Tr` (Moré 1978).

    :math:`D` holds the largest norms so far of the Jacobian's columns, so the units of the unknowns do not matter and
    :math:`\\lambda` has no unit. Each sample has its own :math:`\\lambda`: it falls where the linear model of the
    residuals predicted the decrease well, and rises where the sum of squares does not decrease (Nielsen 1999).

    For a :class:`LeastSquares`, or for a :class:`Root`, whose sum of squares it minimizes: more robust than Newton's
    method where the Jacobian is singular, but it may end in a minimum that is not a root (``Status.BREAKDOWN``).

    With up to 256 unknowns or residuals the Jacobian is assembled, by as many products as the fewer of the two, and
    steps come from its singular values; beyond that, from products alone. As for :class:`NewtonKrylov`,
    ``solution.evaluations`` counts the trials and not the products.

    Args:
        damping: the first :math:`\\lambda`.
        linear_solver: for :math:`D^{-1}J^TJD^{-1}+\\lambda`, symmetric positive definite; ``None``: see above.
        trials: the most steps that are tried from one point.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: ``linear_solver`` is not a linear solver.
    """

    damping: float = 1e-3
    linear_solver: LinearSolver | None = None
    trials: int = 12
    max_steps: int = 200
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit, or unroll GaussNewton"

    def check(self) -> None:
        check_positive(self, "damping")
        check_type(self, "linear_solver", LinearSolver, optional=True)
        check_count(self, "trials")

    def supports(self, system: System) -> None:
        if _residuals(system) is None:
            raise ValueError(
                "LevenbergMarquardt needs the residuals of a sum of squares: state a LeastSquares, or a Root; for a "
                "Minimum take LBFGS or NewtonKrylov, for a FixedPoint Anderson"
            )

    def start(self, point: Point) -> LevenbergMarquardtState:
        damping = torch.full_like(point.z[:, 0], self.damping, dtype=working_dtype(point.z.dtype))
        return LevenbergMarquardtState(damping, torch.full_like(damping, 2), torch.zeros_like(point.z))

    def step(self, evaluate: Evaluator, point: Point, state: LevenbergMarquardtState, progress: Progress) -> Move:
        residuals = _residuals(evaluate.system)
        assert residuals is not None
        tape = Linearization(residuals, point.z, evaluate.params)
        r = tape.out.detach()
        slope = tape.vjp(r)
        model = self._model(tape, r, slope, state.scale)
        energy, damping, growth = _energy(point), state.damping, state.growth
        size = _scaled(slope, model.scale)
        # below this decrease, rounding in the sum of squares decides (0.6: a margin above eps itself)
        lost = torch.finfo(energy.dtype).eps ** 0.6 * energy
        searching = torch.ones_like(energy, dtype=torch.bool) if progress.active is None else progress.active
        searching = searching & (slope != 0).any(dim=1)
        sound = ~searching | slope.isfinite().all(dim=1)
        searching = searching & sound
        # a gradient that is not finite is shown to the loop, which then stops the sample as non-finite
        reached = point.changed(residual=torch.where(sound[:, None], point.residual, torch.nan))
        trial, rows, damped = point, None, damping > 0.1
        for _ in range(self.trials):
            s = model.step(damping, searching)
            trial = evaluate_some(evaluate, point.z + s, searching, rows, reached)
            gain = energy - _energy(trial)
            # the model's decrease, -J^T r . s - |J s|^2 / 2, by the step's equation
            curved = (damping[:, None] * (model.scale * s).square()).sum(dim=1)
            predicted = 0.5 * (curved - (s * slope).sum(dim=1))
            ratio = gain / predicted.where(predicted > 0, 1)
            good = searching & (ratio > GOOD)
            # where rounding hides the decrease, the gradient decides
            level = searching & (predicted <= lost) & (gain.abs() <= lost)
            if bool(level.any()):
                there = _scaled(self._slope(evaluate, trial), model.scale)
                good = torch.where(level, there < size, good)
                ratio = torch.where(level, torch.where(there < 0.5 * size, 1, 0.5), ratio)
            # Nielsen's rule: a smooth factor between 1/3 and 2 for good steps, and doubling growth for bad ones
            eased = damping * (1 - (2 * ratio - 1).clamp(-1, 1) ** 3).clamp_min(1 / 3)
            raised = searching & ~good
            damping = torch.where(good, eased, torch.where(raised, damping * growth, damping))
            growth = torch.where(good, 2, torch.where(raised, 2 * growth, growth))
            reached = trial.select(good, reached)
            searching = raised
            damped = damped | raised
            left = int(searching.sum())
            if not left:
                break
            rows = rows_apart(evaluate, searching, left)
        progress.refuse(damped)
        after = LevenbergMarquardtState(damping, growth, model.scale)
        if bool(searching.any()):
            reached = trial.select(searching & ~_energy(trial).isfinite(), reached)
        return Move(reached, after, breakdown=searching)

    def _slope(self, evaluate: Evaluator, point: Point) -> Tensor:
        """The gradient :math:`J^Tr`, ``[batch, dim]``."""
        if isinstance(evaluate.system, MinimumSystem):
            return point.residual
        return Linearization(evaluate.system.fn, point.z, evaluate.params).vjp(-point.residual)

    def _model(self, tape: Linearization, r: Tensor, slope: Tensor, scale: Tensor) -> _Model:
        batch, (inner, outer) = len(r), (tape.z.shape[1], r.shape[1])
        if self.linear_solver is None and min(inner, outer) <= SMALL and batch * inner * outer <= ENTRIES:
            return _Assembled(tape, r, scale)
        return _ByProducts(self.linear_solver or CG(rtol=INEXACT, max_steps=500), tape, slope, scale)


class _Model(ABC):
    """The linear model of the residuals; :attr:`scale` is the diagonal of D, ``[batch, dim]``."""

    scale: Tensor

    @abstractmethod
    def step(self, damping: Tensor, searching: Tensor) -> Tensor:
        """The step for the damping (``[batch]``), ``[batch, dim]``; zero for samples that do not search."""


class _Assembled(_Model):
    """A model solved by a singular value decomposition: one for all trials of a step, since another damping changes
    only factors."""

    def __init__(self, tape: Linearization, r: Tensor, scale: Tensor):
        wide = working_dtype(r.dtype)
        matrix = _jacobian(tape, r).to(wide)
        finite = matrix.isfinite().all(dim=2).all(dim=1) & r.isfinite().all(dim=1)
        matrix = matrix.where(finite[:, None, None], 0)
        self.scale = _grown(scale, torch.linalg.vector_norm(matrix, dim=1).to(scale.dtype))
        u, self.values, self.right = torch.linalg.svd(matrix / self.scale[:, None, :], full_matrices=False)
        self.parts = (u.mT @ r.where(finite[:, None], 0).to(wide)[:, :, None])[:, :, 0]

    def step(self, damping: Tensor, searching: Tensor) -> Tensor:
        # with J D^-1 = U S V^T the damped normal equations give D s = -V S (S^2 + damping)^-1 U^T r
        length = self.values / (self.values.square() + damping[:, None])
        s = -(self.right.mT @ (length * self.parts)[:, :, None])[:, :, 0]
        return torch.where(searching[:, None], s.to(self.scale.dtype) / self.scale, 0)


class _ByProducts(_Model):
    """A model solved by a linear solver on the normal equations in scaled unknowns."""

    def __init__(self, solver: LinearSolver, tape: Linearization, slope: Tensor, scale: Tensor):
        self.solver, self.tape, self.slope = solver, tape, slope
        self.scale = _grown(scale, _column_norms(tape))

    def step(self, damping: Tensor, searching: Tensor) -> Tensor:
        tape, scale = self.tape, self.scale
        shift = damping[:, None].to(scale.dtype)

        def product(v: Tensor) -> Tensor:
            return tape.vjp(tape.jvp(v / scale)) / scale + shift * v

        operator = LinearOperator(
            product=product,
            transposed_product=product,
            batch=len(scale),
            dim=scale.shape[1],
            dtype=scale.dtype,
            device=scale.device,
            symmetric=True,
        )
        right = torch.where(searching[:, None], -self.slope / scale, 0)
        return torch.where(searching[:, None], solve_any(self.solver, operator, right).value / scale, 0)


def _residuals(system: System) -> Callable[..., Tensor] | None:
    """The residual function whose sum of squares is minimized; ``None`` where the system has none."""
    if isinstance(system, MinimumSystem):
        return system.residuals
    return system.fn if isinstance(system, RootSystem) else None


def _energy(point: Point) -> Tensor:
    """Half the sum of squares, ``[batch]``."""
    if point.energy is not None:
        return point.energy.to(working_dtype(point.z.dtype))
    return 0.5 * point.residual.to(working_dtype(point.z.dtype)).square().sum(dim=1)


def _scaled(slope: Tensor, scale: Tensor) -> Tensor:
    """The gradient's norm in the units of D, ``[batch]``."""
    return torch.linalg.vector_norm(slope / scale, dim=1)


def _grown(scale: Tensor, norms: Tensor) -> Tensor:
    """The largest column norms so far; that of an unknown which no residual depends on counts as the largest one."""
    # never shrinking, as in MINPACK (Moré 1978)
    scale = torch.maximum(scale, norms.nan_to_num(0.0, 0.0, 0.0))
    most = scale.amax(dim=1, keepdim=True)
    return torch.where(scale > 0, scale, torch.where(most > 0, most, 1))


def _jacobian(tape: Linearization, r: Tensor) -> Tensor:
    """The Jacobian ``[batch, residuals, unknowns]``, by as many products as the fewer of the two."""
    inner, outer = tape.z.shape[1], r.shape[1]
    eye = torch.eye(min(inner, outer), dtype=r.dtype, device=r.device)
    basis = eye[:, None, :].expand(-1, len(r), -1).contiguous()
    if inner < outer:
        return tape.jvp_block(basis).permute(1, 2, 0)
    return tape.vjp_block(basis).permute(1, 0, 2)


def _column_norms(tape: Linearization, probes: int = 8) -> Tensor:
    """Estimates of the norms of the Jacobian's columns ``[batch, dim]``, by products with random signs (Bekas et al.
    2007)."""
    # fixed signs from a chaotic sequence: no generator is touched, and every call gives the same
    number = torch.arange(1, probes * tape.out.numel() + 1, device=tape.out.device, dtype=torch.float64)
    signs = torch.sin(number.square()).sign().reshape(probes, *tape.out.shape).to(tape.out.dtype)
    return tape.vjp_block(signs).square().mean(dim=0).sqrt()
