"""Which solvers have a compiled step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.captured.graph import Graph
from torchimplicit.captured.lbfgs import QuasiNewton
from torchimplicit.captured.linear import Parts
from torchimplicit.captured.newton import Inner, Newton
from torchimplicit.captured.steps import Accelerated, Heavy, Plain, Secants, Stepping
from torchimplicit.problems import JointInference, Minimum, Point, Problem, System
from torchimplicit.problems.image_system import ImageSystem
from torchimplicit.solvers import LBFGS, Anderson, Broyden, FixedPointIteration, GradientDescent, NewtonKrylov, Solver
from torchimplicit.solvers.lbfgs import MOST_LEAVES, LeafUnits
from torchimplicit.state import Layout


def refusal(solver: Solver, problem: Problem, layout: Layout) -> str | None:
    """Why the solve is not compiled; ``None`` where it is."""
    name = type(solver).__name__
    if not isinstance(solver, FixedPointIteration | Anderson | Broyden | GradientDescent | LBFGS | NewtonKrylov):
        return f"{name} is not compiled"
    if isinstance(solver, GradientDescent | LBFGS) and not isinstance(problem, Minimum):
        return "its solver does not suit it"  # which is said elsewhere
    if solver.searches and solver.steps is not None:
        return f"a given number of steps of {name} is not compiled"
    if isinstance(solver, LBFGS) and solver.preconditioner is not None:
        return "LBFGS with a preconditioner is not compiled"
    several = len(layout.leaves.sizes) > 1
    if isinstance(solver, LBFGS) and several and isinstance(problem, Minimum) and problem.constraint is not None:
        return "LBFGS on a constraint is not compiled where the state has several leaves"
    if isinstance(solver, NewtonKrylov):
        if isinstance(problem, JointInference):
            return "NewtonKrylov for a JointInference is not compiled"
        if isinstance(problem, Minimum) and problem.constraint is not None:
            return "NewtonKrylov on a constraint is not compiled, LBFGS is"
        if layout.dtype not in (torch.float32, torch.float64):
            return f"NewtonKrylov in {layout.dtype} is not compiled"
        if Inner.of(solver.linear_solver, problem, layout) is None:
            return f"NewtonKrylov with {type(solver.linear_solver).__name__} as given is not compiled"
    return None


def step_of(solver: Solver, graph: Graph, system: System, z: Tensor, inputs: Any) -> Stepping:
    """The compiled step of ``solver``, for loops whose constants are ``inputs``."""
    if isinstance(solver, FixedPointIteration):
        return Plain(solver.damping)
    if isinstance(solver, Anderson):
        mapped = system if isinstance(system, ImageSystem) else None
        return Accelerated(solver.memory, solver.damping, solver.regularization, solver.growth, mapped)
    if isinstance(solver, Broyden):
        return Secants(solver.memory)
    if isinstance(solver, GradientDescent):
        return Heavy(solver.step_size, solver.momentum)
    if isinstance(solver, LBFGS):
        separate = system.separate
        if separate is not None and len(separate.sizes) > MOST_LEAVES:
            separate = None

        def lengths(point: Point) -> Tensor:
            assert separate is not None
            params = graph.system(inputs)[1]
            return LeafUnits.of(system.operator(system.linearize(z, params), False), point, separate.sizes).length

        return QuasiNewton(solver.memory, solver.trials, None if separate is None else lengths)
    assert isinstance(solver, NewtonKrylov)
    inner = Inner.of(solver.linear_solver, graph.problem, graph.layout)
    assert inner is not None

    def products(v: Tensor, _: Tensor, z: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        return (system.operator(system.linearize(z, params), False).product(v),)

    parts = Parts.of(products, z, inputs)
    return Newton(solver, inner, parts.before, parts.product, isinstance(graph.problem, Minimum))
