"""Projected gradient ascent, which solves for the equilibrium and its gradient in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.attacks.base import Attack, Parts
from torchimplicit.attacks.replaced import Replaced
from torchimplicit.gradients import Gradient
from torchimplicit.solvers import Solver


@final
@dataclass(frozen=True, eq=False)
class PGD(Attack):
    """Projected gradient ascent (Madry et al. 2018), with gradients through the equilibrium.

    The steps go along the gradient in the 2-norm, along its sign
    in the maximum norm. The result is the image after the last step.

    Args:
        model, radius, norm, steps, step_size, last_step_size, targeted, low, high: see :class:`Attack`.
        solver, gradient: the solver and the gradient of the equilibria; ``None``: those of the layers. A loose
            tolerance is faster.
        random_start: whether to begin at a random change within the ball and the range of the pixels.
        warm_start: whether each solve begins at the equilibrium of the last step, which saves evaluations.
    """

    solver: Solver | None = None
    gradient: Gradient | None = None
    random_start: bool = False
    warm_start: bool = True

    def _found(self, model: Replaced, images: Tensor, labels: Tensor) -> Parts:
        onto = self._onto(images)
        change, start = torch.zeros_like(images), model.start(images.detach())
        states = start
        if self.random_start:
            change = onto(self.radius * (2 * torch.rand_like(images) - 1))
        evaluations, solves = 0.0, []
        for step in range(1, self.steps + 1):
            change.requires_grad_()
            with torch.enable_grad():
                at = images + change
                scores, solutions = model.solved(at, states if self.warm_start else start, self.solver, self.gradient)
                (slope,) = torch.autograd.grad(self._loss(scores, labels).sum(), change)
            # after the backward pass, which fills in the adjoint's figures
            evaluations += sum(one.evaluations + (one.adjoint.evaluations if one.adjoint else 0) for one in solutions)
            solves += [one.figures() for one in solutions]
            states = tuple(pytree.tree_map(torch.detach, one.value) for one in solutions)
            change = onto(change.detach() - self._size(step) * self._direction(slope))
        return change, states, evaluations, tuple(solves)

    def _direction(self, slope: Tensor) -> Tensor:
        if self.norm == "linf":
            return slope.sign()
        length = slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
        return slope / length.view(-1, *(1,) * (slope.ndim - 1))
