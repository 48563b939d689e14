"""One solve as compiled code: found before it starts, and run in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.captured.adjoint import Adjoint
from torchimplicit.captured.forward import Forward
from torchimplicit.captured.program import Bound, Plan, bind, tell, training
from torchimplicit.captured.steps import step_of
from torchimplicit.closure import is_transformed, transforms_running, watched
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import AutocastState, at_precision
from torchimplicit.problems import FixedPoint, Minimum, Problem, Root, System
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import GradientDescent, Outcome, Solver
from torchimplicit.solvers.base import Evaluator
from torchimplicit.solvers.iterate import as_one, reviewed
from torchimplicit.state import Layout


class Backward(NamedTuple):
    """The cotangents of the parameters, and the figures of the solve that gave them."""

    grads: tuple[Tensor | None, ...]
    report: Report


@dataclass(frozen=True)
class Capture:
    """The compiled loops of one solve."""

    bound: Bound

    @property
    def pulls(self) -> bool:
        """Whether the backward pass is compiled."""
        return self.bound.artifact.adjoint is not None

    def solve(self, solver: Solver, system: System, z0: Tensor, params: Sequence[Tensor]) -> Outcome | None:
        """The forward solve; ``None`` where it is not the one that was compiled. Reads from the device once. Where
        samples are not solved beyond doubt, the eager loop goes on with ``system``."""
        inputs = self.bound.inputs_at((z0, *params), params)
        if inputs is None or as_one(solver, system):
            return None
        given = self.bound.artifact.forward(z0.contiguous(), *inputs)
        found = Forward._make((*given[:7], tuple(given[7:])))
        count, unsure = found.figures.tolist()
        report = Report(found.status, found.steps, found.residual, 1.0 + count)
        outcome = Outcome(found.z, report, norm=found.norm, parts=found.parts)
        if not unsure:
            return outcome
        spent = bool((found.status == Status.MAX_STEPS).any())
        return reviewed(solver, Evaluator(system, params), outcome, found.judge(solver, system), True, spent)

    def pull(self, u: Tensor, z: Tensor, params: Sequence[Tensor], wanted: Sequence[bool]) -> Backward | None:
        """The adjoint solve at ``z``, and what it gives the wanted parameters. ``None`` where it was not compiled, or
        where some sample is not solved beyond doubt: the eager path says then what there is to say. Reads from the
        device once."""
        artifact = self.bound.artifact
        inputs = None if artifact.adjoint is None else self.bound.inputs_at((u, z, *params), params)
        if inputs is None or u.shape != z.shape or artifact.adjoint is None:
            return None
        u = u.contiguous()
        sound, steps, residual, condition, count, *grads = artifact.adjoint(z.contiguous(), u, *inputs)
        found: dict[int | None, Tensor] = {}
        pulled = iter(grads)
        for source, asked in zip(self.bound.sources, artifact.wanted, strict=True):
            if asked:
                found[source] = next(pulled)
        unknown = {source for source in self.bound.sources if source is not None} - found.keys()
        if any(w and i in unknown for i, w in enumerate(wanted)) or not bool(sound):
            return None
        cotangents = tuple(
            (found[i] if i in found else torch.zeros_like(p)) if w else None
            for i, (p, w) in enumerate(zip(params, wanted, strict=True))
        )
        status = torch.full_like(steps, int(Status.CONVERGED))
        return Backward(cotangents, Report(status, steps, residual, float(count), condition=condition))


class Capturing:
    """What ``compile=True`` asks for, of one solve.

    Args:
        problem, args: what is solved.
        solver: how.
        linear_solver: of the adjoint system, where ``adjoint``.
        adjoint: whether the backward pass is to be compiled as well.
        refusal: why nothing of this solve can be captured, where the estimator does not allow it.

    Attributes:
        capture: the compiled loops, once :meth:`tensors` has found them.
    """

    def __init__(
        self,
        problem: Problem,
        args: tuple[Any, ...],
        solver: Solver,
        linear_solver: LinearSolver | None,
        adjoint: bool,
        refusal: str | None,
    ):
        self.problem, self.args, self.solver = problem, args, solver
        self.linear_solver, self.adjoint, self.refusal = linear_solver, adjoint, refusal
        self.capture: Capture | None = None

    def tensors(self, layout: Layout, flat: Tensor) -> tuple[Tensor, ...] | None:
        """The tensors that the problem's function captures and that require grad; ``None`` where the solve is not
        captured."""
        tensors = [t for t in pytree.tree_leaves(self.args) if isinstance(t, Tensor)]
        if transforms_running() or watched() or any(is_transformed(t) for t in (flat, *tensors)):
            return None  # compiled code sees none of them
        refusal = self.refusal or self._refusal(layout, flat)
        if refusal is not None:
            tell(self.problem, refusal)
            return None
        lower = AutocastState(layout.device).dtype
        adjoint = None
        if self.adjoint:
            adjoint = Adjoint.of(self.linear_solver, self.solver, self.problem, layout.dim, lower or layout.dtype)
            if adjoint is None and torch.is_grad_enabled():
                tell(self.problem, f"its backward pass alone: {type(self.linear_solver).__name__} is not compiled")
        plan = Plan(
            type(self.problem),
            layout,
            at_precision(self.solver, lower),
            adjoint,
            tuple(t.requires_grad for t in tensors),
            self.problem.batched and len(flat) > 1,
            training(self.problem.function),
            lower,
        )
        bound = bind(self.problem, plan, torch.is_grad_enabled(), flat, self.args)
        if bound is None:
            return None
        self.capture = Capture(bound)
        return bound.captured

    def _refusal(self, layout: Layout, flat: Tensor) -> str | None:
        if not isinstance(self.problem, FixedPoint | Root | Minimum):
            return f"{type(self.problem).__name__} is not compiled, FixedPoint, Root and Minimum are"
        if isinstance(self.problem, Minimum) and (self.problem.constraint is not None or layout.chart is not None):
            return "a Minimum with a constraint or a metric is not compiled"
        if step_of(self.solver) is None:
            return f"{type(self.solver).__name__} is not compiled, Anderson, Broyden and plain iteration are"
        if isinstance(self.solver, GradientDescent) and not isinstance(self.problem, Minimum):
            return "its solver does not suit it"  # which is said elsewhere
        if self.solver.keep_trajectory or self.solver.keep_trace:
            return "keep_trajectory=True and keep_trace=True keep what compiled code does not"
        if self.solver.steps is not None or self.solver.return_last:
            return "a solver with steps=... or return_last=True is not compiled"
        if not flat.numel():
            return "the batch is empty"
        if layout.complex:
            return "the state is complex"
        if layout.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"the state is {layout.dtype}"
        return None
