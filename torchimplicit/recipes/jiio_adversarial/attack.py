"""Attacks within a ball: projected gradient ascent through the equilibrium, and joint inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.constraints import L2Ball
from torchimplicit.gradients import Envelope, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import EquilibriumClassifier
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver

DAMPING = (0.8, 0.6, 1.0)
"""Of state, adjoint and perturbation, as published."""


class Found(NamedTuple):
    """What an attack came to.

    Attributes:
        change: of the images, within the ball.
        state: of the equilibrium, approximately: a start for an exact solve.
        evaluations: of the map, and products with its Jacobian, in whole-batch equivalents. A step of JIIO is one of
            each.
    """

    change: Tensor
    state: Tensor
    evaluations: float


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected ascent along the normalized gradient, every gradient that of an equilibrium (Madry et al. 2018).

    The solves begin at the last step's equilibrium.

    Args:
        steps: how many.
        step_size: as a share of the radius.
        tolerance: relative, of each solve and of its adjoint.
        seen: is told of every solve.
    """

    steps: int
    step_size: float
    tolerance: float = 1e-2
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: EquilibriumClassifier, images: Tensor, labels: Tensor, radius: float) -> Found:
        """Attack; no gradient is carried."""
        mix = model.mixed()
        problem = FixedPoint(lambda z, u: torch.tanh(mix(z) + u), rowwise=True)
        solver = Anderson(rtol=self.tolerance, max_steps=40)
        gradient = Implicit(linear_solver=GMRES(rtol=self.tolerance, max_steps=40))
        change, z, evaluations = torch.zeros_like(images), model.start(images), 0.0
        with torch.enable_grad():
            for _ in range(self.steps):
                change.requires_grad_()
                found = solve(problem, z, model.inject(images + change), solver=solver, gradient=gradient)
                loss = functional.cross_entropy(model.read(found.value), labels, reduction="sum")
                (slope,) = torch.autograd.grad(loss, change)
                if self.seen is not None:
                    self.seen(found)
                assert found.adjoint is not None
                evaluations += found.evaluations + found.adjoint.evaluations
                z = found.value.detach()
                length = slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
                change = _into_ball(change.detach() + radius * self.step_size * _over(slope, length), radius)
        return Found(change, z, evaluations)


@dataclass(frozen=True, kw_only=True)
class JIIO:
    """Joint inference and input optimization (Gurumurthy et al. 2021): perturbation and equilibrium by one iteration.

    Args:
        steps: the most; samples that settle earlier leave.
        step_size: as a share of the radius; the steps are normalized.
        tolerance: relative, of the joint residual.
        solver: by default plain iteration, damped as published. Anderson's method, though it keeps the iterate of the
            highest cost, comes to other stationary points of this problem, which is not convex, and to weaker attacks.
        seen: is told of every solve.
    """

    steps: int
    step_size: float
    tolerance: float = 1e-3
    solver: Solver | None = None
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: EquilibriumClassifier, images: Tensor, labels: Tensor, radius: float) -> Found:
        """Attack; no gradient is carried."""
        with torch.no_grad():
            found = self.solve(model, images, labels, radius)
        state: JointState = found.value
        return Found(state.x, state.z, 2 * found.evaluations)

    def solve(
        self,
        model: EquilibriumClassifier,
        images: Tensor,
        labels: Tensor,
        radius: float,
        *,
        keep_trajectory: bool = False,
    ) -> Solution:
        """The joint solve, with the gradient of the envelope theorem: for a loss that is the cross-entropy at its
        state, which is the inner loss with the other sign (Danskin's theorem)."""
        solver = self.solver or FixedPointIteration(
            rtol=self.tolerance, max_steps=self.steps, keep_trajectory=keep_trajectory
        )
        start = (model.start(images), torch.zeros_like(images))
        found = solve(self.problem(model, radius), start, images, labels, solver=solver, gradient=Envelope())
        if self.seen is not None:
            self.seen(found)
        return found

    def problem(self, model: EquilibriumClassifier, radius: float) -> JointInference:
        """Perturbation of least likelihood; the arguments are the images and their labels."""
        f = model.map()

        def loss(z: Tensor, change: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return -functional.cross_entropy(model.read(z), labels, reduction="none")

        return JointInference(
            lambda z, change, images, labels: f(z, images + change),
            loss,
            radius * self.step_size,
            L2Ball(radius),
            rowwise=True,
            damping=DAMPING,
            normalized=True,
        )


Attack = Callable[[EquilibriumClassifier, Tensor, Tensor, float], Found]


def _over(images: Tensor, lengths: Tensor) -> Tensor:
    return images / lengths.view(-1, *(1,) * (images.ndim - 1))


def _into_ball(change: Tensor, radius: float) -> Tensor:
    return _over(change, (change.flatten(1).norm(dim=1) / radius).clamp_min(1))


def judged(model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> Any:
    """Cross-entropy of every image, and which are told right, at an exact solve from zero: ``[batch]`` both."""
    with torch.no_grad():
        scores = model(images, model.start(images))
        return functional.cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels
