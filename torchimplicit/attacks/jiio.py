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
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver

NEAR = Anderson(rtol=0.1, max_steps=40)


@final
@dataclass(frozen=True, eq=False)
class JIIO(Attack):
    """Joint inference and input optimization (Gurumurthy et al. 2021), which finds the change of the image, the
    equilibrium and its adjoint by one fixed-point iteration.

    A step costs one run of the model without a solve, and its backward pass. The change takes normalized steps: along
    the gradient in the 2-norm, along its sign in the maximum norm. The result is the image after the last step, as of
    :class:`PGD`: the iterate of the lowest cost that :class:`~torchimplicit.JointInference` would choose is the weaker
    attack, since that cost charges for states that lag behind, as they do while the change takes long steps.

    Args:
        model, radius, norm, steps, step_size, last_step_size, targeted, low, high: see :class:`Attack`. Long steps
            first and short ones last are the default, as in the paper.
        damping: the damping of the states, the adjoints and the change; the default is that of the paper. If the
            equilibrium's map contracts well, ``(1, 1, 1)`` gives a stronger attack in the same number of steps.
        tolerance: relative tolerance of the joint residual, at which an image is done; ``None``: all images take all
            steps, which saves one evaluation and the tests.
        start: the solver of the equilibria of the given images, from which the joint iteration starts; ``None``: it
            starts at the layers' initial states, as in the paper. Evaluations alone are cheap beside joint steps, the
            first of which would have no state to differentiate at. With Anderson's method as ``solver`` take ``None``:
            a first step in which the states hardly move misleads it.
        solver: the solver of the joint iteration; ``None``: plain iteration. The problem is not convex, and Anderson's
            method finds other stationary points, which are weaker attacks.
    """

    step_size: float = 1.0
    last_step_size: float | None = 0.2
    damping: tuple[float, float, float] = (0.8, 0.6, 1.0)
    tolerance: float | None = None
    start: Solver | None = NEAR
    solver: Solver | None = None

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
        plain = FixedPointIteration(return_last=True, rtol=self.tolerance, max_steps=self.steps)
        solver = self.solver or (plain if self.tolerance is not None else plain.given(self.steps))
        evaluations = 0.0
        with torch.no_grad():
            states = model.start(images)
            if self.start is not None:
                solutions = model.solved(images, states, self.start, throw=False)[1]
                states = tuple(one.value for one in solutions)
                evaluations = sum(one.evaluations for one in solutions)
            solution = solve(problem, (states, torch.zeros_like(images)), images, labels, solver=solver)
        state: JointState = solution.value
        # each evaluation of the joint map includes one product with the Jacobian, for the adjoint
        return state.x, state.z, evaluations + 2 * solution.evaluations, (solution.figures(),)


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
