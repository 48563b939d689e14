"""The forward solve, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.captured.compiled import Compiled, compiled
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Rule, run
from torchimplicit.captured.steps import step_of
from torchimplicit.problems import Point
from torchimplicit.solvers import Solver
from torchimplicit.solvers.iterate import GROWTH_LIMIT


def compiled_forward(graph: Graph, solver: Solver) -> Compiled:
    """``(z0, *inputs) -> (z, status, steps, residual, count)``."""
    step = step_of(solver)
    assert step is not None

    def evaluate(z: Tensor, inputs: Any) -> Point:
        system, params = graph.system(inputs)
        return system.at(z, params)

    def solve(z0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        first = evaluate(z0, inputs)
        found, count = run(step, evaluate, first, rule_of(solver, first), inputs, solver.max_steps)
        return found.z, found.status, found.steps, found.residual, count

    return compiled(solve, (graph.flat(), *graph.others))


def rule_of(solver: Solver, first: Point) -> Rule:
    """The rule of the solvers' loop, for a solve that starts at ``first``."""
    assert first.scale is not None
    size = first.size()
    whole = size + first.scale
    if solver.atol is not None:
        floor = torch.full_like(size, solver.atol)
    else:
        floor = 0.01 * torch.finfo(first.z.dtype).eps * whole
    limit = GROWTH_LIMIT * whole.nan_to_num(nan=-1.0, posinf=-1.0)
    return Rule(floor, solver.relative_tolerance(first.z.dtype), limit)
