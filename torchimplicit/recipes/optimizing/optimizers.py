"""What lowers the residuals: SciPy's trust-region Gauss-Newton and L-BFGS, and Adam."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import OptimizeResult, least_squares, minimize

from torchimplicit.recipes.errors import DivergedError
from torchimplicit.recipes.optimizing.names import OptimizerName
from torchimplicit.recipes.optimizing.objective import Array, Objective

Step = Callable[[Array, float], float]
"""Called after every iteration with the weights and the loss; gives the share of the budget that is spent, and raises
to stop."""


def gauss_newton(objective: Objective, start: Array, step: Step) -> None:
    """Branch, Coleman and Li's trust region (SciPy's ``trf``), with exact Jacobians.

    Raises:
        DivergedError: if the residuals are not finite at the start, from where it could not step back.
    """

    def residuals(vector: Array) -> Array:
        found = objective.residuals(vector)
        if np.array_equal(vector, start) and not np.isfinite(found).all():
            raise DivergedError(
                "the residuals are not finite at the weights that training starts from, where a solution that they are "
                "made of was not found: allow it more steps (--inner-steps, where there is such), try another --seed, "
                "or train by --optimizer adam"
            )
        return found

    def after(intermediate_result: OptimizeResult) -> None:
        step(intermediate_result.x, float(intermediate_result.cost))

    least_squares(
        residuals,
        start,
        jac=objective.jacobian,
        method="trf",
        ftol=None,
        xtol=1e-15,
        gtol=1e-15,
        max_nfev=10**9,
        callback=after,
    )


FIRST_STEP = 0.1
"""Of L-BFGS: the length in the weights of what it tries before it knows anything of the curvature. SciPy's is one."""


def l_bfgs(objective: Objective, start: Array, step: Step) -> None:
    """SciPy's L-BFGS; where its line search gives up it begins anew, as long as that still lowers the loss.

    It sees the weights in units of the first step: all later steps are the same in any units.
    """

    def loss_and_gradient(scaled: Array) -> tuple[float, Array]:
        loss, gradient = objective.loss_and_gradient(FIRST_STEP * scaled)
        return loss, FIRST_STEP * gradient

    def after(intermediate_result: OptimizeResult) -> None:
        step(FIRST_STEP * intermediate_result.x, float(intermediate_result.fun))

    start = start / FIRST_STEP

    reached = math.inf
    while True:
        found = minimize(
            loss_and_gradient,
            start,
            jac=True,
            method="L-BFGS-B",
            callback=after,
            options={"maxiter": 10**9, "maxfun": 10**9, "maxcor": 30, "ftol": 0.0, "gtol": 0.0},
        )
        if not found.fun < reached:
            return
        start, reached = found.x, float(found.fun)


def adam(objective: Objective, start: Array, peak: float, spent: float, step: Step) -> None:
    """Adam with a cosine over the budget; its moments begin anew where a run is resumed."""
    weights = torch.tensor(start)
    optimizer = torch.optim.Adam([weights], lr=peak)
    while True:
        for group in optimizer.param_groups:
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * spent))
        loss, gradient = objective.loss_and_gradient(weights.numpy())
        weights.grad = torch.as_tensor(gradient)
        optimizer.step()
        spent = step(weights.numpy(), loss)


def run(objective: Objective, name: OptimizerName, learning_rate: float, spent: float, step: Step) -> None:
    """From the model's present weights, which have taken the share ``spent`` of the budget; until ``step`` raises, or
    nothing is left to gain."""
    start = np.asarray(objective.weights)
    if name == "adam":
        adam(objective, start, learning_rate, spent, step)
    elif name == "l-bfgs":
        l_bfgs(objective, start, step)
    else:
        gauss_newton(objective, start, step)
