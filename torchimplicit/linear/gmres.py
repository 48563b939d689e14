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

    ``directions`` (``[rows, capacity + 1, dim]``) are the z, the one to come among them, and ``images``
    (``[rows, capacity, dim]``) the q; ``upper`` (``[rows, capacity, capacity]``) has the columns of U as rows, without
    the diagonal, which ``sizes`` holds (``[rows, 1]`` each, as ``coefficients``); ``lengths`` are the norms of the z
    (``[rows]`` each).
    """

    norm: Tensor
    slow: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    lengths: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    directions: Tensor
    images: Tensor
    upper: Tensor


_FALL = 0.9
"""How far the residual has to fall in a step to be the next direction."""

_CHUNK = 6
"""Directions that memory is made for at first; it doubles as needed."""


def _threshold(dtype: torch.dtype) -> float:
    """The part of an image that has to be left by orthogonalization for it to be more than rounding.

    If less is left, the image was in the span of the ones before: the system is singular, as far as can be told.
    """
    return float(torch.finfo(dtype).eps ** 0.75)


class _AdaptiveSimplerGMRES(Method):
    kept = ("x", "lengths", "coefficients", "sizes", "directions", "images", "upper")

    def __init__(self, restart: int) -> None:
        self.cycle = self.restart = restart

    def start(self, system: System, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        capacity = min(_CHUNK, self.restart)
        rows, dim = r.shape
        directions, images = (_memory(r, size, rows, dim) for size in (capacity + 1, capacity))
        slow = torch.zeros_like(norm, dtype=torch.bool)
        return _State(norm, slow, None, x, r, (), (), (), directions, images, _memory(r, capacity, rows, capacity))

    def step(self, system: System, state: _State, slow: int | None) -> _State:
        k = len(state.sizes)
        directions, images, upper = state.directions, state.images, state.upper
        if k == images.shape[1]:
            directions, images, upper = _grown(state, min(2 * k, self.restart))
        r, place = state.r, directions[:, k]
        z, length, broken = r, state.norm, None
        if slow != 0 and k:
            z = torch.where(state.slow.unsqueeze(1), images[:, k - 1], z)
            length = length.masked_fill(state.slow, 1)
            broken = self._broken(state)
        if system.inverse is not None:
            z = system.precondition(z)
            length = torch.linalg.vector_norm(z, dim=-1)
        w = system.product(z)
        shared = r.data_ptr() == place.data_ptr()  # the residual was written where the direction belongs
        if shared and z is not r:
            r = r.clone()
        if not shared or z is not r:
            place.copy_(z)
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
        a = torch.linalg.vecdot(r, q).unsqueeze(-1)
        r = torch.addcmul(r, a, q, value=-1, out=directions[:, k + 1])
        norm = torch.linalg.vector_norm(r, dim=-1)
        return _State(
            norm=norm,
            slow=norm > _FALL * state.norm,
            broken=broken,
            x=state.x,
            r=r,
            lengths=(*state.lengths, length),
            coefficients=(*state.coefficients, a),
            sizes=(*state.sizes, size),
            directions=directions,
            images=images,
            upper=upper,
        )

    def iterate(self, state: _State) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """By the directions' coefficients from :math:`Ut = a`.

        From an image on that was all but in the span of the ones before, the coefficients say nothing and are dropped.
        """
        k = len(state.sizes)
        if not k:
            return state.x, 0.0, None
        info = torch.finfo(state.x.dtype)
        diagonal = torch.cat(state.sizes, 1).clamp_min_(info.tiny)
        columns = state.upper[:, :k, :k].tril(-1)
        columns.diagonal(dim1=1, dim2=2).copy_(diagonal)
        sizes = torch.linalg.vector_norm(columns, dim=-1)
        sound = (diagonal >= _threshold(state.x.dtype) * sizes).to(diagonal.dtype).cumprod(1)
        a = torch.cat(state.coefficients, 1) * sound
        t = torch.linalg.solve_triangular(columns.mT, a.unsqueeze(2), upper=True)
        x = torch.baddbmm(state.x.unsqueeze(1), t.mT, state.directions[:, :k]).squeeze(1)
        lengths = torch.stack(state.lengths, 1)
        growth = (sizes / lengths.clamp_min(info.tiny)).amax(1)
        gap = (t.squeeze(2).abs_() * lengths).sum(1) * growth * (4 * info.eps)
        return x, gap.masked_fill_(sound[:, -1] == 0, torch.inf), growth

    def _broken(self, state: _State) -> Tensor:
        """Where the latest image was in the span of the ones before; only looked for where the residual stagnates."""
        k = len(state.sizes)
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


def _memory(like: Tensor, capacity: int, rows: int, length: int) -> Tensor:
    """``[rows, capacity, length]``, where each ``[:, i]`` is contiguous."""
    return like.new_empty(capacity, rows, length).transpose(0, 1)


def _grown(state: _State, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The directions, the images and U in more memory."""
    rows, k, dim = state.images.shape
    directions = _memory(state.images, capacity + 1, rows, dim)
    directions[:, : k + 1] = state.directions
    images = _memory(state.images, capacity, rows, dim)
    images[:, :k] = state.images
    upper = _memory(state.upper, capacity, rows, capacity)
    upper[:, :k, :k] = state.upper
    return directions, images, upper
