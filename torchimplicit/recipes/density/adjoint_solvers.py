"""Solvers of the adjoint system: the slides' descent on its least-squares form beside Krylov methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from torchimplicit.linear import CG, LSMR, MINRES, Dense, HessianMemory, Jacobi, LinearOperator, LinearSolver
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.problems import Minimum
from torchimplicit.recipes.density.gradient_figures import TOLERANCE, Solved
from torchimplicit.recipes.density.optimum import Optimum
from torchimplicit.solution import Status

MOST = 2000
"""Largest number of steps of these solvers."""
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000)
"""Step counts at which errors are recorded."""
RATES = (1e-3, 1e-2, 1e-1)
"""Learning rates of Adam, relative to the largest entry of the solution. The best one is reported, which favours
Adam."""
TIMED = 15
"""Number of steps timed for methods that take more than this."""


@dataclass(frozen=True)
class Way:
    """A way to solve the adjoint system :math:`Ay=b`.

    Attributes:
        name: name to display.
        solver: a solver; or, on half the squared residual :math:`\\lVert Ay-b\\rVert^2/2`, optimizers of which the
            best is reported.
        products: how many a step takes.
        normal: solve the normal equations :math:`A^2y=Ab` instead.
    """

    name: str
    solver: LinearSolver | tuple[MakeOptimizer, ...]
    products: int = 1
    normal: bool = False

    def system(self, operator: LinearOperator, right: Tensor) -> tuple[LinearOperator, Tensor]:
        """The system that the solver is given."""
        return (_squared(operator), operator.product(right)) if self.normal else (operator, right)


MakeOptimizer = Callable[[Tensor, float, float], Optimizer]
"""Makes an optimizer of a tensor, given the largest entry of the solution and the largest eigenvalue of :math:`A`."""


def _descent(y: Tensor, largest_entry: float, largest_eigenvalue: float) -> Optimizer:
    """Gradient descent with the step :math:`1/\\lambda_{max}` of the Hessian :math:`A^2`."""
    return SGD([y], lr=largest_eigenvalue**-2)


def _adam(rate: float) -> MakeOptimizer:
    return lambda y, largest_entry, largest_eigenvalue: Adam([y], lr=rate * largest_entry)


def ways(reference: HessianMemory | None) -> list[Way]:
    """All solvers of the adjoint system.

    Args:
        reference: made by a minimization; ``None``: there is none in these coordinates.
    """
    common: dict[str, Any] = {"rtol": TOLERANCE, "max_steps": MOST}
    chosen = [
        Way("gradient descent, least squares", (_descent,), 2),
        Way("Adam, least squares", tuple(map(_adam, RATES)), 2),
        Way("CG, normal equations", CG(**common), 2, normal=True),
        Way("LSMR", LSMR(**common), 2),
        Way("CG", CG(**common)),
        Way("MINRES", MINRES(**common)),
        Way("CG, Jacobi", CG(preconditioner=Jacobi(), **common)),
        Way("MINRES, Jacobi", MINRES(preconditioner=Jacobi(), **common)),
    ]
    if reference is not None:
        chosen += [
            Way("CG, reference Hessian", CG(preconditioner=reference, **common)),
            Way("MINRES, reference Hessian", MINRES(preconditioner=reference, **common)),
        ]
    return [*chosen, Way("dense", Dense())]


def solved(optimum: Optimum, problem: Minimum, descent_steps: int, repeats: int) -> tuple[dict[str, Solved], float]:
    """Every solver in the coordinates of ``problem``, and the CPU seconds of one product.

    The errors are looked at with products of the assembled matrix, which are those of the energy to rounding; the times
    are of products of the energy.
    """
    operator, right = optimum.system(problem)
    assembled = _assembled(operator)
    values, vectors = torch.linalg.eigh(assembled.spectrum_matrix(torch.float64)[0])
    true = assembled.project(((right @ vectors) / values) @ vectors.T)
    largest = float(values.abs().max())
    reference = optimum.reference if problem.metric is not None else None
    every = ways(reference)
    by_way: dict[str, Solved] = {}
    timings: dict[str, Callable[[], float]] = {}
    for way in every:
        trace, status = _traced(way, assembled, right, true, largest, descent_steps)
        by_way[way.name] = Solved(trace[-1][0], 0.0, trace[-1][1], status, trace)
        timings[way.name] = _timed(way, operator, right, trace[-1][0])
    seconds: dict[str, list[float]] = {way.name: [] for way in every}
    product: list[float] = []
    for _ in range(repeats):
        for name, timing in timings.items():
            seconds[name].append(timing())
        began = time.process_time()
        for _ in range(10):
            operator.product(right)
        product.append((time.process_time() - began) / 10)
    for name, times in seconds.items():
        by_way[name] = replace(by_way[name], seconds=median(times))
    return by_way, median(product)


def _assembled(operator: LinearOperator) -> LinearOperator:
    """The operator as an assembled, symmetric matrix."""
    matrix = operator.dense()[0]
    matrix, inner = 0.5 * (matrix + matrix.T), operator.unprojected
    return _symmetric(operator, lambda v: v @ matrix, None if inner is None else _assembled(inner))


def _squared(operator: LinearOperator) -> LinearOperator:
    """:math:`A^2`."""
    return _symmetric(operator, lambda v: operator.product(operator.product(v)))


def _symmetric(
    like: LinearOperator, product: Callable[[Tensor], Tensor], unprojected: LinearOperator | None = None
) -> LinearOperator:
    return replace(
        like,
        product=product,
        transposed_product=product,
        block_product=None,
        restrict=None,
        symmetric=True,
        unprojected=unprojected,
    )


def _traced(
    way: Way, operator: LinearOperator, right: Tensor, true: Tensor, largest: float, descent_steps: int
) -> tuple[list[list[float]], str]:
    """Pairs of products and error, and the final status."""

    def error(y: Tensor) -> float:
        return float((y - true).norm() / true.norm())

    if isinstance(way.solver, tuple):
        looks = [step for step in STEPS if step < descent_steps] + [descent_steps]
        ys = [torch.zeros_like(right) for _ in way.solver]
        traces = [one(y, float(true.abs().max()), largest) for one, y in zip(way.solver, ys, strict=True)]
        errors = [
            [error(y) for _ in _followed(optimizer, y, operator, right, looks)]
            for optimizer, y in zip(traces, ys, strict=True)
        ]
        best = min(errors, key=lambda one: one[-1])
        return [[2.0 * step, one] for step, one in zip(looks, best, strict=True)], Status.MAX_STEPS.name
    system, b = way.system(operator, right)
    end = way.solver.solve(system, b)
    trace: list[list[float]] = []
    if isinstance(way.solver, IterativeSolver):
        for step in STEPS:
            if step >= int(end.report.steps.max()):
                break
            part = replace(way.solver, max_steps=step, rtol=0.0).solve(system, b)
            trace.append([float(way.products * step), error(part.value)])
    products = float(operator.dim) if isinstance(way.solver, Dense) else float(way.products * end.report.steps.max())
    trace.append([products, error(end.value)])
    return trace, Status(int(end.report.status.max())).name


def _followed(
    optimizer: Optimizer, y: Tensor, operator: LinearOperator, right: Tensor, looks: list[int]
) -> Iterator[int]:
    """Step down half the squared residual at ``y``, which is changed; stop after each of the steps to look at."""
    for step in range(1, looks[-1] + 1):
        y.grad = operator.product(operator.product(y) - right)
        optimizer.step()
        if step in looks:
            yield step


def _timed(way: Way, operator: LinearOperator, right: Tensor, products: float) -> Callable[[], float]:
    """A function that measures the solver's CPU seconds. For solvers with many steps, the first ones are timed and the
    result is scaled."""
    steps, solver = products / way.products, way.solver
    # preparing a preconditioner is not to be scaled
    plain = isinstance(solver, tuple) or (isinstance(solver, IterativeSolver) and solver.preconditioner is None)
    scale = steps / TIMED if plain and steps > TIMED else 1.0
    if scale > 1 and isinstance(solver, IterativeSolver):
        solver = replace(solver, max_steps=TIMED)

    def timing() -> float:
        began = time.process_time()
        if isinstance(solver, tuple):
            y = torch.zeros_like(right)
            for _ in _followed(SGD([y], lr=0.0), y, operator, right, [min(TIMED, round(steps))]):
                pass
        else:
            solver.solve(*way.system(operator, right))
        return scale * (time.process_time() - began)

    return timing
