"""GMRES, in the form that keeps the images of the search directions orthonormal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.system import System
from torchimplicit.validation import check_count


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
        check_count(self, "restart")

    def _method(self, operator: LinearOperator) -> Method:
        return _AdaptiveSimplerGMRES(self.restart)


class _State(NamedTuple):
    """What is known after k steps.

    ``images`` (``[rows, capacity, dim]``) are the q; ``upper`` (``[rows, capacity, capacity]``) has the columns of U as
    rows, without the diagonal, which ``sizes`` holds (``[rows, 1]`` each, as ``coefficients``).
    """

    norm: Tensor
    slow: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    directions: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    images: Tensor
    upper: Tensor


_FALL = 0.9
"""How far the residual has to fall in a step to be the next direction."""

_CHUNK = 12
"""Directions that memory is made for at first; it doubles as needed."""


def _threshold(dtype: torch.dtype) -> float:
    """The part of an image that has to be left by orthogonalization for it to be more than rounding.

    If less is left, the image was in the span of the ones before: the system is singular, as far as can be told.
    """
    return float(torch.finfo(dtype).eps ** 0.75)


class _AdaptiveSimplerGMRES(Method):
    kept = ("x", "directions", "coefficients", "sizes", "images", "upper")

    def __init__(self, restart: int) -> None:
        self.cycle = self.restart = restart

    def start(self, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        capacity = min(_CHUNK, self.restart)
        images = r.new_empty(capacity, *r.shape).transpose(0, 1)
        upper = r.new_empty(capacity, len(r), capacity).transpose(0, 1)
        slow = torch.zeros_like(norm, dtype=torch.bool)
        return _State(norm, slow, None, x, r, (), (), (), images, upper)

    def step(self, system: System, state: _State, slow: int | None) -> _State:
        k = len(state.directions)
        images, upper = state.images, state.upper
        if k == images.shape[1]:
            images, upper = _grown(images, upper, min(2 * k, self.restart))
        z, broken = state.r, None
        if slow != 0 and k:
            z = torch.where(state.slow.unsqueeze(1), images[:, k - 1], z)
            broken = self._broken(state)
        z = system.precondition(z)
        w = system.product(z)
        if k:
            basis = images[:, :k]
            w, h = _orthogonalized(w, basis)
            if slow != 0:
                # Where the residual falls well, the directions are well conditioned, and once is enough.
                w, more = _orthogonalized(w, basis)
                h += more
            upper[:, k, :k] = h
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        q = torch.div(w, size.clamp_min(torch.finfo(w.dtype).tiny), out=images[:, k])
        a = (state.r * q).sum(-1, keepdim=True)
        r = torch.addcmul(state.r, a, q, value=-1)
        norm = torch.linalg.vector_norm(r, dim=-1)
        return _State(
            norm=norm,
            slow=norm > _FALL * state.norm,
            broken=broken,
            x=state.x,
            r=r,
            directions=(*state.directions, z),
            coefficients=(*state.coefficients, a),
            sizes=(*state.sizes, size),
            images=images,
            upper=upper,
        )

    def iterate(self, state: _State) -> tuple[Tensor, Tensor | float]:
        """The directions' coefficients from :math:`Ut = a`, and the bound of the rounding in their sum.

        From an image on that was all but in the span of the ones before, the coefficients say nothing and are dropped.
        """
        k = len(state.directions)
        if not k:
            return state.x, 0.0
        info = torch.finfo(state.x.dtype)
        diagonal = torch.cat(state.sizes, 1).clamp_min_(info.tiny)
        columns = state.upper[:, :k, :k].tril(-1)
        columns.diagonal(dim1=1, dim2=2).copy_(diagonal)
        sizes = torch.linalg.vector_norm(columns, dim=-1)
        sound = (diagonal >= _threshold(state.x.dtype) * sizes).to(diagonal.dtype).cumprod(1)
        a = torch.cat(state.coefficients, 1) * sound
        t = torch.linalg.solve_triangular(columns.mT, a.unsqueeze(2), upper=True)
        directions = torch.stack(state.directions).transpose(0, 1)
        x = torch.baddbmm(state.x.unsqueeze(1), t.mT, directions).squeeze(1)
        lengths = torch.linalg.vector_norm(directions, dim=-1)
        growth = (sizes / lengths.clamp_min(info.tiny)).amax(1)
        gap = (t.squeeze(2).abs_() * lengths).sum(1) * growth * (4 * info.eps)
        return x, gap.masked_fill_(sound[:, -1] == 0, torch.inf)

    def size(self, state: _State) -> Tensor | None:
        if not state.directions:
            return None
        lengths = torch.linalg.vector_norm(torch.stack(state.directions), dim=-1)
        sizes = torch.cat(state.sizes, 1).mT
        return (sizes / lengths.clamp_min(torch.finfo(sizes.dtype).tiny)).amax(0)

    def _broken(self, state: _State) -> Tensor:
        """Where the latest image was in the span of the ones before; only looked for where the residual stagnates."""
        k = len(state.directions)
        size = state.sizes[-1].squeeze(1)
        before = torch.linalg.vector_norm(state.upper[:, k - 1, : k - 1], dim=-1)
        return size <= _threshold(size.dtype) * before.hypot(size)


def _orthogonalized(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` without its components along the rows of ``basis`` (``[rows, k, dim]``), and these (``[rows, k]``)."""
    if basis.shape[1] * basis.shape[2] < 400:  # batched products of matrices so small are slow on CPUs
        h = (basis * w.unsqueeze(1)).sum(-1)
        return w - (basis * h.unsqueeze(2)).sum(1), h
    w = w.unsqueeze(1)
    h = torch.bmm(w, basis.mT)
    return torch.baddbmm(w, h, basis, alpha=-1).squeeze(1), h.squeeze(1)


def _grown(images: Tensor, upper: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same in more memory, one image after the other, so that each is contiguous."""
    rows, k, dim = images.shape
    more = images.new_empty(capacity, rows, dim).transpose(0, 1)
    more[:, :k] = images
    corner = upper.new_empty(capacity, rows, capacity).transpose(0, 1)
    corner[:, :k, :k] = upper
    return more, corner
