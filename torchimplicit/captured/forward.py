"""The forward solve, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.captured.compiled import Compiled, compiled
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Rule, run
from torchimplicit.captured.steps import step_of
from torchimplicit.problems import Point, System
from torchimplicit.solvers import Solver
from torchimplicit.solvers.iterate import GROWTH_LIMIT
from torchimplicit.solvers.tolerance import Judge
from torchimplicit.state import row_norm


def compiled_forward(graph: Graph, solver: Solver) -> Compiled:
    """``(z0, *inputs) -> (z, status, steps, residual, norm, count)``."""
    step = step_of(solver)
    assert step is not None

    def evaluate(z: Tensor, inputs: Any) -> Point:
        system, params = graph.system(inputs)
        return system.at(z, params)

    def solve(z0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        first = evaluate(z0, inputs)
        rule = rule_of(solver, graph.system(inputs)[0], first, graph.problem.batched and not graph.problem.rowwise)
        found, count = run(step, evaluate, first, rule, inputs, solver.max_steps)
        return found.z, found.status, found.steps, found.residual, found.size, count

    return compiled(solve, (graph.flat(), *graph.others))


def rule_of(solver: Solver, system: System, first: Point, rejudges: bool) -> Rule:
    """The rule of the solvers' loop, for a solve that starts at ``first``."""
    judge = Judge(system, first, solver.rtol, solver.atol)
    scale, size, reach = first.scale, first.size(), first.reach()
    assert scale is not None
    assert judge.floor is not None
    whole = reach + (scale if scale.ndim == 1 else row_norm(scale))
    limit = GROWTH_LIMIT * whole.nan_to_num(nan=-1.0, posinf=-1.0)
    unit = torch.where((size > 0) & (size < torch.inf), size, 1)
    return Rule(judge.floor, judge.rtol, limit, unit, rejudges)
