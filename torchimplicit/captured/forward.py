"""The forward solve, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit.captured.compiled import Compiled, compiled, traced_apart
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Evaluate, Found, Rule, Way, run, steps
from torchimplicit.captured.steps import step_of
from torchimplicit.problems import Point, System
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.solution import GROWTH_LIMIT, Status
from torchimplicit.solvers import Solver
from torchimplicit.solvers.given_steps import relative
from torchimplicit.solvers.magnitude import extreme
from torchimplicit.solvers.tolerance import Judge
from torchimplicit.state import row_norm


class Forward(NamedTuple):
    """What the compiled forward solve gives.

    Attributes:
        z, status, steps, residual, norm, parts: as an outcome of the solvers' loop and its report have them.
        figures: int64 ``[3]``, the number of steps, whether the eager loop has to look at the outcome (some sample is
            not solved, or is not by the Jacobian, or depends on others), and whether its numbers are extreme. A given
            number of steps has none.
        known: what the rule by which samples were judged knows: the floor of the tolerance where points tell the terms
            of their residuals; elsewhere the size that the state had, and the most that it counts.
    """

    z: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    norm: Tensor
    parts: Tensor
    figures: Tensor
    known: tuple[Tensor, ...]

    def judge(self, solver: Solver, system: System, first: Point | None = None) -> Judge:
        """The rule by which samples were judged.

        Args:
            first: the first point, where it matters what it was.
        """
        if first is None:
            scale = self.norm if len(self.known) == 1 else None
            first = Point(self.z, self.z, scale=scale, error=scale)
        judge = Judge(system, first, solver.rtol, solver.atol)
        judge.start(first)
        if judge.measure is None:
            (judge.floor,) = self.known
        else:
            judge.measure.recent, judge.measure.most = self.known
        return judge


def compiled_forward(graph: Graph, solver: Solver) -> Compiled:
    """``(z0, *inputs) -> Forward``, as a flat tuple."""
    if solver.steps is not None:
        return _compiled_steps(graph, solver, solver.steps)
    coupled = graph.problem.batched and not graph.problem.rowwise

    def solve(z0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        step = step_of(solver, system.separate)
        assert step is not None
        way = _way(graph, system, z0, inputs)
        first = way.evaluate(z0 if way.place is None else way.place(z0, inputs), inputs)
        judge = Judge(system, first, solver.rtol, solver.atol)
        first = judge.start(first)
        if judge.measure is not None and solver.wants_product():
            operator = system.operator(system.linearize(z0, params), False)
            first = judge.measure.product(first, operator.product(first.residual))
        rule = _rule_of(judge, first, coupled)
        found, count, terms = run(step, way, first, rule, inputs, solver.max_steps, solver.return_last)
        parts, unsure = found.parts, found.status != Status.CONVERGED if coupled else None
        known: tuple[Tensor, ...] = (rule.judge.floor,) if rule.judge.floor is not None else terms[:2]
        if judge.measure is not None:
            parts, unsure = _looked_at(rule.at(rule.constants(), terms), system, params, found, solver)
        flag = torch.zeros_like(count) if unsure is None else unsure.any().long()
        odd = extreme(torch.where(parts > 0, found.size / parts, 0)).any()
        if judge.measure is not None:
            odd = odd | extreme(known[0]).any()
        figures = torch.stack((count, flag, odd.long()))
        residual = parts if parts.ndim == 1 else parts.amax(dim=1)
        return found.z, found.status, found.steps, residual, found.size, parts, figures, *known

    return compiled(solve, (graph.flat(), *graph.others))


def _compiled_steps(graph: Graph, solver: Solver, count: int) -> Compiled:
    """Likewise, of so many steps: what the last one leads to is not evaluated, as in
    :func:`~torchimplicit.solvers.given_steps.take_steps`."""

    def solve(z0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        step = step_of(solver, system.separate)
        assert step is not None
        before, point, z = None, None, z0.clone()
        if count:
            evaluate = _evaluate(graph, z0, inputs)
            first = evaluate(z0, inputs)
            if first.scale is None and solver.wants_product():
                operator = system.operator(system.linearize(z0, params), False)
                first = first.changed(product=operator.product(first.residual))
            before, point, z = steps(step, evaluate, first, inputs, count)
        parts = relative(system, point, before, z)
        status = torch.where(z.isfinite().all(dim=1), int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        norm = torch.zeros_like(parts) if point is None else point.size()
        residual = parts if parts.ndim == 1 else parts.amax(dim=1)
        figures = torch.zeros(3, dtype=torch.int64, device=z.device)
        return z, status, torch.full_like(status, count), residual, norm, parts, figures

    return compiled(solve, (graph.flat(), *graph.others))


def _way(graph: Graph, system: System, z: Tensor, inputs: Any) -> Way:
    if not isinstance(system, JointSystem):
        return Way(_evaluate(graph, z, inputs))

    def place(z: Tensor, inputs: Any) -> Tensor:
        system, params = graph.system(inputs)
        return system.project(z, params)

    return Way(_evaluate(graph, z, inputs), None if system.set is None else place, system.compared)


def _evaluate(graph: Graph, z: Tensor, inputs: Any) -> Evaluate:
    """An evaluation as the loop makes it; where that takes a gradient, autograd has to have run before the loop."""

    def at(z: Tensor, *inputs: Any) -> Point:
        system, params = graph.system(inputs)
        return system.at(z, params)

    if not graph.problem.by_gradient:
        return lambda z, inputs: at(z, *inputs)
    names: list[str] = []

    def values(z: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found = {name: t for name, t in vars(at(z, *inputs)).items() if t is not None and name != "z"}
        names[:] = found
        return tuple(found.values())

    traced = traced_apart(values, (z, *inputs))
    return lambda z, inputs: Point(z, **dict(zip(names, traced(z, *inputs), strict=True)))


def _looked_at(rule: Rule, system: System, params: Any, found: Found, solver: Solver) -> tuple[Tensor, Tensor]:
    """What one product with the Jacobian tells of the solutions: their relative residuals, and for which samples it
    does not confirm what was found."""
    tape = system.linearize(found.z, params)
    seen, operator = system.seen(tape), system.operator(tape, False)
    solved, _, parts = rule.judge.look(seen, operator, closely=False)
    denied = (found.status == Status.CONVERGED) & ~solved
    return (parts, denied) if solver.wants_relative() else (found.parts, torch.zeros_like(denied))


def _rule_of(judge: Judge, first: Point, rejudges: bool) -> Rule:
    size, reach = first.size(), first.reach()
    if first.length is not None:
        whole = reach + row_norm(first.z)
    elif judge.measure is None:
        assert first.scale is not None
        whole = reach + (first.scale if first.scale.ndim == 1 else row_norm(first.scale))
    else:
        whole = 2 * reach
    limit = GROWTH_LIMIT * whole.nan_to_num(nan=-1.0, posinf=-1.0)
    limit = torch.where(limit == 0, torch.inf, limit)  # a start at the solution, which others may move
    unit = torch.where((size > 0) & (size < torch.inf), size, 1)
    return Rule(judge, limit, unit, rejudges)
