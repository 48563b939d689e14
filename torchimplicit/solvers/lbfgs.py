"""Limited-memory BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.constraints import project
from torchimplicit.linear import LinearOperator, Preconditioner, PreparedPreconditioner
from torchimplicit.linear.preconditioners import as_preconditioner
from torchimplicit.precision import safe_norm, widened, working_dtype
from torchimplicit.problems import Point, System
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.gradient_descent import only_minimum
from torchimplicit.solvers.history import History
from torchimplicit.solvers.line_search import search, showing_nonfinite
from torchimplicit.state import row_norm
from torchimplicit.validation import check_count


class LeafUnits(NamedTuple):
    """The lengths in units of which steps are kept, and of whose inverse gradients are: then a leaf that is stated in
    another unit takes the same steps.

    Attributes:
        length: ``[batch, dim]``.
        normal: ``[batch, dim]``, the unit normal of the plane that steps stay in, in those units; ``None`` for none.
    """

    length: Tensor
    normal: Tensor | None

    @classmethod
    def of(cls, operator: LinearOperator, point: Point, sizes: tuple[int, ...]) -> LeafUnits:
        """Lengths over which the gradient of a leaf would change by one, were it alone: by one product of the Hessian
        ``operator`` per leaf of these ``sizes``, along the gradient, or along ones where that is zero.

        The square of a length is the first one of :func:`first_length`, leaf by leaf."""
        dtype, units = working_dtype(point.z.dtype), []
        hessian = operator.unprojected or operator
        residuals = point.residual.split(sizes, dim=1)
        for leaf, (r, z) in enumerate(zip(residuals, point.z.split(sizes, dim=1), strict=True)):
            norm, size = (safe_norm(widened(v))[:, None] for v in (r, z))
            still = ~((norm > 0) & (norm < torch.inf))
            probe = torch.where(still, 1, widened(r) / torch.where(still, 1, norm)).to(r.dtype)
            alone = [probe if i == leaf else torch.zeros_like(other) for i, other in enumerate(residuals)]
            image = hessian.product(torch.cat(alone, dim=1)).split(sizes, dim=1)[leaf]
            curvature = safe_norm(widened(image))[:, None] / safe_norm(widened(probe))[:, None]
            linear = torch.where(size > 0, size, 1) / torch.where(still, 1, norm)
            square = torch.where((curvature > 0) & (curvature < torch.inf), 1 / curvature, linear)
            units.append(square.sqrt().to(dtype).expand(r.shape))
        length = torch.cat(units, dim=1)
        normal = None if operator.null is None else torch.nn.functional.normalize(operator.null * length, dim=1)
        return cls(length, normal)

    def of_gradient(self, v: Tensor) -> Tensor:
        v = v * self.length
        return v if self.normal is None else project(v, self.normal)


class LBFGSState(NamedTuple):
    """The model of the inverse Hessian, and what was reached so far.

    Attributes:
        s, y: past steps and the changes of the gradient along them, in ``units``.
        rho: ``[batch, memory]``, :math:`1/s^Ty`; zero for a slot that holds nothing.
        gamma: ``[batch, 1]``, the scale of the initial inverse Hessian.
        lowest, least: ``[batch]``, the smallest energy and the smallest gradient norm so far.
        idle: int ``[batch]``, the trials since either fell.
        seen: the number of pairs that were offered.
        model: multiplies by the initial inverse Hessian; ``None`` for a multiple of the identity.
        aged: number of steps since the model was made.
        units: of the leaves; ``None`` where the state is a single leaf, or the model takes their place.
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
    units: LeafUnits | None = None


MOST_LEAVES = 32
"""The most leaves that are each measured in a unit of their own, as this takes a product with the Hessian for each."""

PATIENCE = 60
"""A sample breaks down after this many trials in which neither the energy, beyond rounding, nor the gradient's norm
fell. It counts trials, not steps: at the level of rounding every search uses up many, and a few steps are enough."""


