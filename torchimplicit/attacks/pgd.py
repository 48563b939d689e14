"""The attack that solves for an equilibrium, and for its gradient, in every step."""

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
    """Projected gradient ascent (Madry et al. 2018), each gradient that of an equilibrium.

    The solves begin at the last step's equilibrium. The steps go along the gradient in the 2-norm, and by its sign in
    the maximum norm. What is found is the last step's image.

    Args:
        model, radius, norm, steps, step_size, targeted, low, high: see :class:`Attack`.
        solver, gradient: of the equilibria; ``None``: the layers' own. A loose tolerance is faster.
        random_start: whether to begin at a random change within the set.
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
                scores, found = self._solved(model, images + change, states)
                (slope,) = torch.autograd.grad(self._loss(scores, labels).sum(), change)
            evaluations += sum(one.evaluations + (one.adjoint.evaluations if one.adjoint else 0) for one in found)
            solves += [one.figures() for one in found]
            states = tuple(pytree.tree_map(torch.detach, one.value) for one in found)
            change = onto(change.detach() - self.radius * self.step_size * self._direction(slope))
        return change, states, evaluations, tuple(solves)

    def _solved(self, model: Replaced, images: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, list[Solution]]:
        """The scores at the equilibria, solved for from ``states``."""
        found: list[Solution] = []

        def answer(number: int, stated: Stated) -> tuple[Any, Any]:
            layer = stated.layer
            one = solve(
                stated.problem,
                states[number],
                *stated.inputs,
                solver=self.solver or layer.eval_solver or layer.solver,
                gradient=self.gradient or layer.gradient,
                throw=layer.throw,
            )
            found.append(one)
            return one.value, one.aux if layer.has_aux else None

        return model.run(images, answer), found

    def _direction(self, slope: Tensor) -> Tensor:
        if self.norm == "linf":
            return slope.sign()
        length = slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
        return slope / length.view(-1, *(1,) * (slope.ndim - 1))
