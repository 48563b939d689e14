"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import ROUNDING, Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.system import LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients (Hestenes and Stiefel 1952), for symmetric positive definite systems.

    The system may be singular along the operator's null vector. The preconditioner has to be positive definite. A
    direction of negative or vanishing curvature shows that the matrix is not positive definite: such a sample gets
    ``Status.BREAKDOWN``, and if negative, the curvature goes into the report. Convergence is confirmed by the true
    residual, at the cost of one product.
    """

    max_steps: int = 1000

    def method(self, operator: LinearOperator) -> Method:
        return _ConjugateGradients(preconditioned=self.preconditioner is not None)


class _State(NamedTuple):
    """``decrease`` is :math:`r^T M^{-1} r`, ``least`` the smallest step length so far, ``square`` :math:`p^T M p`, and
    ``curvature`` the smallest along a direction, infinite where none was negative; each ``[rows, 1]``."""

    norm: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    p: Tensor
    decrease: Tensor
    least: Tensor
    square: Tensor
    curvature: Tensor


@dataclass
class _ConjugateGradients(Method):
    preconditioned: bool

    kept = ("x", "curvature")
    monotone = False
    definite = True
    curved = True

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        p, decrease = self._direction(system, r, norm)
        none = torch.full_like(decrease, torch.inf)
        return _State(norm, None, x, r, p, decrease, least=none, square=decrease, curvature=none)

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        info = torch.finfo(state.r.dtype)
        image = system.product(state.p)
        # the quadratic is minimal along p at <r, z> / <p, Ap>; where <p, Ap> is not positive it is unbounded below, and
        # the matrix is not positive definite (Hestenes and Stiefel 1952)
        curvature = (state.p * image).sum(-1, keepdim=True)
        length = state.decrease / curvature
        # step lengths lie between the inverses of the extreme eigenvalues: beyond a ratio of 1 / eps, it is singular
        least = state.least.minimum(length)
        broken = (curvature <= 0) | (length * info.eps > least)
        length = length.masked_fill_(broken, 0.0)
        x = torch.addcmul(state.x, length, state.p)
        r = torch.addcmul(state.r, length, image, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)
        z, decrease = self._direction(system, r, norm)
        # Fletcher and Reeves' form of the coefficient that makes the directions conjugate
        turn = decrease / state.decrease.clamp_min(info.tiny)
        p = torch.addcmul(z, turn, state.p)
        square = torch.addcmul(decrease, turn.square(), state.square)  # the new residual is orthogonal to p
        # 1 / least is the largest curvature met, relative to which a small negative one counts as rounding
        along = curvature / state.square
        met = state.curvature.minimum(along.masked_fill_(~(along * state.least < -ROUNDING * info.eps), torch.inf))
        return _State(norm, broken.squeeze(1), x, r, p, decrease, least, square, met)

    def iterate(self, state: _State) -> tuple[Tensor, float, None]:
        return state.x, torch.inf, None  # the recurrence's residual drifts from the true one (Greenbaum 1997)

    def _direction(self, system: LinearSystem, r: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        if not self.preconditioned:
            return r, norm.square().unsqueeze(1)
        z = system.precondition(r)
        return z, (r * z).sum(-1, keepdim=True)
