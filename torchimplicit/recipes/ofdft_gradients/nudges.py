"""Equilibrium propagation over its nudge, the tolerance of its minimizations, and beyond the least eigenvalue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchimplicit.gradients import DampedImplicit
from torchimplicit.linear import Dense
from torchimplicit.problems import Minimum
from torchimplicit.recipes.ofdft_gradients.optimum import Optimum, flat, quiet
from torchimplicit.recipes.ofdft_gradients.results import Beyond, Damped, Loosened, Nudged
from torchimplicit.solution import Status
from torchimplicit.solve import solve


def nudged(optimum: Optimum, exact: Tensor, nudges: Sequence[float]) -> list[Nudged]:
    """Both forms for every nudge."""
    found = []
    for nudge in sorted(nudges, reverse=True):
        one, two = (optimum.estimate(optimum.propagation(nudge, symmetric=symmetric)) for symmetric in (False, True))
        found.append(Nudged(nudge, one.error(exact), two.error(exact), one.status, two.status))
    return found


def automatic(optimum: Optimum, exact: Tensor) -> dict[str, float]:
    """The errors of the nudge that the estimator chooses."""
    return {
        name: optimum.estimate(optimum.propagation(None, symmetric=symmetric)).error(exact)
        for name, symmetric in (("one_sided", False), ("symmetric", True))
    }


def loosened(optimum: Optimum, exact: Tensor, nudges: Sequence[float], tolerances: Sequence[float]) -> list[Loosened]:
    """Propagation with the whole loss, written out: the energy plus the loss times its weight is minimized from the
    minimum, and the energy's derivative in the parameters is subtracted. All three minimizations have one tolerance."""
    found = []
    for tolerance in sorted(tolerances, reverse=True):
        middle = optimum.minimize(optimum.molecule.guess, tolerance).value.detach()
        for nudge in sorted(nudges, reverse=True):
            above, below = (_minimum(optimum, weight, middle, tolerance) for weight in (nudge, -nudge))
            one = (_slope(optimum, above) - _slope(optimum, middle)) / nudge
            two = (_slope(optimum, above) - _slope(optimum, below)) / (2 * nudge)
            size = exact.norm()
            errors = (float((estimate - exact).norm() / size) for estimate in (one, two))
            found.append(Loosened(nudge, tolerance, *errors))
    return found


def beyond(optimum: Optimum, exact: Tensor, least: float, shares: Sequence[float], most_steps: int) -> list[Beyond]:
    """The symmetric difference with the whole loss, whose negative side has the Hessian less its weight."""
    found = []
    distance = optimum.cotangent.norm()
    solver = replace(optimum.solver(), max_steps=most_steps)
    for share in sorted(shares):
        weight = share * least
        values, worst = [], Status.CONVERGED
        for sign in (1, -1):
            problem = _with_loss(optimum, sign * weight)
            with quiet():
                ended = solve(problem, optimum.value, solver=solver, throw=False)
            values.append(ended.value.detach())
            worst = max(worst, Status(int(ended.status)))
        estimate = (_slope(optimum, values[0]) - _slope(optimum, values[1])) / (2 * weight)
        moved = max(float((optimum.metric.root[0] @ (v - optimum.value)).norm() / distance) for v in values)
        error = float((estimate - exact).norm() / exact.norm())
        found.append(Beyond(share, error, moved, worst.name))
    return found


def damped(optimum: Optimum, exact: Tensor, weights: Sequence[float]) -> list[Damped]:
    """The two gradients that are to agree."""
    found = []
    for weight in sorted(weights, reverse=True):
        # the estimator's nudge is relative to the cotangent's length, and its spring is the nudge over that length
        nudge = weight * float(optimum.cotangent.norm())
        one = optimum.estimate(optimum.propagation(nudge, symmetric=False, curved=True)).gradient
        two = optimum.estimate(DampedImplicit(damping=weight, linear_solver=Dense()))
        found.append(Damped(weight, float((one - two.gradient).norm() / two.gradient.norm()), two.error(exact)))
    return found


def _with_loss(optimum: Optimum, weight: float) -> Minimum:
    energy = optimum.problem.energy
    return replace(optimum.problem, energy=lambda p: energy(p) + weight * optimum.loss(p))


def _minimum(optimum: Optimum, weight: float, start: Tensor, tolerance: float) -> Tensor:
    with quiet():
        found = solve(_with_loss(optimum, weight), start, solver=optimum.solver(tolerance), throw=False)
    return found.value.detach()


def _slope(optimum: Optimum, p: Tensor) -> Tensor:
    """The energy's derivative in the parameters at a density, flat."""
    energy = optimum.functional(p, optimum.molecule)
    return flat(torch.autograd.grad(energy, optimum.parameters, allow_unused=True), optimum.parameters)