@final
@dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    """L-BFGS (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4) with a weak Wolfe line search per sample.

    A sample for which the search finds no decrease tries steepest descent once, then breaks down; so does one that has
    reached the level where rounding hides every decrease. On a linear equality, directions are built from projected
    gradients and stay in the plane. Where the state has several leaves (up to 32), each is measured in a unit of its
    own, from one product with the Hessian at the start.

    Args:
        memory: number of past steps that are used.
        trials: the most evaluations of one line search.
        preconditioner: a symmetric positive definite approximation of the Hessian with a cheap inverse, which replaces
            the multiple of the identity that the updates start from: a :class:`~torchimplicit.linear.ReferenceHessian`
            (made anew where a minimization takes long), any other
            :class:`~torchimplicit.linear.Preconditioner`, or a function :math:`v \\mapsto M^{-1}v`. The evaluations
            that set it up are counted.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        ValueError: a number is out of range.
        TypeError: the preconditioner is not one.
    """

    memory: int = 10
    trials: int = 20
    max_steps: int = 500
    searches: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit or EquilibriumPropagation, or unroll GradientDescent"
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
        state = self._prepared(evaluate, point, state)
        direction = self._direction(point.residual, state)
        searched = search(evaluate, point, direction, progress.active, self.trials)
        stuck = searched.failed
        if not searched.any_failed:
            state = self._remember(state, point, searched.point, searched.trials)
            return Move(searched.point, state, breakdown=state.idle >= PATIENCE)
        # the model of the Hessian may be at fault: forget it, and try the gradient itself
        state = state._replace(rho=state.rho * (~stuck)[:, None])
        again = search(evaluate, searched.point, self._direction(point.residual, state), stuck, self.trials)
        lost = stuck & again.failed
        to = showing_nonfinite(again.last, lost, again.point)
        state = self._remember(state, point, again.point, searched.trials + again.trials)
        return Move(to, state, breakdown=lost | (state.idle >= PATIENCE))

    def _prepared(self, evaluate: Evaluator, point: Point, state: LBFGSState) -> LBFGSState:
        """``state`` with a model of the Hessian, made here if there is none or if it has served too long."""
        preconditioner = as_preconditioner(self.preconditioner)
        if preconditioner is None:
            return self._with_units(evaluate, point, state)
        stale = preconditioner.outlived(state.aged)
        if state.model is not None and not stale:
            return state._replace(aged=state.aged + 1)
        if stale:
            preconditioner.refresh()
        rows = point.z.shape[0]
        operator = evaluate.system.operator(evaluate.system.linearize(point.z, evaluate.params), False)
        model = preconditioner.prepare(operator, definite=True)
        evaluate.rows_evaluated += rows + model.setup_rows
        if operator.null is not None:
            model = model.orthogonal_to(operator.null.expand(rows, -1))
        # the pairs correct the model that they were collected with: they say nothing about the new one
        return state._replace(model=model, aged=1, rho=torch.zeros_like(state.rho), gamma=torch.ones_like(state.gamma))

    @staticmethod
    def _with_units(evaluate: Evaluator, point: Point, state: LBFGSState) -> LBFGSState:
        """``state`` in units of the leaves where there are several, at the first step; as it is where the user's
        function lacks second derivatives."""
        system = evaluate.system
        if state.seen or system.separate is None or len(system.separate.sizes) > MOST_LEAVES:
            return state
        sizes = system.separate.sizes
        try:
            units = LeafUnits.of(system.operator(system.linearize(point.z, evaluate.params), False), point, sizes)
        except RuntimeError:
            return state
        evaluate.rows_evaluated += point.z.shape[0] * (1 + len(sizes))
        least = row_norm(units.of_gradient(widened(point.residual)))
        return state._replace(units=units, gamma=torch.ones_like(state.gamma), least=least)

    def _direction(self, residual: Tensor, state: LBFGSState) -> Tensor:
        """The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4) applied to minus the gradient."""
        q, units = residual.to(state.rho.dtype), state.units
        q = q if units is None else units.of_gradient(q)
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
        return (q if units is None else q * units.length).to(residual.dtype)

    def _remember(self, state: LBFGSState, before: Point, after: Point, trials: Tensor) -> LBFGSState:
        slot = state.seen % self.memory
        s = (after.z - before.z).to(state.rho.dtype)
        y = (before.residual - after.residual).to(state.rho.dtype)
        r, units = after.residual, state.units
        if units is not None:
            s, y, r = s / units.length, units.of_gradient(y), units.of_gradient(widened(r))
        sy, yy, ss = torch.stack((s * y, y * y, s * s)).sum(dim=2)
        # The model stays positive definite only with pairs of positive curvature. The approximate Wolfe conditions do
        # not guarantee it at the level of rounding.
        kept = sy > 1e-10 * yy.sqrt() * ss.sqrt()
        kept = kept & torch.isfinite(sy + yy)
        rho = state.rho.clone()
        rho[:, slot] = torch.where(kept, 1 / torch.where(kept, sy, 1), 0)
        # scale the initial inverse Hessian to the curvature met last (Nocedal and Wright 2006, eq. 7.20)
        size = yy if state.model is None else (y * state.model.inverse(y)).sum(dim=1)
        gamma = torch.where(kept, sy / torch.where(kept, size, 1), state.gamma[:, 0])[:, None]
        clean = kept[:, None]
        history = state.s.put(slot, torch.where(clean, s, 0)), state.y.put(slot, torch.where(clean, y, 0))
        assert after.energy is not None
        norm = row_norm(r)
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
            units=units,
        )


def first_length(point: Point, norm: Tensor) -> Tensor:
    """The length of the first trial in multiples of the gradient, ``[batch]``.

    It leads to the minimum of the quadratic model along the gradient, whose curvature comes from the product of the
    Hessian with the gradient (``point.product``). Where the energy is linear, it moves by the size of the state, or by
    one unit from a state of zero; where there is no product, by one unit at most.

    Args:
        point: the first point.
        norm: the norm of its gradient, ``[batch]``.
    """
    unit = 1 / torch.where(norm > 0, norm, 1)
    if point.product is None:
        return unit.clamp_max(1)
    r = point.residual.to(norm.dtype)
    curvature = torch.linalg.vecdot(r * unit[:, None], point.product.to(norm.dtype) * unit[:, None]).abs()
    size = row_norm(point.z)
    length = torch.where(size > 0, size, 1) * unit
    return torch.where((curvature > 0) & (curvature < torch.inf), 1 / curvature, length)
