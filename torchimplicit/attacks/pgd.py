"""Projected gradient ascent, which solves for the equilibrium and its gradient in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit._solve import solve
from torchimplicit.attacks.base import Attack, Parts
from torchimplicit.attacks.replaced import Replaced, Stated
from torchimplicit.gradients import Gradient
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


@final
@dataclass(frozen=True, eq=False)
class PGD(Attack):
    """Projected gradient ascent (Madry et al. 2018), with gradients through the equilibrium.

    Each solve begins at the equilibrium of the last step. The steps go along the gradient in the 2-norm, along its sign
    in the maximum norm. The result is the image after the last step.

    Args:
        model, radius, norm, steps, step_size, targeted, low, high: see :class:`Attack`.
        solver, gradient: the solver and the gradient of the equilibria; ``None``: those of the layers. A loose
            tolerance is faster.
        random_start: whether to begin at a random change within the ball and the range of the pixels.
    """

    solver: Solver | None = None
    gradient: Gradient | None = None
    random_start: bool = False

    def _found(self, model: Replaced, images: Tensor, labels: Tensor) -> Parts:
        onto = self._onto(images)
        change, states = torch.zeros_like(images), model.start(images.detach())
        if self.random_start:
            change = onto(self.radius * (2 * torch.rand_like(images) - 1))
        evaluations, solves = 0.0, []
        for _ in range(self.steps):
            change.requires_grad_()
            with torch.enable_grad():
                scores, solutions = self._solved(model, images + change, states)
                (slope,) = torch.autograd.grad(self._loss(scores, labels).sum(), change)
            # after the backward pass, which fills in the adjoint's figures
            evaluations += sum(one.evaluations + (one.adjoint.evaluations if one.adjoint else 0) for one in solutions)
            solves += [one.figures() for one in solutions]
            states = tuple(pytree.tree_map(torch.detach, one.value) for one in solutions)
            change = onto(change.detach() - self.radius * self.step_size * self._direction(slope))
        return change, states, evaluations, tuple(solves)

    def _solved(self, model: Replaced, images: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, list[Solution]]:
        """The scores at the equilibria, and the solutions found from the starts ``states``."""
        solutions: list[Solution] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            layer = stated.layer
            solution = solve(
                stated.problem,
                states[number],
                *stated.inputs,
                solver=self.solver or layer.eval_solver or layer.solver,
                gradient=self.gradient or layer.gradient,
                throw=layer.throw,
            )
            solutions.append(solution)
            return solution.value, solution.aux if layer.has_aux else None

        return model.run(images, answer), solutions

    def _direction(self, slope: Tensor) -> Tensor:
        if self.norm == "linf":
            return slope.sign()
        length = slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
        return slope / length.view(-1, *(1,) * (slope.ndim - 1))
