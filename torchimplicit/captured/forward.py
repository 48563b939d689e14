"""The forward solve, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.captured.compiled import Compiled, compiled, traced_apart
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Evaluate, LoopResult, Rule, Way, run, steps
from torchimplicit.captured.methods import step_of
from torchimplicit.captured.steps import Step
from torchimplicit.problems import Point, System
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.solution import GROWTH_LIMIT, Status
from torchimplicit.solvers import Solver
from torchimplicit.solvers.given_steps import relative
from torchimplicit.solvers.joint_units import part_units
from torchimplicit.solvers.magnitude import extreme
from torchimplicit.solvers.result import worst
from torchimplicit.solvers.tolerance import Judge, by_leaf
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
        stated: Stated = graph.system
        units: _Units | None = None
        system, params = stated(inputs)
        if isinstance(system, JointSystem) and solver.mixes_parts:
            units = _Units.of(graph, system, params, z0, inputs)
            stated, inputs, z0 = units.stated, (*inputs, units.each), z0 / units.every
            system, params = stated(inputs)
        step, way = step_of(solver, graph, system, z0, inputs), _way(graph, stated, z0, inputs)
        first = way.at(z0, inputs)
        judge = Judge(system, first, solver.rtol, solver.atol if units is None else None)
        if units is not None and judge.floor is not None and solver.atol is not None:
            judge.floor = judge.floor + by_leaf(solver.atol, system, first.size(), "atol") / units.each
        first = judge.start(first)
        if judge.measure is not None and solver.wants_product():
            operator = system.operator(system.linearize(z0, params), False)
            first = judge.measure.product(first, operator.product(first.residual))
        rule = _rule_of(judge, first, solver, coupled)
        result, count, terms = run(step, way, first, rule, inputs, solver.max_steps, solver.return_last)
        parts, unsure = result.parts, result.status != Status.CONVERGED if coupled else None
        known: tuple[Tensor, ...] = (rule.judge.floor,) if rule.judge.floor is not None else terms[:2]
        if judge.measure is not None and not solver.by_products:
            parts, unsure, seen = _looked_at(
                rule.at(rule.constants(), rule.unit, terms), system, params, result, solver
            )
            if solver.searches:
                unsure = unsure | _odd(result, seen if coupled else None, system)
        elif solver.searches:
            unsure = _odd(result, way.at(result.z, inputs) if coupled else None, system)
            count = count + (count > 0) if coupled else count  # where no step was taken, it was the first one
        flag = torch.zeros_like(count) if unsure is None else unsure.any().long()
        odd = extreme(torch.where(parts > 0, result.size / parts, 0)).any()
        if judge.measure is not None:
            odd = odd | extreme(known[0]).any()
        z, size, residual = result.z, result.size, worst(parts)
        if units is not None:
            z, size, known = z * units.every, size * units.each, tuple(t * units.each for t in known)
            count = count + 2 * units.known
        figures = torch.stack((count, flag, odd.long()))
        return z, result.status, result.steps, residual, size, parts, figures, *known

    return compiled(solve, (graph.flat(), *graph.others))


def _compiled_steps(graph: Graph, solver: Solver, count: int) -> Compiled:
    """Likewise, of so many steps: what the last one leads to is not evaluated, as in
    :func:`~torchimplicit.solvers.given_steps.take_steps`."""

    def solve(z0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        step = step_of(solver, graph, system, z0, inputs)
        assert isinstance(step, Step)
        before, point, z = None, None, z0.clone()
        if count:
            evaluate = _evaluate(graph, graph.system, z0, inputs)
            first = evaluate(z0, inputs)
            if first.scale is None and solver.wants_product():
                operator = system.operator(system.linearize(z0, params), False)
                first = first.changed(product=operator.product(first.residual))
            before, point, z = steps(step, evaluate, first, inputs, count)
        parts = relative(system, point, before, z)
        status = torch.where(z.isfinite().all(dim=1), int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        norm = torch.zeros_like(parts) if point is None else point.size()
        residual = worst(parts)
        figures = torch.zeros(3, dtype=torch.int64, device=z.device)
        return z, status, torch.full_like(status, count), residual, norm, parts, figures

    return compiled(solve, (graph.flat(), *graph.others))


Stated = Callable[[Sequence[Any]], tuple[System, tuple[Tensor, ...]]]
"""The problem and its parameters, of the inputs of a graph but for the state: see :meth:`Graph.system`."""


class _Units(NamedTuple):
    """Those in which a joint problem is solved: see :mod:`torchimplicit.solvers.joint_units`.

    Attributes:
        stated: the problem in these units, of the graph's inputs and ``each``.
        each: of the parts, float64 ``[3]``; ``every``: of the state's entries, ``[dim]``.
        known: bool scalar; ones stand for units that are not known.
    """

    stated: Stated
    each: Tensor
    every: Tensor
    known: Tensor

    @staticmethod
    def of(graph: Graph, system: JointSystem, params: Sequence[Tensor], z0: Tensor, inputs: Any) -> _Units:
        """The units at the start ``z0``; takes two evaluations."""
        way = _way(graph, graph.system, z0, inputs)
        each = part_units(system, way.at(z0, inputs), params, lambda z: way.evaluate(z, inputs))
        known = ((each > 0) & (each < torch.inf)).all()
        each = torch.where(known, each, 1).double()
        sizes = (system.parts.z, system.parts.z, system.parts.x)
        every = torch.cat([unit.expand(size) for unit, size in zip(each.unbind(), sizes, strict=True)])

        def stated(inputs: Sequence[Any]) -> tuple[System, tuple[Tensor, ...]]:
            system, params = graph.system(inputs[:-1])
            assert isinstance(system, JointSystem)
            return system.in_part_units(*inputs[-1].unbind()), params

        return _Units(stated, each, every.to(z0.dtype), known)


def _way(graph: Graph, stated: Stated, z: Tensor, inputs: Any) -> Way:
    def place(z: Tensor, inputs: Any) -> Tensor:
        system, params = stated(inputs)
        return system.project(z, params)

    evaluate, (system, _) = _evaluate(graph, stated, z, inputs), stated(inputs)
    if isinstance(system, JointSystem):
        return Way(evaluate, None if system.set is None else place, system.refined)
    return Way(evaluate, place if isinstance(system, MinimumSystem) and system.hyperplane is not None else None)


def _evaluate(graph: Graph, stated: Stated, z: Tensor, inputs: Any) -> Evaluate:
    """An evaluation as the loop makes it; where that takes a gradient, autograd has to have run before the loop."""

    def at(z: Tensor, *inputs: Any) -> Point:
        system, params = stated(inputs)
        return system.at(z, params)

    if not graph.problem.by_gradient:
        return lambda z, inputs: at(z, *inputs)
    specs: list[Any] = []

    def values(z: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        known = {name: t for name, t in vars(at(z, *inputs)).items() if t is not None and name != "z"}
        tensors, spec = pytree.tree_flatten(known)
        specs[:] = [spec]
        return tuple(tensors)

    traced = traced_apart(values, (z, *inputs))
    return lambda z, inputs: Point(z, **pytree.tree_unflatten(list(traced(z, *inputs)), specs[0]))


def _looked_at(
    rule: Rule, system: System, params: Any, result: LoopResult, solver: Solver
) -> tuple[Tensor, Tensor, Point]:
    """What one product with the Jacobian tells of the solutions: their relative residuals, for which samples it does
    not confirm what was found, and the points."""
    tape = system.linearize(result.z, params)
    seen, operator = system.seen(tape), system.operator(tape, False)
    solved, _, parts = rule.judge.look(seen, operator, closely=False)
    denied = (result.status == Status.CONVERGED) & ~solved
    return (parts, denied, seen) if solver.wants_relative() else (result.parts, torch.zeros_like(denied), seen)


def _odd(result: LoopResult, point: Point | None, system: System) -> Tensor:
    """bool ``[batch]``: the samples that a searching solver has not solved, or whose residual at the ``point`` that all
    have come to is another than when they came to it, each at its own moment."""
    left = result.status != Status.CONVERGED
    if point is None:
        return left
    now = system.norms(point.residual)
    changed = (now - result.size).abs() > 1e-3 * result.size
    if point.scale is not None:
        changed = changed & ((now - result.size).abs() > 16 * torch.finfo(now.dtype).eps * point.scale)
    return left | (changed if changed.ndim == 1 else changed.any(dim=1))


def _rule_of(judge: Judge, first: Point, solver: Solver, coupled: bool) -> Rule:
    size, reach = first.size(), first.growth_norm()
    if first.judgement is not None:
        whole = reach + row_norm(first.z)
    elif judge.measure is None:
        assert first.scale is not None
        whole = reach + (first.scale if first.scale.ndim == 1 else row_norm(first.scale))
    else:
        whole = 2 * reach
    limit = GROWTH_LIMIT * whole.nan_to_num(nan=-1.0, posinf=-1.0)
    if solver.searches and first.energy is not None:
        # the energy falls in every step, and from beside a saddle that leads to where gradients are steep
        limit = limit * GROWTH_LIMIT**2
    limit = torch.where(limit == 0, torch.inf, limit)  # a start at the solution, which others may move
    tiny = torch.finfo(size.dtype).tiny
    unit = () if size.ndim == 1 else torch.where((size > 0) & (size < torch.inf), size, tiny)
    return Rule(judge, limit, unit, coupled and not solver.searches)
