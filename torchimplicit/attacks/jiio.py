"""The JIIO attack, which finds the image and the equilibrium by one joint iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.attacks.base import Attack, Parts
from torchimplicit.attacks.replaced import Replaced
from torchimplicit.problems import JointInference, JointState
from torchimplicit.solvers import FixedPointIteration, Solver


@final
@dataclass(frozen=True, eq=False)
class JIIO(Attack):
    """Joint inference and input optimization (Gurumurthy et al. 2021), which finds the change of the image, the
    equilibrium and its adjoint by one fixed-point iteration.

    A step costs one run of the model without a solve, and its backward pass. The change takes normalized steps: along
    the gradient in the 2-norm, along its sign in the maximum norm. For each image, the result is the iterate with the
    highest loss (see :class:`~torchimplicit.JointInference`).

    Args:
        model, radius, norm, steps, step_size, targeted, low, high: see :class:`Attack`.
        last_step_size: the step size at the last step, which ``step_size`` approaches geometrically; ``None``: it is
            constant. The default, long steps first and short ones last, is that of the paper.
        damping: the damping of the states, the adjoints and the change; the default is that of the paper. If the
            equilibrium's map contracts well, ``(1, 1, 1)`` gives a stronger attack in the same number of steps.
        tolerance: relative tolerance of the joint residual, at which an image is done.
        solver: the solver of the joint iteration; ``None``: plain iteration. The problem is not convex, and Anderson's
            method finds other stationary points, which are weaker attacks.
    """

    step_size: float = 1.0
    last_step_size: float | None = 0.2
    damping: tuple[float, float, float] = (0.8, 0.6, 1.0)
    tolerance: float = 1e-3
    solver: Solver | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_step_size is not None and not 0 < self.last_step_size < float("inf"):
            raise ValueError(f"JIIO.last_step_size is {self.last_step_size}, but must be positive and finite, or None")

    def _size(self, step: int) -> float:
        """The length of step number ``step``, counted from one."""
        last = self.step_size if self.last_step_size is None else self.last_step_size
        share = min(max(step - 1, 0) / max(self.steps - 1, 1), 1.0)
        return self.radius * self.step_size * (last / self.step_size) ** share

    def _found(self, model: Replaced, images: Tensor, labels: Tensor) -> Parts:
        both = _Both(self, model)
        problem = JointInference(
            both.f,
            both.loss,
            self._size,
            self._set(images),
            rowwise=model.rowwise,
            damping=self.damping,
            normalized=True if self.norm == "l2" else "sign",
        )
        solver = self.solver or FixedPointIteration(rtol=self.tolerance, max_steps=self.steps)
        with torch.no_grad():
            start = model.start(images), torch.zeros_like(images)
            solution = solve(problem, start, images, labels, solver=solver)
        state: JointState = solution.value
        # each evaluation of the joint map includes one product with the Jacobian, for the adjoint
        return state.x, state.z, 2 * solution.evaluations, (solution.figures(),)


class _Both:
    """The equilibria's maps and the loss, which one run of the model computes together.

    :class:`JointInference` calls ``f`` first and then ``loss`` with the same tensors, which reuses the scores.
    """

    def __init__(self, attack: JIIO, model: Replaced):
        self.attack, self.model = attack, model
        self._at: tuple[Any, ...] = ()
        self._scores: Tensor | None = None

    def f(self, z: tuple[Any, ...], change: Tensor, images: Tensor, labels: Tensor) -> tuple[Any, ...]:
        mapped, self._scores = self.model.once(z, images + change)
        self._at = (z, change, images)
        return mapped

    def loss(self, z: tuple[Any, ...], change: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        scores = self._scores
        if scores is None or len(self._at) != 3 or any(a is not b for a, b in zip(self._at, (z, change, images))):
            _, scores = self.model.once(z, images + change)
        self._at, self._scores = (), None  # else the graph of this step would stay in memory during the next
        return self.attack._loss(scores, labels)
