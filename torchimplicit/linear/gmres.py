"""GMRES, in the form that keeps the images of the search directions orthonormal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.options import check_count
from torchimplicit.linear.system import System


@final
@dataclass(frozen=True, kw_only=True)
class GMRES(IterativeSolver):
    """The least residual over the Krylov space, for any regular system: the default for non-symmetric ones.

    Adaptive simpler GMRES (Jiranek and Rozloznik, *Adaptive version of simpler GMRES*, Numer. Algorithms 2010): the
    images :math:`AZ = QU` of the search directions are orthogonalized instead of the directions, so that the residual
    itself is at hand in every step, with no rotations. The next direction is the residual where that has fallen well,
    which keeps Z well conditioned, and the last image otherwise, which keeps the method from breaking down on
    skew-symmetric systems. Preconditioning is from the right, so that the residual is the true one.

    Attributes:
        restart: directions that are kept, ``2 * restart`` vectors a sample at most; the memory grows as they are made.
    """

    restart: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "restart", self.restart)

    def _method(self, operator: LinearOperator) -> Method:
        return _AdaptiveSimplerGMRES(self.restart)


class _State(NamedTuple):
    """``images`` (``[rows, capacity, dim]``) are the q, ``upper`` (``[rows, capacity, capacity]``) the columns of U."""

    norm: Tensor
    slow: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    directions: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    images: Tensor
    upper: Tensor


_FALL = 0.9
"""How far the residual has to fall in a step to be the next direction."""

_CHUNK = 8
"""Directions that memory is made for at first; it doubles as needed."""


def _sound(columns: Tensor) -> Tensor:
    """Whether the last entry of a column of U (``[..., k]``) is more than the rounding left by orthogonalization.

    If it is not, the image was in the span of the ones before: the system is singular, as far as can be told.
    """
    return columns[..., -1] > torch.finfo(columns.dtype).eps ** 0.75 * torch.linalg.vector_norm(columns, dim=-1)


class _AdaptiveSimplerGMRES(Method):
    def __init__(self, restart: int) -> None:
        self.cycle = restart

    def start(self, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        capacity = min(_CHUNK, self.cycle)
        images = r.new_empty(capacity, *r.shape).transpose(0, 1)
        upper = r.new_empty(capacity, len(r), capacity).transpose(0, 1)
        return _State(norm, torch.zeros_like(norm, dtype=torch.bool), None, x, r, (), (), images, upper)

    def step(self, system: System, state: _State, slow: int | None) -> _State:
        k = len(state.directions)
        images, upper = state.images, state.upper
        if k == images.shape[1]:
            images, upper = _grown(images, upper, min(2 * k, self.cycle))
        z = state.r
        broken = None
        if slow != 0 and k:
            z = torch.where(state.slow.unsqueeze(1), images[:, k - 1], z)
            broken = ~_sound(upper[:, k - 1, :k])
        z = system.precondition(z)
        w = system.product(z)
        if k:
            w = w.unsqueeze(1)
            basis = images[:, :k]
            h = torch.bmm(w, basis.mT)
            w = torch.baddbmm(w, h, basis, alpha=-1)
            again = torch.bmm(w, basis.mT)
            w = torch.baddbmm(w, again, basis, alpha=-1).squeeze(1)
            torch.add(h.squeeze(1), again.squeeze(1), out=upper[:, k, :k])
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        upper[:, k, k:k + 1] = size
        q = torch.div(w, size.clamp_min_(torch.finfo(w.dtype).tiny), out=images[:, k])
        a = (state.r * q).sum(-1, keepdim=True)
        r = torch.addcmul(state.r, a, q, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)
        directions, coefficients = (*state.directions, z), (*state.coefficients, a)
        return _State(norm, norm > _FALL * state.norm, broken, state.x, r, directions, coefficients, images, upper)

    def iterate(self, state: _State, rows: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """The directions' coefficients from :math:`Ut = a`.

        A direction whose image was all but in the span of the ones before says nothing: from there on the coefficients
        are dropped. The gap is that of rounding in the sum of the images.
        """
        k = len(state.directions)
        if rows is None:
            rows = slice(None)
        x = state.x[rows]
        if not k:
            return x, 0.0
        columns = state.upper[rows, :k, :k].tril()
        sizes = torch.linalg.vector_norm(columns, dim=-1)
        eps = torch.finfo(x.dtype).eps
        diagonal = columns.diagonal(dim1=1, dim2=2)
        sound = (diagonal > eps**0.75 * sizes).cumprod(1) > 0
        diagonal.masked_fill_(~sound, 1.0)
        a = torch.cat(state.coefficients, 1)[rows].where(sound, 0.0)
        t = torch.linalg.solve_triangular(columns.mT, a.unsqueeze(2), upper=True)
        directions = torch.stack([z[rows] for z in state.directions]).transpose(0, 1)
        x = torch.baddbmm(x.unsqueeze(1), t.mT, directions).squeeze(1)
        gap = eps * (t.squeeze(2).abs() * sizes).sum(1)
        return x, gap.where(sound[:, -1], torch.inf)


def _grown(images: Tensor, upper: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same in more memory, one image after the other, so that each is contiguous."""
    rows, k, dim = images.shape
    more = images.new_empty(capacity, rows, dim).transpose(0, 1)
    more[:, :k] = images
    corner = upper.new_empty(capacity, rows, capacity).transpose(0, 1)
    corner[:, :k, :k] = upper
    return more, corner
