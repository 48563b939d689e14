"""BiCGStab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.system import LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class BiCGStab(IterativeSolver):
    """Stabilized bi-conjugate gradients (van der Vorst 1992), for non-symmetric systems in little memory.

    Two products a step. Preconditioning is from the right. Where one of its three divisors vanishes, the method
    restarts from its iterate with a new shadow residual, and gives up (``Status.BREAKDOWN``) where that makes no
    progress, as on skew-symmetric systems. Convergence is confirmed by the true residual, at the cost of one product.
    """

    def method(self, operator: LinearOperator) -> Method:
        return _StabilizedBiCG()


class _State(NamedTuple):
    """``shadow`` is the shadow residual :math:`\\hat r`, and ``product`` :math:`\\hat r^T r`, ``[rows, 1]``."""

    norm: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    shadow: Tensor
    shadow_norm: Tensor
    p: Tensor
    product: Tensor


class _StabilizedBiCG(Method):
    monotone = False

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        column = norm.unsqueeze(1)
        return _State(norm, None, x, r, r, column, r, column.square())

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        _, _, x, r, shadow, shadow_norm, p, product = state
        eps = torch.finfo(r.dtype).eps
        direction = system.precondition(p)
        v = system.product(direction)
        # half a step of BiCG, whose residual is orthogonal to the shadow residual's Krylov space ...
        # (a divisor of nothing but rounding is a breakdown: the step length would be noise)
        divisor = (shadow * v).sum(-1, keepdim=True)
        broken = divisor.abs() <= eps * shadow_norm * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        alpha = (product / divisor).masked_fill_(broken, 0.0)
        half = torch.addcmul(r, alpha, v, value=-1)

        # ... and half a step of minimal residual, which smooths it (van der Vorst 1992)
        correction = system.precondition(half)
        t = system.product(correction)
        overlap, square = (t * half).sum(-1, keepdim=True), t.square().sum(-1, keepdim=True)
        flat = overlap.square() <= eps**2 * square * half.square().sum(-1, keepdim=True)
        omega = (overlap / square).masked_fill_(flat, 0.0)
        x = torch.addcmul(x, alpha, direction).addcmul_(omega, correction)
        r = torch.addcmul(half, omega, t, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)

        product_new = (shadow * r).sum(-1, keepdim=True)
        broken = broken | flat | (product_new.abs() <= eps * shadow_norm * norm.unsqueeze(1))
        beta = (product_new / product * (alpha / omega)).masked_fill_(broken, 0.0)
        p = torch.addcmul(r, beta, torch.addcmul(p, omega, v, value=-1))
        return _State(norm, broken.squeeze(1), x, r, shadow, shadow_norm, p, product_new)

    def iterate(self, state: _State) -> tuple[Tensor, float, None]:
        return state.x, torch.inf, None  # its recurrence is known to drift, and bounds nothing
