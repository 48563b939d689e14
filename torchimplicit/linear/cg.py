"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.system import System


@final
@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients (Hestenes and Stiefel 1952), for symmetric positive definite systems.

    The system may be singular along the operator's null vector, and the preconditioner has to be positive definite.
    A direction of negative or vanishing curvature shows that the matrix is not positive definite: such a sample gets
    ``Status.BREAKDOWN``. Convergence is confirmed by the true residual, at the cost of one product.
    """

    max_steps: int = 1000

    def _method(self, operator: LinearOperator) -> Method:
        return _ConjugateGradients(preconditioned=self.preconditioner is not None)


class _State(NamedTuple):
    """``decrease`` is :math:`r^T M^{-1} r`, and ``least`` the least step length so far, each ``[rows, 1]``."""

    norm: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    p: Tensor
    decrease: Tensor
    least: Tensor


@dataclass
class _ConjugateGradients(Method):
    preconditioned: bool

    monotone = False
    definite = True

    def start(self, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        p, decrease = self._direction(system, r, norm)
        return _State(norm, None, x, r, p, decrease, torch.full_like(decrease, torch.inf))

    def step(self, system: System, state: _State, slow: int | None) -> _State:
        info = torch.finfo(state.r.dtype)
        image = system.product(state.p)
        curvature = (state.p * image).sum(-1, keepdim=True)
        length = state.decrease / curvature
        # Step lengths lie between the inverses of the extreme eigenvalues: beyond 1/eps the matrix counts as singular.
        least = state.least.minimum(length)
        broken = (curvature <= 0) | (length * info.eps > least)
        length = length.masked_fill_(broken, 0.0)
        x = torch.addcmul(state.x, length, state.p)
        r = torch.addcmul(state.r, length, image, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)
        z, decrease = self._direction(system, r, norm)
        p = torch.addcmul(z, decrease / state.decrease.clamp_min(info.tiny), state.p)
        return _State(norm, broken.squeeze(1), x, r, p, decrease, least)

    def iterate(self, state: _State) -> tuple[Tensor, float, None]:
        return state.x, torch.inf, None

    def _direction(self, system: System, r: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        if not self.preconditioned:
            return r, norm.square().unsqueeze(1)
        z = system.precondition(r)
        return z, (r * z).sum(-1, keepdim=True)
