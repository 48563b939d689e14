"""Adapting a context to tasks: by joint inference, and by gradient descent through the equilibrium."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import ContextEquilibrium
from torchimplicit.problems import JointInference
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import FixedPointIteration

DAMPING = (0.8, 0.6, 1.0)
"""Of state, adjoint and context, as published."""


class Adapted(NamedTuple):
    """What an adaptation came to: contexts ``[tasks, context]``, and evaluations of the map with products with its
    Jacobian, of the support's states, in whole-batch equivalents."""

    context: Tensor
    evaluations: float


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of every task ``[tasks]``: the mean squared error of values, the mean cross-entropy of labels."""
    if targets.is_floating_point():
        return (outputs - targets).square().flatten(1).mean(1)
    losses = functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """JIIO: the context and the states of all support samples of a task by one iteration, which is not accelerated: a
    task is one sample of the batch.

    Args:
        steps: the most.
        step_size: of the context along its gradient.
        penalty: of the context's square.
        gradient: of the weights, in the context; ``None``: the context is a constant to them (first order).
        tolerance: relative, of the joint residual.
        seen: is told of the solve.
    """

    steps: int
    step_size: float
    penalty: float
    gradient: Gradient | None = None
    tolerance: float = 1e-3
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: ContextEquilibrium, features: Tensor, targets: Tensor) -> Adapted:
        """Adapt to the support's features ``[tasks, samples, state]`` and targets."""
        problem = self.problem(model)
        start = (torch.zeros_like(features), model.contexts(features))
        solver = FixedPointIteration(rtol=self.tolerance, max_steps=self.steps)
        if self.gradient is None:
            with torch.no_grad():
                found = solve(problem, start, features, targets, solver=solver, throw=False)
        else:
            found = solve(problem, start, features, targets, solver=solver, gradient=self.gradient, throw=False)
        if self.seen is not None:
            self.seen(found)
        return Adapted(found.value.x, 2 * found.evaluations)

    def problem(self, model: ContextEquilibrium) -> JointInference:
        """The context of least error; the arguments are features and targets."""
        f = model.map()

        def loss(z: Tensor, context: Tensor, features: Tensor, targets: Tensor) -> Tensor:
            return errors(model.read(z, context), targets) + self.penalty * context.square().sum(1)

        return JointInference(
            lambda z, context, features, targets: f(z, context, features), loss, self.step_size, damping=DAMPING
        )


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Gradient descent on the context, every gradient that of an equilibrium which begins at the last one.

    Args:
        steps, step_size, penalty: as for :class:`Joint`.
        differentiable: whether the weights' gradient runs through every step, as in MAML and CAVIA (Finn et al. 2017,
            Zintgraf et al. 2019); otherwise it stops at the context.
    """

    steps: int
    step_size: float
    penalty: float
    differentiable: bool = False

    def __call__(self, model: ContextEquilibrium, features: Tensor, targets: Tensor) -> Adapted:
        """Adapt to the support's features ``[tasks, samples, state]`` and targets."""
        if not self.differentiable:
            features = features.detach()
        evaluations, z = 0.0, None
        with torch.enable_grad():
            context = model.contexts(features).requires_grad_()
            for _ in range(self.steps):
                outputs = model(features, context, z)
                loss = (errors(outputs, targets) + self.penalty * context.square().sum(1)).sum()
                (slope,) = torch.autograd.grad(loss, context, create_graph=self.differentiable)
                solution = model.equilibrium.solution
                assert solution is not None
                assert solution.adjoint is not None
                z = solution.value
                evaluations += solution.evaluations + solution.adjoint.evaluations
                context = context - self.step_size * slope
                if not self.differentiable:
                    context = context.detach().requires_grad_()
        return Adapted(context if self.differentiable else context.detach(), evaluations)


Adapt = Callable[[ContextEquilibrium, Tensor, Tensor], Adapted]


def exact(steps: int, tolerance: float) -> Gradient:
    """The exact gradient of JIIO's context, its adjoint solved to a loose tolerance: along contexts that hardly matter
    to the loss, the joint map is nearly the identity, and more steps would magnify what the solve has left there."""
    return Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=steps))
