"""MINRES, for symmetric systems that may be indefinite."""

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
class MINRES(IterativeSolver):
    """Minimal residuals (Paige and Saunders 1975), for symmetric systems, indefinite ones too.

    The system may be singular along the operator's null vector: the right-hand side and the solution are projected,
    and the preconditioner is made consistent with it. The preconditioner has to be symmetric positive definite even
    where the system is not (``Jacobi`` and ``Diagonal`` take absolute values). The recurrences are those of Algorithm
    2.4 of Elman, Silvester and Wathen, *Finite Elements and Fast Iterative Solvers* (2005). They minimize the
    residual's norm in :math:`M^{-1}`, and they drift; so the plain residual is carried along, and convergence is
    confirmed by the true one, at the cost of one product. Where it is not confirmed, the method restarts from there.

    The curvatures :math:`z^TAz/z^TMz` along the residuals, with :math:`z=M^{-1}r`, cost nothing, and reveal negative
    eigenvalues (Liu and Roosta 2022, SIAM J. Optim. 32:2636): the report's ``curvature`` is the smallest one where it
    is negative. A residual without curvature that A does not annihilate proves a negative eigenvalue too, since
    :math:`\\lVert Ar\\rVert^2\\le\\lVert A\\rVert r^TAr` holds for semidefinite A; ``curvature`` is then a bound.
    """

    max_steps: int = 1000

    def method(self, operator: LinearOperator) -> Method:
        return _MinimalResiduals(
            preconditioned=self.preconditioner is not None, rounding=ROUNDING * torch.finfo(operator.dtype).eps
        )


class _State(NamedTuple):
    """Vectors ``[rows, dim]`` of the last two steps, and scalars ``[rows, 1]``: those of the rotations, in the book's
    names; ``least``, the smallest curvature met; ``turn``, the largest :math:`\\lVert Ar\\rVert/\\lVert r\\rVert` of a
    residual without curvature; and ``size``, the norm of the tridiagonal matrix."""

    norm: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor | None
    z: Tensor
    v: Tensor
    v_old: Tensor
    w: Tensor
    w_old: Tensor
    gamma: Tensor
    gamma_old: Tensor
    eta: Tensor
    c: Tensor
    c_old: Tensor
    s: Tensor
    s_old: Tensor
    least: Tensor
    turn: Tensor
    size: Tensor

    @property
    def curvature(self) -> Tensor:
        """The smallest curvature known, infinite where none is negative."""
        # On the span of r and Ar, A is [0 t; t d] with |d| at most twice ``size``: without curvature along r, its least
        # eigenvalue is at most about -t^2 / (4 size).
        bound = self.turn * (self.turn / self.size.clamp_min(torch.finfo(self.size.dtype).tiny)) * -0.25
        met = self.least.minimum(bound)
        return met.masked_fill(met >= 0, torch.inf)


@dataclass
class _MinimalResiduals(Method):
    preconditioned: bool
    rounding: float

    kept = ("x", "least", "turn", "size")
    definite = True
    curved = True

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        z, gamma = self._precondition(system, r)
        vector, zero = torch.zeros_like(r), torch.zeros_like(gamma)
        one = zero + 1
        return _State(
            norm, None, x, r if self.preconditioned else None, z, v=r, v_old=vector, w=vector, w_old=vector,
            gamma=gamma, gamma_old=one, eta=gamma, c=one, c_old=one, s=zero, s_old=zero,
            least=torch.full_like(gamma, torch.inf), turn=zero, size=zero,
        )  # fmt: skip

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        _, _, x, r, z, v, v_old, w, w_old, gamma, gamma_old, eta, c, c_old, s, s_old, least, turn, size = state
        info = torch.finfo(x.dtype)
        inverse = gamma.clamp_min(info.tiny).reciprocal_()
        z = z * inverse
        image = system.product(z)
        delta = (image * z).sum(-1, keepdim=True)
        v_new = torch.addcmul(image, delta * inverse, v, value=-1)
        v_new.addcmul_(gamma / gamma_old.clamp_min(info.tiny), v_old, value=-1)
        z_new, gamma_new = self._precondition(system, v_new)

        # the new column of the tridiagonal matrix, under the last two rotations and a new one
        turned = c_old * gamma
        a0 = c * delta - s * turned
        a2 = s * delta + c * turned
        a3 = s_old * gamma
        size = size.maximum(delta.abs() + gamma_new)
        curvature = c * a0  # of the residual before this step
        least = least.minimum(curvature)
        turn = turn.maximum((c * gamma_new).abs_().masked_fill_(curvature.abs() > self.rounding * size, 0.0))
        a1 = torch.hypot(a0, gamma_new)
        broken = a1 <= 10 * info.eps * (a2.abs() + a3)  # a pivot of nothing but rounding
        a1.masked_fill_(broken, torch.inf)  # makes the step zero
        c_new, s_new = a0 / a1, gamma_new / a1
        w_new = torch.addcmul(z, a3, w_old, value=-1).addcmul_(a2, w, value=-1).div_(a1)
        length = c_new * eta
        x = torch.addcmul(x, length, w_new)
        if r is None:  # without a preconditioner |eta| is the norm of the plain residual
            eta = -s_new * eta
            norm = eta.abs().squeeze(1)
        else:
            r = torch.addcmul(s_new.square() * r, length / a1, v_new, value=-1)
            eta = -s_new * eta
            norm = torch.linalg.vector_norm(r, dim=-1)
        broken = broken.squeeze(1)
        norm = state.norm.where(broken, norm)
        return _State(
            norm, broken, x, r, z_new, v_new, v, w_new, w, gamma_new, gamma, eta, c_new, c, s_new, s, least, turn, size
        )

    def iterate(self, state: _State) -> tuple[Tensor, float, Tensor]:
        return state.x, torch.inf, state.size.squeeze(1)

    def _precondition(self, system: LinearSystem, v: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`M^{-1}v`, and the norm of v in :math:`M^{-1}`, ``[rows, 1]``."""
        if not self.preconditioned:
            return v, torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        z = system.precondition(v)
        return z, (z * v).sum(-1, keepdim=True).clamp_min_(0.0).sqrt_()
