"""Coordinates to solve in: those of a metric, in which a problem is better conditioned, and those of a hyperplane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """Coordinates :math:`q = S^{1/2}z`, in which the Euclidean length is :math:`\\langle z, S z\\rangle^{1/2}`.

    If :math:`S` is the overlap matrix of a basis, the length of a change of the coefficients is the :math:`L_2` norm of
    the change of the function, for every basis (Löwdin 1950). A solver that steps along gradients, or measures them,
    then works in the geometry of the function. The roots :math:`S^{\\pm1/2}` are computed once, on construction.

    Args:
        matrix: :math:`S`, symmetric positive definite, ``[dim, dim]``, or ``[batch, dim, dim]`` for one per sample;
            ``dim`` counts all entries of a sample's state. No derivative is taken with respect to it, since the
            solution does not depend on it.

    Raises:
        ValueError: the matrix is not square, not symmetric, or not positive definite beyond rounding.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        s = self.matrix.detach()
        if s.ndim not in (2, 3) or s.shape[-1] != s.shape[-2] or not s.is_floating_point():
            raise ValueError(
                f"Metric.matrix has shape {tuple(s.shape)} and dtype {s.dtype}: give a floating [dim, dim], or "
                "[batch, dim, dim] for one per sample"
            )
        s = s.reshape(-1, *s.shape[-2:])
        size = s.abs().amax(dim=(1, 2), keepdim=True)
        if not bool(((s - s.mT).abs() <= 1e3 * torch.finfo(s.dtype).eps * size).all()):
            raise ValueError("Metric.matrix is not symmetric: give (S + S.mT) / 2 if it is so up to noise")
        values, basis = torch.linalg.eigh(s.double())
        least = values[:, 0]
        if not bool((least > torch.finfo(s.dtype).eps * values[:, -1]).all()):
            raise ValueError(
                f"Metric.matrix is not positive definite: its least eigenvalue is {float(least.min()):.2g}, its "
                f"largest {float(values[:, -1].max()):.2g}. Take linearly dependent functions out of the basis"
            )
        for name, power in (("_root", 0.5), ("_inverse", -0.5)):
            object.__setattr__(self, name, ((basis * values[:, None, :] ** power) @ basis.mT).to(s.dtype))

    @property
    def root(self) -> Tensor:
        """:math:`S^{1/2}`, ``[batch or 1, dim, dim]``."""
        root: Tensor = self.__dict__["_root"]
        return root

    @property
    def inverse(self) -> Tensor:
        """:math:`S^{-1/2}`, ``[batch or 1, dim, dim]``."""
        inverse: Tensor = self.__dict__["_inverse"]
        return inverse

    def covector(self, w: Tensor) -> Tensor:
        """The coordinates :math:`S^{-1/2}w` of a covector :math:`w` (``[batch or 1, dim]``), for which the product with
        the state stays the same."""
        return _times(self.inverse, w.expand(max(len(w), len(self.inverse)), -1))


class Reflection(NamedTuple):
    """Coordinates in the hyperplane :math:`\\langle n, z\\rangle = c`, :math:`\\lVert n\\rVert = 1`, by a Householder
    reflection.

    The reflection takes :math:`n` to :math:`\\mp` the first unit vector; the other coordinates are those in an
    orthonormal basis of :math:`n^\\perp` (Golub and Van Loan 2013, section 5.1).

    Attributes:
        mirror: the reflection's unit normal, ``[batch or 1, dim]``.
        first: the first coordinate of the hyperplane's points, ``[batch or 1, 1]``.
    """

    mirror: Tensor
    first: Tensor

    @classmethod
    def of(cls, normal: Tensor, offset: Tensor) -> Self:
        """The reflection for unit normals ``[batch or 1, dim]`` and offsets ``[batch or 1, 1]``; differentiable in
        both."""
        # of the two reflections, the one whose mirror does not cancel
        sign = torch.where(normal[:, :1] < 0, -1, 1)
        mirror = torch.cat((normal[:, :1] + sign, normal[:, 1:]), dim=1)
        return cls(mirror / torch.linalg.vector_norm(mirror, dim=1, keepdim=True), -sign * offset)

    def reflect(self, z: Tensor) -> Tensor:
        """The mirror image of ``z`` (``[batch, dim]``)."""
        return z - 2 * (z * self.mirror).sum(dim=1, keepdim=True) * self.mirror


@final
@dataclass(frozen=True, eq=False)
class Coordinates:
    """The map between flat states ``[batch, dim]`` and the coordinates that a solver works in.

    Attributes:
        metric: the metric; ``None``: the state's own coordinates.
        reflection: for the hyperplane that the state lies in, in the metric's coordinates; ``None`` without one.
    """

    metric: Metric | None = None
    reflection: Reflection | None = None

    def encode(self, z: Tensor) -> Tensor:
        """The coordinates of ``z``; for a state outside the hyperplane, those of its projection."""
        if self.metric is not None:
            z = _times(self.metric.root, z)
        return z if self.reflection is None else self.reflection.reflect(z)[:, 1:]

    def decode(self, q: Tensor) -> Tensor:
        """The state that has the coordinates ``q``."""
        if self.reflection is not None:
            q = self.reflection.reflect(torch.cat((self.reflection.first.to(q).expand(len(q), -1), q), dim=1))
        return q if self.metric is None else _times(self.metric.inverse, q)

    @property
    def per_sample(self) -> bool:
        """True if any of the tensors differs from sample to sample."""
        tensors = [] if self.metric is None else [self.metric.root]
        return any(len(t) > 1 for t in (*tensors, *(self.reflection or ())))


def _times(matrix: Tensor, z: Tensor) -> Tensor:
    """Symmetric matrices ``[batch or 1, dim, dim]`` times vectors ``[batch, dim]``."""
    matrix = matrix.to(z)
    if len(matrix) == 1:
        return z @ matrix[0]
    return torch.bmm(matrix, z[:, :, None])[:, :, 0]
