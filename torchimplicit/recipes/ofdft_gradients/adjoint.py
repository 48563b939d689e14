"""Ways to solve the adjoint system: the slides' descent on its least-squares form beside Krylov methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from torchimplicit.linear import CG, LSMR, MINRES, Dense, Jacobi, LinearOperator, LinearSolver, ReferenceHessian
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.problems import Minimum
from torchimplicit.recipes.ofdft_gradients.config import TOLERANCE
from torchimplicit.recipes.ofdft_gradients.optimum import Optimum
from torchimplicit.recipes.ofdft_gradients.results import Solved
from torchimplicit.solution import Status

MOST = 2000
"""Steps of theirs."""
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000)
"""At which errors are looked at."""
RATES = (1e-3, 1e-2, 1e-1)
"""Of Adam, relative to the largest entry of the solution: the best one counts, which favours it."""
TIMED = 15
"""Steps that are timed of a way that takes more."""


@dataclass(frozen=True)
class Way:
    """A solver's name, itself or a descent's, and the products of one step."""

    name: str
    solver: LinearSolver | None
    products: int = 1
    normal: bool = False


def ways(reference: ReferenceHessian | None) -> list[Way]:
    """All of them.

    Args:
        reference: made by a minimization; ``None``: there is none in these coordinates.
    """
    common: dict[str, Any] = {"rtol": TOLERANCE, "max_steps": MOST}
    found = [
        Way("gradient descent, least squares", None, 2),
        Way("Adam, least squares", None, 2),
        Way("CG, normal equations", CG(**common), 2, normal=True),
        Way("LSMR", LSMR(**common), 2),
        Way("CG", CG(**common)),
        Way("MINRES", MINRES(**common)),
        Way("CG, Jacobi", CG(preconditioner=Jacobi(), **common)),
        Way("MINRES, Jacobi", MINRES(preconditioner=Jacobi(), **common)),
    ]
    if reference is not None:
        found += [
            Way("CG, reference Hessian", CG(preconditioner=reference, **common)),
            Way("MINRES, reference Hessian", MINRES(preconditioner=reference, **common)),
        ]
    return [*found, Way("dense", Dense())]


def solved(optimum: Optimum, problem: Minimum, descent_steps: int, repeats: int) -> tuple[dict[str, Solved], float]:
    """Every way, in the coordinates of ``problem``; and the CPU seconds of a product.

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
    found: dict[str, Solved] = {}
    timings: dict[str, Callable[[], float]] = {}
    for way in every:
        trace, status = _traced(way, assembled, right, true, largest, descent_steps)
        found[way.name] = Solved(trace[-1][0], 0.0, trace[-1][1], status, trace)
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
        found[name] = replace(found[name], seconds=median(times))
    return found, median(product)


def _assembled(operator: LinearOperator) -> LinearOperator:
    """The same, by its matrix."""

    def of(matrix: Tensor, null: Tensor | None, inner: LinearOperator | None) -> LinearOperator:
        def product(v: Tensor) -> Tensor:
            return v @ matrix

        return LinearOperator(
            product=product,
            transposed_product=product,
            block_product=product,
            batch=1,
            dim=operator.dim,
            dtype=operator.dtype,
            device=operator.device,
            symmetric=True,
            null=null,
            unprojected=inner,
        )

    def symmetric(matrix: Tensor) -> Tensor:
        return 0.5 * (matrix + matrix.T)

    inner = None
    if operator.unprojected is not None:
        inner = of(symmetric(operator.unprojected.dense()[0]), None, None)
    return of(symmetric(operator.dense()[0]), operator.null, inner)


def _traced(
    way: Way, operator: LinearOperator, right: Tensor, true: Tensor, largest: float, descent_steps: int
) -> tuple[list[list[float]], str]:
    """Pairs of products and error, and how it ended."""

    def error(y: Tensor) -> float:
        return float((y - true).norm() / true.norm())

    if way.solver is None:
        looks = [step for step in STEPS if step < descent_steps] + [descent_steps]
        if way.name.startswith("gradient"):
            run = _descent(operator, right, largest, looks)
        else:
            runs = [_adam(operator, right, rate * float(true.abs().max()), looks) for rate in RATES]
            run = min(runs, key=lambda ys: error(ys[-1]))
        return [[2.0 * step, error(y)] for step, y in zip(looks, run, strict=True)], Status.MAX_STEPS.name
    system, b = (_squared(operator), operator.product(right)) if way.normal else (operator, right)
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


def _timed(way: Way, operator: LinearOperator, right: Tensor, products: float) -> Callable[[], float]:
    """What measures its CPU seconds. A way of many steps is timed over the first of them, and scaled."""
    steps, solver = products / way.products, way.solver
    # preparing a preconditioner is not to be scaled
    part = solver is None or (isinstance(solver, IterativeSolver) and solver.preconditioner is None)
    scale = steps / TIMED if part and steps > TIMED else 1.0
    if scale > 1 and isinstance(solver, IterativeSolver):
        solver = replace(solver, max_steps=TIMED)

    def timing() -> float:
        began = time.process_time()
        if solver is None:
            y = torch.zeros_like(right)
            for _ in range(min(TIMED, round(steps))):
                y = y - 0.0 * operator.product(operator.product(y) - right)
        else:
            solver.solve(*((_squared(operator), operator.product(right)) if way.normal else (operator, right)))
        return scale * (time.process_time() - began)

    return timing


def _squared(operator: LinearOperator) -> LinearOperator:
    def product(v: Tensor) -> Tensor:
        return operator.product(operator.product(v))

    return replace(
        operator, product=product, transposed_product=product, block_product=None, restrict=None, unprojected=None
    )


def _descent(operator: LinearOperator, right: Tensor, largest: float, looks: list[int]) -> list[Tensor]:
    """On half the squared residual, with the step that is safe: one over the largest eigenvalue of its Hessian."""
    y, seen = torch.zeros_like(right), []
    for step in range(1, looks[-1] + 1):
        y = y - operator.product(operator.product(y) - right) / largest**2
        if step in looks:
            seen.append(y)
    return seen


def _adam(operator: LinearOperator, right: Tensor, rate: float, looks: list[int]) -> list[Tensor]:
    """On the same, by torch's Adam."""
    y = torch.zeros_like(right).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=rate)
    seen = []
    for step in range(1, looks[-1] + 1):
        with torch.no_grad():
            y.grad = operator.product(operator.product(y) - right)
        optimizer.step()
        if step in looks:
            seen.append(y.detach().clone())
    return seen
