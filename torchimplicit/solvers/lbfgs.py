"""Limited-memory BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.linear import Preconditioner, PreparedPreconditioner
from torchimplicit.linear.preconditioners import as_preconditioner
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.gradient_descent import only_minimum
from torchimplicit.solvers.history import History
from torchimplicit.solvers.line_search import search
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count


class LBFGSState(NamedTuple):
    """Past steps ``s``, gradient changes ``y``, their inverse products ``rho`` ``[batch, memory]``, and the scale of
    the initial inverse Hessian ``gamma`` ``[batch, 1]``. A slot with ``rho == 0`` holds nothing.

    ``model`` multiplies by the initial inverse Hessian, and is ``aged`` steps old; ``None`` for a multiple of the
    identity. ``lowest`` and ``least`` are the least energy and gradient norm so far, ``idle`` the trials since either
    fell.
    """

    s: History
    y: History
    rho: Tensor
    gamma: Tensor
    lowest: Tensor
    least: Tensor
    idle: Tensor
    seen: int
    model: PreparedPreconditioner | None = None
    aged: int = 0


PATIENCE = 60
"""Trials without a fall of the energy, beyond rounding, or of the gradient's norm, after which a sample breaks down: a
few steps where the searches labour, as they do at the level of rounding, and many where they do not."""


@final
@dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    """L-BFGS (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4) with a weak Wolfe line search per sample.

    The search stops after ``trials`` evaluations at the latest. A sample for which it finds no decrease tries
    steepest descent once, then breaks down; so does one that has come to where rounding hides every decrease. On a
    constraint, directions are built from projected gradients and stay in the plane.

    Args:
        memory: how many past steps are used.
        trials: the most evaluations of one line search.
        preconditioner: an approximation of the Hessian with a cheap inverse, symmetric positive definite, in place of
            the multiple of the identity that the updates start from: a :class:`~torchimplicit.linear.ReferenceHessian`
            (made anew where a minimization takes long), any other
            :class:`~torchimplicit.linear.Preconditioner`, or a function :math:`v \\mapsto M^{-1}v`. What it takes to
            make it is counted among the evaluations.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.
    """

    memory: int = 10
    trials: int = 20
    max_steps: int = 500
    searches: ClassVar[bool] = True
    preconditioner: Preconditioner | Callable[[Tensor], Tensor] | None = None

    def check(self) -> None:
        as_preconditioner(self.preconditioner)
        check_count(self, "memory")
        check_count(self, "trials")

    def supports(self, system: System) -> None:
        only_minimum(self, system)

    def wants_product(self) -> bool:
        return self.preconditioner is None or super().wants_product()

    def start(self, point: Point) -> LBFGSState:
        like = point.z
        empty = History.empty(like, self.memory)
        rho = empty.ring.new_zeros(like.shape[0], self.memory)
        norm = row_norm(point.residual)
        gamma = first_length(point, norm).to(rho.dtype)[:, None]
        assert point.energy is not None
        idle = torch.zeros_like(norm, dtype=torch.int64)
        return LBFGSState(empty, History.empty(like, self.memory), rho, gamma, point.energy, norm, idle, 0)

    def step(self, evaluate: Evaluator, point: Point, state: LBFGSState, progress: Progress) -> Move:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(
                "Unrolled cannot differentiate through LBFGS, whose line search branches on the data: use Implicit or "
                "EquilibriumPropagation, or unroll GradientDescent"
            )
        state = self._prepared(evaluate, point, state)
        direction = self._direction(point.residual, state)
        found = search(evaluate, point, direction, progress.active, self.trials)
        stuck = found.failed
        if not found.any_failed:
            state = self._remember(state, point, found.point, found.trials)
            return Move(found.point, state, breakdown=state.idle >= PATIENCE)
        # the model of the Hessian may be at fault: forget it, and try the gradient itself
        state = state._replace(rho=state.rho * (~stuck)[:, None])
        again = search(evaluate, found.point, self._direction(point.residual, state), stuck, self.trials)
        lost = stuck & again.failed
        # a sample that met nothing but NaN and infinity is shown them, so that it counts as non-finite
        to = again.last.select(lost & ~torch.isfinite(row_norm(again.last.residual)), again.point)
        state = self._remember(state, point, again.point, found.trials + again.trials)
        return Move(to, state, breakdown=lost | (state.idle >= PATIENCE))

    def _prepared(self, evaluate: Evaluator, point: Point, state: LBFGSState) -> LBFGSState:
        """With the model of the Hessian, made here if there is none or if it has served too long."""
        given = as_preconditioner(self.preconditioner)
        if given is None:
            return state
        stale = given.outlived(state.aged)
        if state.model is not None and not stale:
            return state._replace(aged=state.aged + 1)
        if stale:
            given.refresh()
        rows = point.z.shape[0]
        operator = evaluate.system.operator(evaluate.system.linearize(point.z, evaluate.params), False)
        model = given.prepare(operator, definite=True)
        evaluate.rows_evaluated += rows + model.setup_rows
        if operator.null is not None:
            model = model.orthogonal_to(operator.null.expand(rows, -1))
        # what was remembered belongs to the model before
        return state._replace(model=model, aged=1, rho=torch.zeros_like(state.rho), gamma=torch.ones_like(state.gamma))

    def _direction(self, residual: Tensor, state: LBFGSState) -> Tensor:
        """The two-loop recursion applied to minus the gradient."""
        q = residual.to(state.rho.dtype)
        order = [(state.seen - 1 - i) % self.memory for i in range(state.s.filled)]
        weights = []
        for slot in order:
            weight = state.rho[:, slot, None] * (state.s.ring[:, slot] * q).sum(dim=1, keepdim=True)
            q = torch.addcmul(q, weight, state.y.ring[:, slot], value=-1)
            weights.append(weight)
        q = (q if state.model is None else state.model.inverse(q)) * state.gamma
        for slot, weight in zip(reversed(order), reversed(weights), strict=True):
            lift = state.rho[:, slot, None] * (state.y.ring[:, slot] * q).sum(dim=1, keepdim=True)
            q = torch.addcmul(q, weight - lift, state.s.ring[:, slot])
        return q.to(residual.dtype)

    def _remember(self, state: LBFGSState, before: Point, after: Point, trials: Tensor) -> LBFGSState:
        slot = state.seen % self.memory
        s = (after.z - before.z).to(state.rho.dtype)
        y = (before.residual - after.residual).to(state.rho.dtype)
        sy, yy, ss = torch.stack((s * y, y * y, s * s)).sum(dim=2)
        # a pair without positive curvature would spoil the model: keep it out
        kept = sy > 1e-10 * yy.sqrt() * ss.sqrt()
        kept = kept & torch.isfinite(sy + yy)
        rho = state.rho.clone()
        rho[:, slot] = torch.where(kept, 1 / torch.where(kept, sy, 1), 0)
        size = yy if state.model is None else (y * state.model.inverse(y)).sum(dim=1)
        gamma = torch.where(kept, sy / torch.where(kept, size, 1), state.gamma[:, 0])[:, None]
        clean = kept[:, None]
        history = state.s.put(slot, torch.where(clean, s, 0)), state.y.put(slot, torch.where(clean, y, 0))
        assert after.energy is not None
        norm = row_norm(after.residual)
        rounding = 4 * torch.finfo(norm.dtype).eps * state.lowest.abs()
        fell = (after.energy < state.lowest - rounding) | (norm < 0.9 * state.least)
        return LBFGSState(
            *history,
            rho,
            gamma,
            lowest=torch.minimum(after.energy, state.lowest),
            least=torch.minimum(norm, state.least),
            idle=torch.where(fell, 0, state.idle + trials),
            seen=state.seen + 1,
            model=state.model,
            aged=state.aged,
        )


def first_length(point: Point, norm: Tensor) -> Tensor:
    """How many gradients the first trial moves by, ``[batch]``: to the minimum of the quadratic model along the
    gradient, in the units of the problem, one product with the Hessian tells. Where the energy is linear there is no
    such length, and a move by the size of the state, or by one unit, is as good as any other."""
    unit = 1 / torch.where(norm > 0, norm, 1)
    if point.product is None:
        return unit.clamp_max(1)
    r = point.residual.to(norm.dtype)
    curvature = torch.linalg.vecdot(r * unit[:, None], point.product.to(norm.dtype) * unit[:, None]).abs()
    size = row_norm(point.z)
    length = torch.where(size > 0, size, 1) * unit
    return torch.where((curvature > 0) & (curvature < torch.inf), 1 / curvature, length)
