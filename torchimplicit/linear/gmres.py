"""GMRES, in the form that keeps the images of the search directions orthonormal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.linear.basis import Basis
from torchimplicit.linear.cycle import Method
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.rowwise import select
from torchimplicit.linear.system import LinearSystem
from torchimplicit.validation import check_count


@final
@dataclass(frozen=True, kw_only=True)
class GMRES(IterativeSolver):
    """GMRES: the minimal residual over the Krylov space, for any regular system. The default for non-symmetric ones.

    This is adaptive simpler GMRES (Jiranek and Rozloznik, *Adaptive version of simpler GMRES*, Numer. Algorithms 2010).
    It orthogonalizes the images :math:`AZ = QU` of the search directions instead of the directions, so that the
    residual itself is available in every step, without rotations. The next direction is the residual where that has
    fallen well, which keeps Z well conditioned, and otherwise the last image, which avoids breakdown on skew-symmetric
    systems. Preconditioning is from the right, so the residual is the true one. Residuals lie in the span of the first
    one and the images, and need not be stored.

    Attributes:
        restart: the number of images that are kept: one vector per sample each, two with a preconditioner. Memory is
            allocated as they are made.

    Raises:
        ValueError: a number is out of range.
    """

    restart: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "restart")

    def method(self, operator: LinearOperator) -> Method:
        return _AdaptiveSimplerGMRES(self.restart)


class _State(NamedTuple):
    """The state after k steps. Tuples have one entry per step.

    Attributes:
        r, first: the residual, and the first one.
        turned: bool ``[rows]``, the rows whose direction was not the residual; ``None``: it was for all.
        lengths: the norms of the directions z, ``[rows]``.
        coefficients: the products of the residual with the images, a in the paper, ``[rows, 1]``.
        sizes: the diagonal of U, ``[rows, 1]``.
        columns: the columns of U above the diagonal, ``[rows, i]`` for the i-th.
        images: the orthonormal q.
        directions: the preconditioned z; ``None``: they follow from the residuals.
    """

    norm: Tensor
    slow: Tensor
    broken: Tensor | None
    x: Tensor
    r: Tensor
    first: Tensor
    turned: tuple[Tensor | None, ...]
    lengths: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    images: Basis
    directions: Basis | None


FALL = 0.9
"""The residual has to fall to this share in a step to be the next direction."""


def threshold(dtype: torch.dtype) -> float:
    """The share of an image that orthogonalization has to leave for it to be more than rounding.

    If less is left, the image was in the span of the ones before, and the system is numerically singular.
    """
    return float(torch.finfo(dtype).eps ** 0.75)


class _AdaptiveSimplerGMRES(Method):
    kept = ("x", "first", "turned", "lengths", "coefficients", "sizes", "columns", "images", "directions")

    def __init__(self, restart: int) -> None:
        self.cycle = self.restart = restart

    def start(self, system: LinearSystem, b: Tensor, x: Tensor, r: Tensor, norm: Tensor) -> _State:
        images = Basis.empty(r, self.restart)
        directions = None if system.inverse is None else Basis.empty(r, self.restart)
        slow = torch.zeros_like(norm, dtype=torch.bool)
        return _State(norm, slow, None, x, r, r, (), (), (), (), (), images, directions)

    def step(self, system: LinearSystem, state: _State, slow: int | None) -> _State:
        k, r, images, directions = len(state.sizes), state.r, state.images, state.directions
        z, length, turned, broken = r, state.norm, None, None
        if slow != 0 and k:  # some rows stagnate, or it is not known whether any does (``None``)
            turned, broken = state.slow, self._broken(state)
            z = torch.where(turned.unsqueeze(1), images.slot(k - 1), r)
            length = length.masked_fill(turned, 1)
        if directions is not None:
            z = system.precondition(z)
            length = torch.linalg.vector_norm(z, dim=-1)
            directions = directions.longer()
            directions.slot(k).copy_(z)
        w = system.product(z)
        if k:
            column = images.inner(w)
            w = images.less(w, column)
            if slow != 0:
                # Orthogonalized twice, for ill-conditioned directions. Where the residual falls well, the directions
                # are well conditioned, and once is enough.
                more = images.inner(w)
                w, column = images.less(w, more), column + more
        else:
            column = r.new_empty(len(r), 0)
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp_min_(torch.finfo(w.dtype).tiny)
        images = images.longer()
        q = torch.div(w, size, out=images.slot(k))
        a = torch.linalg.vecdot(r, q).unsqueeze(1)
        after = torch.addcmul(r, a, q, value=-1)
        norm = torch.linalg.vector_norm(after, dim=-1)
        return _State(
            norm=norm,
            slow=norm > FALL * state.norm,
            broken=broken,
            x=state.x,
            r=after,
            first=state.first,
            turned=(*state.turned, turned),
            lengths=(*state.lengths, length),
            coefficients=(*state.coefficients, a),
            sizes=(*state.sizes, size),
            columns=(*state.columns, column),
            images=images,
            directions=directions,
        )

    def select(self, state: _State, rows: Tensor) -> _State:
        """In the memory of the basis, of which a copy would be the most that a solve holds."""
        images, directions = state.images, state.directions
        rest: _State = select(state._replace(images=Basis((), 0), directions=None), rows)
        return rest._replace(
            images=images.select(rows), directions=None if directions is None else directions.select(rows)
        )

    def iterate(self, state: _State) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """The iterate :math:`x + Zt` with :math:`Ut = a`.

        Coefficients from the first image on that was numerically in the span of the ones before are dropped as noise.
        """
        k = len(state.sizes)
        if not k:
            return state.x, 0.0, None
        info = torch.finfo(state.x.dtype)
        zeros, rows = state.x.new_zeros(len(state.x), k - 1), []
        for i, (column, size) in enumerate(zip(state.columns, state.sizes, strict=True)):
            rows += [column, size, zeros.narrow(1, 0, k - 1 - i)]
        columns = torch.cat(rows, 1).unflatten(1, (k, k))
        diagonal = columns.diagonal(dim1=1, dim2=2).clamp_min_(info.tiny)  # cleared rows have a diagonal of zeros
        sizes = torch.linalg.vector_norm(columns, dim=-1)
        sound = (diagonal >= threshold(state.x.dtype) * sizes).to(diagonal.dtype).cumprod(1)
        steps = torch.cat(state.coefficients, 1)
        t = torch.linalg.solve_triangular(columns.mT, (steps * sound).unsqueeze(2), upper=True).squeeze(2)
        lengths = torch.stack(state.lengths, 1)
        growth = (sizes / lengths.clamp_min(info.tiny)).amax(1)  # |A z| / |z|, a lower bound of |A|
        if state.directions is None:
            x, whole = self._spanned(state, t, steps), lengths.maximum(lengths.narrow(1, 0, 1))
        else:
            x, whole = state.directions.less(state.x, -t), lengths
        # the rounding of the products that the iterate is composed of
        gap = (t.abs() * whole).sum(1) * growth * (4 * info.eps)
        return x, gap.masked_fill_(sound[:, -1] == 0, torch.inf), growth

    @staticmethod
    def _spanned(state: _State, t: Tensor, steps: Tensor) -> Tensor:
        """The iterate from the first residual and the images: :math:`r_k = r_0 - \\sum_{j<k} a_j q_j`."""
        turned = [mask for mask in state.turned if mask is not None]
        if turned:
            none = torch.zeros_like(turned[0])
            other = torch.stack([none if mask is None else mask for mask in state.turned], 1)
            along_residual = t.masked_fill(other, 0)
        else:
            along_residual = t
        sums = along_residual.cumsum(1)
        total = sums.narrow(1, t.shape[1] - 1, 1)
        weights = (total - sums) * steps  # what multiplies minus the images, summed over the residuals
        if turned:
            weights.narrow(1, 0, t.shape[1] - 1).sub_((t - along_residual).narrow(1, 1, t.shape[1] - 1))
        return state.images.less(torch.addcmul(state.x, total, state.first), weights)

    def _broken(self, state: _State) -> Tensor:
        """bool ``[rows]``: where the latest image was in the span of the ones before. Tested only under stagnation."""
        size = state.sizes[-1].squeeze(1)
        before = torch.linalg.vector_norm(state.columns[-1], dim=-1)
        return size <= (threshold(size.dtype) * before.hypot(size)).clamp_min(torch.finfo(size.dtype).tiny)
