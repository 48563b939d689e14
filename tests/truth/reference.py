"""The solution and its derivatives by dense float64 algebra on the whole problem, in units of order one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev

import torchimplicit as ti
from tests.truth import cores
from tests.truth.case import Case
from tests.truth.cores import Tensors
from tests.truth.data import Data
from tests.truth.statement import DAMPING, NEUMANN, STEP_SIZE, UNROLLED

Solve = Callable[[Tensors], Tensor]


class Reference:
    """The whole problem as one vector equation R(v) = 0; v holds the states of all samples, then the multipliers.

    Attributes:
        v: the solution, found by Newton's method from a given state.
        matrix: dR/dv there.
    """

    def __init__(self, case: Case, data: Data):
        self.case, self.data = case, data
        self.v = torch.empty(0)
        self.matrix = torch.empty(0)

    def find(self, state: Tensor, tensors: Tensors) -> bool:
        """Go to the solution nearest to a state ``[batch, width]``; whether there is one."""
        v = torch.cat((state.double().flatten(), torch.zeros(self._multipliers(), dtype=torch.float64)))
        for _ in range(50):
            self.matrix = jacrev(self.residual)(v, tensors)
            if not bool(self.matrix.isfinite().all()):
                return False
            step = torch.linalg.lstsq(self.matrix, self.residual(v, tensors)[:, None], driver="gelsd").solution[:, 0]
            v = v - step
            if not bool(v.isfinite().all()):
                return False
            if float(step.norm()) <= 1e-14 * float(v.norm()):
                break
        self.v, self.matrix = v, jacrev(self.residual)(v, tensors)
        return float(self.residual(v, tensors).norm()) <= 1e-12 * (1 + float(v.norm()))

    @property
    def state(self) -> Tensor:
        """``[batch, width]``."""
        return self._state(self.v)

    @property
    def condition(self) -> float:
        """Of the whole system."""
        values = torch.linalg.svdvals(self.matrix)
        return float(values[0] / values[-1].clamp_min(1e-300))

    def residual(self, v: Tensor, tensors: Tensors) -> Tensor:
        """R."""
        case, z = self.case, self._state(v)
        nested = cores.inner if case.style == "nested" else None
        if case.kind == "fixed_point":
            return (z - cores.image(z, tensors, case.activation, case.coupling, nested)).flatten()
        if case.kind == "root":
            return cores.root(z, tensors, case.activation, case.coupling, nested).flatten()
        if case.kind == "joint":
            return self._joint(z, tensors)
        slope = grad(lambda z: cores.energy(z, tensors, case.activation, case.coupling, nested).sum())(z)
        if not case.constraint:
            return slope.flatten()
        multipliers = v[z.numel() :]
        weight, total = tensors["w"].expand_as(z), tensors["N"]
        if case.batched:
            return torch.cat(((slope + multipliers[:, None] * weight).flatten(), (weight * z).sum(1) - total))
        return torch.cat(((slope + multipliers * weight).flatten(), ((weight * z).sum() - total)[None]))

    def estimate(self, solution: ti.Solution) -> Solve:
        """The solution as a function of the tensors, with the derivative that the case's estimator gives."""
        case = self.case
        if case.estimator == "implicit":
            return self.exact
        if case.estimator == "unrolled-phantom":
            return self._unrolled
        eye = torch.eye(len(self.v), dtype=torch.float64)
        if case.estimator == "one-step":
            inverse = eye
        elif case.estimator == "damped-implicit":
            inverse = torch.linalg.inv(self.matrix + DAMPING * eye)
        else:
            damping, terms, weights = NEUMANN["damping"], int(NEUMANN["steps"]), None
            if case.estimator == "unbiased-neumann":
                assert solution.adjoint is not None
                damping, terms = 1.0, int(solution.adjoint.steps.max())
                weights = ti.UnbiasedNeumann(steps=2).reached
            factor, power, inverse = eye - damping * self.matrix, eye, torch.zeros_like(eye)
            for i in range(terms):
                inverse = inverse + damping * power / (1.0 if weights is None else weights(i))
                power = power @ factor
        return lambda tensors: self._state(self.v - inverse @ self.residual(self.v, tensors))

    def exact(self, tensors: Tensors) -> Tensor:
        """Newton steps from the solution: differentiable twice, and right for tensors that are a little different."""
        v = self.v
        for _ in range(4 if self.case.mode.startswith("vmap") else 2):
            v = v - torch.linalg.solve(jacrev(self.residual)(v, tensors), self.residual(v, tensors))
        return self._state(v)

    def _unrolled(self, tensors: Tensors) -> Tensor:
        v = self.v
        for _ in range(int(UNROLLED["steps"])):
            v = v - UNROLLED["damping"] * self.residual(v, tensors)
        return self._state(v)

    def _state(self, v: Tensor) -> Tensor:
        return v[: self.case.batch * self.data.width].reshape(self.case.batch, self.data.width)

    def _multipliers(self) -> int:
        if self.case.constraint not in ("shared", "own"):
            return 0
        return self.case.batch if self.case.batched else 1

    def _joint(self, state: Tensor, tensors: Tensors) -> Tensor:
        case = self.case
        z, mu, y = state.split(case.dim, dim=1)

        def lagrangian(z: Tensor, y: Tensor) -> Tensor:
            mapped, loss = cores.joint(z, y, tensors, case.activation)
            return (mu * mapped).sum() + loss.sum()

        mapped, _ = cores.joint(z, y, tensors, case.activation)
        of_z, of_y = grad(lagrangian, argnums=(0, 1))(z, y)
        moved = y - STEP_SIZE * of_y
        if case.constraint == "box":
            moved = torch.where(moved < -0.1, -0.1, torch.where(moved > 0.15, 0.15, moved))
        if case.constraint == "ball":
            squares = moved.square().sum(1, keepdim=True) if case.batched else moved.square().sum()
            moved = torch.where(squares > 0.04, 0.2 * moved / squares.sqrt(), moved)
        return torch.cat((z - mapped, mu - of_z, y - moved), dim=1).flatten()
