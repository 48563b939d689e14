"""LSMR."""

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
class LSMR(IterativeSolver):
    """MINRES on the normal equations, by Golub-Kahan bidiagonalization (Fong and Saunders 2011).

    Takes one product with :math:`A` and one with :math:`A^T` a step, and works on any system, even a singular one: it
    finds the minimum-norm solution of a consistent system, and the least-squares solution of an inconsistent one, with
    ``Status.BREAKDOWN``. Since the condition number enters squared, it is a last resort. Preconditioning is from the
    right. The images of the directions are kept too, which gives the residual itself; convergence is confirmed by the
    true one, at the cost of one product.

    Raises:
        ValueError: in :meth:`solve`, if the operator is neither symmetric nor has a ``transposed_product``.
    """

    max_steps: int = 1000

    def method(self, operator: LinearOperator) -> Method:
        if not operator.symmetric and operator.transposed_product is None:
            raise ValueError(
                "LSMR needs products with the transposed operator, and this operator has no transposed_product; "
                "give one, say that it is symmetric, or use GMRES."
            )
        return _LeastSquares()


class _State(NamedTuple):
    """Vectors ``[rows, dim]`` and scalars ``[rows, 1]`` in the paper's names; ``image`` and ``image_bar`` are those of
    ``h`` and ``h_bar``, and ``size`` is an estimate of the operator's squared Frobenius norm."""

    norm: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    h_bar: Tensor
    image: Tensor
    image_bar: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    zeta_bar: Tensor
    rho: Tensor
    rho_bar: Tensor
    c_bar: Tensor
    s_bar: Tensor
    theta: Tensor
    size: Tensor


class _LeastSquares(Method):
    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        beta = norm.unsqueeze(1)
        u, _ = _normalized(r)
        v, alpha = _normalized(system.precondition_transposed(system.transposed_product(u)))
        vector, zero = torch.zeros_like(r), torch.zeros_like(alpha)
        one = zero + 1
        return _State(
            norm, None, x, r, u, v, h=vector, h_bar=vector, image=vector, image_bar=vector, alpha=alpha,
            alpha_bar=alpha, zeta_bar=alpha * beta, rho=one, rho_bar=one, c_bar=one, s_bar=zero, theta=zero,
            size=alpha.square(),
        )  # fmt: skip

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        info = torch.finfo(state.r.dtype)
        direction = system.precondition(state.v)
        product = system.product(direction)
        turn = state.theta / state.rho.clamp_min(info.tiny)
        h = torch.addcmul(direction, turn, state.h, value=-1)
        image = torch.addcmul(product, turn, state.image, value=-1)
        # Golub-Kahan: beta u and alpha v continue the bidiagonalization
        u, beta = _normalized(torch.addcmul(product, state.alpha, state.u, value=-1))
        back = system.precondition_transposed(system.transposed_product(u))
        v, alpha = _normalized(torch.addcmul(back, beta, state.v, value=-1))

        # a rotation takes the bidiagonal B to an upper bidiagonal R (section 2.2) ...
        rho = torch.hypot(state.alpha_bar, beta).clamp_min_(info.tiny)
        c, s = state.alpha_bar / rho, beta / rho
        theta, alpha_bar = s * alpha, c * alpha
        # ... and a second one R^T to another: its last entry, zeta_bar, is the norm of A^T r
        theta_bar, turned = state.s_bar * rho, state.c_bar * rho
        rho_bar = torch.hypot(turned, theta).clamp_min_(info.tiny)
        c_bar, s_bar = turned / rho_bar, theta / rho_bar
        zeta, zeta_bar = c_bar * state.zeta_bar, -s_bar * state.zeta_bar

        # the iterate, and its residual by the same combination of the directions' images
        turn_bar = theta_bar * rho / (state.rho * state.rho_bar).clamp_min(info.tiny)
        h_bar = torch.addcmul(h, turn_bar, state.h_bar, value=-1)
        image_bar = torch.addcmul(image, turn_bar, state.image_bar, value=-1)
        length = zeta / (rho * rho_bar).clamp_min(info.tiny)
        x = torch.addcmul(state.x, length, h_bar)
        r = torch.addcmul(state.r, length, image_bar, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)
        size = state.size + alpha.square() + beta.square()
        # where only rounding is left of A^T r, this is a least-squares solution
        broken = zeta_bar.abs().squeeze(1) <= 10 * info.eps * size.sqrt().squeeze(1) * norm
        return _State(
            norm, broken, x, r, u, v, h, h_bar, image, image_bar, alpha, alpha_bar, zeta_bar, rho, rho_bar,
            c_bar, s_bar, theta, size,
        )  # fmt: skip

    def iterate(self, state: _State) -> tuple[Tensor, float, None]:
        return state.x, torch.inf, None


def _normalized(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` at length one, and its length (``[rows, 1]``); zero stays zero."""
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / length.clamp_min(torch.finfo(v.dtype).tiny), length
