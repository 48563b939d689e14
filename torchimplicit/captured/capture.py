"""One solve as compiled code: found before it starts, and run in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from torchimplicit.captured.adjoint import Adjoint
from torchimplicit.captured.continued import Continuation
from torchimplicit.captured.forward import Forward
from torchimplicit.captured.methods import refusal
from torchimplicit.captured.program import Bound, Plan, bind, compiling, tell, training
from torchimplicit.closure import is_transformed, transforms_running, watched
from torchimplicit.coupling import Coupling
from torchimplicit.linear import LinearSolver
from torchimplicit.precision import AutocastState, at_precision
from torchimplicit.problems import FixedPoint, JointInference, Minimum, Problem, Root, System
from torchimplicit.solution import Report, Status
from torchimplicit.solvers import Solver, SolverResult
from torchimplicit.solvers.base import Evaluator
from torchimplicit.solvers.iterate import as_one, iterate, reviewed
from torchimplicit.solvers.magnitude import examined, first_units
from torchimplicit.solvers.review import after
from torchimplicit.state import Layout

Grads = tuple[Tensor | None, ...]


class Backward(NamedTuple):
    """The cotangents of the parameters, and the figures of the solve that gave them."""

    grads: Grads
    report: Report


@dataclass(frozen=True)
class Capture:
    """The compiled loops of one solve.

    Attributes:
        estimates: how many terms stand for the inverse in the backward pass; ``None`` where a system is solved.
    """

    bound: Bound
    estimates: int | None = None

    @property
    def pulls(self) -> bool:
        """Whether the backward pass is compiled, so that it needs nothing of the forward pass."""
        return self.bound.artifact.adjoint is not None

    @property
    def goes_on(self) -> bool:
        """Whether there are compiled steps from the solution."""
        return self.bound.artifact.continued is not None

    def solve(self, solver: Solver, system: System, z0: Tensor, params: Sequence[Tensor]) -> SolverResult | None:
        """The forward solve; ``None`` where it is not the one that was compiled. Reads from the device once. Where
        samples are not solved beyond doubt, the eager loop goes on with ``system``."""
        inputs = self.bound.inputs_at((z0, *params), params)
        if inputs is None:
            return None
        artifact = self.bound.artifact
        outputs = artifact.run("", artifact.forward, z0.contiguous(), *inputs)
        if outputs is None:
            return None
        forward = Forward._make((*outputs[:7], tuple(outputs[7:])))
        if solver.steps is not None:
            report = Report(forward.status, forward.steps, forward.residual, float(solver.steps))
            return SolverResult(forward.z, report, norm=forward.norm if solver.steps else None, parts=forward.parts)
        count, unsure, extreme = forward.figures.tolist()
        first = system.at(z0, params) if extreme else None
        if first is not None and first_units(system, first, params) is not None:
            return iterate(solver, system, z0, params)  # in these units; compiled code's squares over- or underflow
        report = Report(forward.status, forward.steps, forward.residual, 1.0 + count)
        outcome = SolverResult(forward.z, report, norm=forward.norm, parts=forward.parts)
        if not (unsure or extreme):
            return outcome
        if unsure:
            if solver.by_products:
                outcome = _gone_on(solver, system, outcome, params)
            spent = bool((forward.status == Status.MAX_STEPS).any())
            evaluate, judge = Evaluator(system, params), forward.judge(solver, system)
            outcome = reviewed(solver, evaluate, outcome, judge, True, spent)
        if first is not None:
            judge = forward.judge(solver, system, first)
            outcome = examined(iterate, outcome, judge, solver, system, params)
        return outcome

    def pull(self, u: Tensor, z: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Backward | None:
        """The adjoint solve at ``z``, and what it gives the wanted parameters. ``None`` where it was not compiled, or
        where some sample is not solved beyond doubt: the eager path says then what there is to say. Reads from the
        device once."""
        artifact = self.bound.artifact
        inputs = None if artifact.adjoint is None else self.bound.inputs_at((u, z, *params), params)
        if inputs is None or u.shape != z.shape or artifact.adjoint is None:
            return None
        z, u = z.contiguous(), u.contiguous()
        for slow in (False, True):
            if slow < artifact.slow:
                continue
            what = "its backward pass, where the adjoint series is slow: " if slow else "its backward pass: "
            outputs = artifact.run(what, artifact.adjoint_by(slow), z, u, *inputs)
            if outputs is None:
                return None
            sound, status, steps, residual, condition, count, *grads = outputs
            cotangents = self._sorted(grads, params, needs_grad)
            if cotangents is None:
                return None
            if bool(sound):
                artifact.slow = slow
                known = condition if self.estimates is None else None
                return Backward(cotangents, Report(status, steps, residual, float(count), condition=known))
        return None

    def go_on(self, h: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[Any, ...]] | None:
        """Where the compiled steps lead from ``h``, the norms of the residual and the relative ones there, and what
        :meth:`come_back` needs besides; ``None`` where the parameters are not those that were bound, or where the
        compiled code has raised."""
        artifact = self.bound.artifact
        inputs = self.bound.inputs_at((h, *params), params)
        if inputs is None or artifact.continued is None:
            return None
        outputs = artifact.run("the steps of its estimate: ", artifact.continued.forward, h.contiguous(), *inputs)
        if outputs is None:
            return None
        out, figures, *intermediates = outputs
        return out, figures, tuple(intermediates)

    def come_back(
        self, u: Tensor, h: Tensor, params: Sequence[Tensor], intermediates: Sequence[Any], needs_grad: Sequence[bool]
    ) -> Grads | None:
        """The cotangents of the wanted parameters, of ``u`` at the end of the compiled steps from ``h``."""
        artifact = self.bound.artifact
        inputs = self.bound.inputs_at((u, h, *params), params)
        if inputs is None or artifact.continued is None:
            return None
        given = (u.contiguous(), h.contiguous(), *inputs, *intermediates)
        grads = artifact.run("its backward pass: ", artifact.continued.backward, *given)
        return None if grads is None else self._sorted(grads, params, needs_grad)

    def _sorted(self, grads: Sequence[Tensor], params: Sequence[Tensor], needs_grad: Sequence[bool]) -> Grads | None:
        """The gradients in the inputs as cotangents of the parameters; ``None`` where one is asked that is not among
        them."""
        by_source: dict[int | None, Tensor] = {}
        pulled = iter(grads)
        for source, asked in zip(self.bound.sources, self.bound.artifact.needs_grad, strict=True):
            if asked:
                by_source[source] = next(pulled)
        unknown = {source for source in self.bound.sources if source is not None} - by_source.keys()
        if any(w and i in unknown for i, w in enumerate(needs_grad)):
            return None
        return tuple(
            (by_source[i] if i in by_source else torch.zeros_like(p)) if w else None
            for i, (p, w) in enumerate(zip(params, needs_grad, strict=True))
        )


def _gone_on(solver: Solver, system: System, outcome: SolverResult, params: Sequence[Tensor]) -> SolverResult:
    """With samples that the compiled steps could not take further, taken further by the eager loop."""
    left = outcome.report.status == Status.BREAKDOWN
    if not bool(left.any()):
        return outcome
    steps = solver.max_steps - int(outcome.report.steps[left].amin())
    return after(outcome, iterate(replace(solver, max_steps=steps), system, outcome.z, params, only=left), left)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What is to be compiled of one solve.

    Attributes:
        solver: of the forward pass.
        linear_solver: of the adjoint system, where it is ``solved``; ``None``: what suits it.
        solved: whether the backward pass solves an adjoint system.
        estimate: what stands for it where it does not; ``None``: the eager path has the backward pass.
        continuation: steps from the solution that autograd is to see.
        refusal: why nothing can be captured.
    """

    solver: Solver
    linear_solver: LinearSolver | None = None
    solved: bool = False
    estimate: Adjoint | None = None
    continuation: Continuation | None = None
    refusal: str | None = None


