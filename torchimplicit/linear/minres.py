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
    2.4 of Elman, Silvester and Wathen, *Finite Elements and Fast Iterative Solvers* (2005). What they minimise is the
    residual's norm in :math:`M^{-1}`, and they drift, so the plain residual is carried along, and convergence confirmed
    by the true one, at the cost of one product; where it is not confirmed, the method starts again from there.

    The residuals pass through every direction that the method has seen, and their curvatures
    :math:`z^TAz/z^TMz` with :math:`z=M^{-1}r` cost nothing (Liu and Roosta 2022, SIAM J. Optim. 32:2636): the report's
    ``curvature`` is the least one where it is negative. A residual along which there is no curvature at all, though A
    does not annihilate it, proves a negative eigenvalue too, since :math:`\\lVert Ar\\rVert^2\\le\\lVert A\\rVert
    r^TAr` where there is none; ``curvature`` is a bound for it then.
    """

    max_steps: int = 1000

    def method(self, operator: LinearOperator) -> Method:
        return _MinimalResiduals(
            preconditioned=self.preconditioner is not None, rounding=ROUNDING * torch.finfo(operator.dtype).eps
        )


class _State(NamedTuple):
    """Vectors ``[rows, dim]``, each with that of the step before, and the rotations' scalars, ``[rows, 1]``; so are the
    least curvature that was met, the largest :math:`\\lVert Ar\\rVert/\\lVert r\\rVert` of a residual without
    curvature (``turn``), and the ``size`` of the tridiagonal matrix."""

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
        """The least that is known of, infinite where none is negative."""
        # on the span of r and Ar, where A is at most twice ``size``, no curvature along r means as much elsewhere
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

        # The new column of the tridiagonal matrix, under the two rotations before it and the one it calls for.
        turned = c_old * gamma
        a0 = c * delta - s * turned
        a2 = s * delta + c * turned
        a3 = s_old * gamma
        size = size.maximum(delta.abs() + gamma_new)
        curvature = c * a0  # of the residual before this step
        least = least.minimum(curvature)
        turn = turn.maximum((c * gamma_new).abs_().masked_fill_(curvature.abs() > self.rounding * size, 0.0))
        a1 = torch.hypot(a0, gamma_new)
        broken = a1 <= 10 * info.eps * (a2.abs() + a3)
        a1.masked_fill_(broken, torch.inf)
        c_new, s_new = a0 / a1, gamma_new / a1
        w_new = torch.addcmul(z, a3, w_old, value=-1).addcmul_(a2, w, value=-1).div_(a1)
        length = c_new * eta
        x = torch.addcmul(x, length, w_new)
        if r is None:
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
        """:math:`M^{-1}v`, and the norm of v that belongs to it (``[rows, 1]``)."""
        if not self.preconditioned:
            return v, torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        z = system.precondition(v)
        return z, (z * v).sum(-1, keepdim=True).clamp_min_(0.0).sqrt_()
