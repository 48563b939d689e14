"""What lowers the residuals: SciPy's trust-region Gauss-Newton and L-BFGS, and Adam."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import OptimizeResult, least_squares, minimize

from torchimplicit.recipes.physics.config import PhysicsConfig
from torchimplicit.recipes.physics.least_squares import Array, LeastSquares

Step = Callable[[Array, float], None]
"""Called after every iteration with the weights and the loss; raises to stop."""


def gauss_newton(problem: LeastSquares, start: Array, iterations: int, step: Step) -> None:
    """Branch, Coleman and Li's trust region (SciPy's ``trf``), with exact Jacobians."""

    def after(intermediate_result: OptimizeResult) -> None:
        step(intermediate_result.x, float(intermediate_result.cost))

    least_squares(
        problem.residuals,
        start,
        jac=problem.jacobian,
        method="trf",
        ftol=None,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=10 * iterations,
        callback=after,
    )


def l_bfgs(problem: LeastSquares, start: Array, iterations: int, step: Step) -> None:
    """SciPy's L-BFGS."""

    def after(intermediate_result: OptimizeResult) -> None:
        step(intermediate_result.x, float(intermediate_result.fun))

    minimize(
        problem.loss_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=after,
        options={"maxiter": iterations, "maxfun": 20 * iterations, "maxcor": 30, "ftol": 0.0, "gtol": 0.0},
    )


def adam(problem: LeastSquares, start: Array, config: PhysicsConfig, done: int, step: Step) -> None:
    """Adam with a cosine; its moments begin anew where a run is resumed."""
    problem.set_weights(start)
    optimizer = torch.optim.Adam(problem.field.parameters(), lr=config.learning_rate)
    for iteration in range(done, config.iterations):
        share = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        step(problem.weights, float(loss.detach()))


def run(problem: LeastSquares, config: PhysicsConfig, done: int, step: Step) -> None:
    """From the field's present weights, which ``done`` iterations have reached."""
    start, left = np.asarray(problem.weights), config.iterations - done
    if config.optimizer == "adam":
        adam(problem, start, config, done, step)
    elif config.optimizer == "l-bfgs":
        l_bfgs(problem, start, left, step)
    else:
        gauss_newton(problem, start, left, step)