class Capturing:
    """What ``compile=True`` asks for, of one solve.

    Args:
        problem, args: what is solved.
        passes: how.

    Attributes:
        capture: the compiled loops, once :meth:`tensors` has found them.
    """

    def __init__(self, problem: Problem, args: tuple[Any, ...], passes: Passes):
        self.problem, self.args, self.passes = problem, args, passes
        self.capture: Capture | None = None

    def tensors(self, layout: Layout, flat: Tensor) -> tuple[Tensor, ...] | None:
        """The tensors that the problem's function captures and that require grad; ``None`` where the solve is not
        captured."""
        tensors = [t for t in pytree.tree_leaves(self.args) if isinstance(t, Tensor)]
        if transforms_running() or watched() or any(is_transformed(t) for t in (flat, *tensors)):
            return None  # compiled code sees none of them
        passes = self.passes
        refusal = self._refusal(layout, flat)
        if refusal is not None:
            tell(refusal)
            return None
        if isinstance(self.problem, Minimum) and self.problem.constraint is not None and not passes.solved:
            # the multiplier's part of an estimate is no term of the projected series
            if torch.is_grad_enabled() and (passes.estimate or passes.continuation):
                tell("its backward pass alone: on a constraint, estimates are not compiled")
            passes = replace(passes, estimate=None, continuation=None)
        lower = AutocastState(layout.device).dtype
        adjoint = passes.estimate
        if passes.solved:
            low = lower or layout.dtype
            adjoint = Adjoint.of(passes.linear_solver, passes.solver, self.problem, layout.dim, low)
            if adjoint is None and torch.is_grad_enabled():
                tell(f"its backward pass alone: {type(passes.linear_solver).__name__} is not compiled")
        plan = Plan(
            _statement(self.problem),
            layout,
            at_precision(passes.solver, lower),
            adjoint,
            passes.continuation,
            tuple(t.requires_grad for t in tensors),
            self.problem.batched and len(flat) > 1,
            training(self.problem.function),
            lower,
        )
        with compiling:
            bound = bind(self.problem, plan, torch.is_grad_enabled(), flat, self.args)
        if bound is None:
            return None
        self.capture = Capture(bound, None if adjoint is None else adjoint.terms)
        return bound.captured

    def _refusal(self, layout: Layout, flat: Tensor) -> str | None:
        if self.problem.has_aux:
            return "compiled code returns nothing beside the state (has_aux=True)"
        if self.passes.refusal is not None:
            return self.passes.refusal
        if not isinstance(self.problem, FixedPoint | Root | Minimum | JointInference):
            return f"{type(self.problem).__name__} is not compiled"
        if isinstance(self.problem, JointInference):
            if callable(self.problem.step_size) and not isinstance(self.problem.step_size, Tensor):
                return "the step size follows a schedule, which is Python's"
            if self.passes.solver.steps is not None:
                return "a given number of steps of a JointInference is not compiled"
        solver, coupling = self.passes.solver, None
        if self.problem.batched:
            coupling = Coupling.of(self.problem.stated_by, len(flat), self.problem.rowwise)
        if solver.steps is None and as_one(solver, coupling):
            return f"its samples depend on each other, and {type(solver).__name__} solves them as one system"
        if layout.coordinates is not None:
            return "a Minimum with a metric, or whose constraint is eliminated, is not compiled"
        if isinstance(self.problem, Minimum) and self.problem.on_set:
            return "a Minimum on a constraint is not compiled, but for a single LinearEquality"
        refused = refusal(solver, self.problem, layout)
        if refused is not None:
            return refused
        if solver.keep_trajectory or solver.keep_trace:
            return "keep_trajectory=True and keep_trace=True keep what compiled code does not"
        if _has_any_global_hook():
            return "hooks of all modules (register_module_forward_hook, ...) are not seen by the compiler"
        if not flat.numel():
            return "the batch is empty"
        if layout.complex:
            return "the state is complex"
        if layout.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"the state is {layout.dtype}"
        return None


def _statement(problem: Problem) -> tuple[Any, ...]:
    """What tells problems apart that are stated by the same functions."""
    constraint = type(getattr(problem, "constraint", None))
    names = ("batched", "rowwise", "unpack", "damping", "normalized")
    return type(problem), constraint, *(getattr(problem, name, None) for name in names)
