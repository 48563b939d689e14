"""Other coordinates for the state: of a metric in which a problem is better conditioned, and within a hyperplane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """Coordinates :math:`q = S^{1/2}z`, in which the Euclidean length is :math:`\\langle z, S z\\rangle^{1/2}`.

    With the overlap matrix of a basis for :math:`S`, the length of a change of the coefficients is the
    :math:`L_2` norm of the change of the function, whatever the basis (Löwdin 1950). A solver that steps along
    gradients, or measures them, then does so in the function's own geometry. The two roots are computed here, once.

    Args:
        matrix: :math:`S`, symmetric positive definite, ``[dim, dim]``, or ``[batch, dim, dim]`` for one per sample;
            ``dim`` counts all numbers of a sample's state. It is taken as constant: where the solution is does not
            depend on it.

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
        """What :math:`w` (``[batch or 1, dim]``), paired with the state, is in these coordinates:
        :math:`S^{-1/2}w`."""
        return _times(self.inverse, w.expand(max(len(w), len(self.inverse)), -1))


class Reflection(NamedTuple):
    """The hyperplane :math:`\\langle n, z\\rangle = c`, :math:`\\lVert n\\rVert = 1`, by the reflection that takes
    :math:`n` to :math:`\\mp` the first unit vector: what remains are coordinates in an orthonormal basis of
    :math:`n^\\perp` (Golub and Van Loan 2013, section 5.1).

    Attributes:
        mirror: the reflection's unit normal, ``[batch or 1, dim]``.
        first: the first coordinate of the hyperplane's points, ``[batch or 1, 1]``.
    """

    mirror: Tensor
    first: Tensor

    @classmethod
    def of(cls, normal: Tensor, offset: Tensor) -> Self:
        """Of unit normals ``[batch or 1, dim]`` and offsets ``[batch or 1, 1]``; differentiable in both."""
        sign = torch.where(normal[:, :1] < 0, -1, 1)
        mirror = torch.cat((normal[:, :1] + sign, normal[:, 1:]), dim=1)
        return cls(mirror / torch.linalg.vector_norm(mirror, dim=1, keepdim=True), -sign * offset)

    def reflect(self, z: Tensor) -> Tensor:
        return z - 2 * (z * self.mirror).sum(dim=1, keepdim=True) * self.mirror


@final
@dataclass(frozen=True, eq=False)
class Coordinates:
    """Between flat states ``[batch, dim]`` and the coordinates that a solver works in.

    Attributes:
        metric: ``None``: the state's own coordinates.
        reflection: of the plane that the state lies in, in the metric's coordinates; ``None``: it is free.
    """

    metric: Metric | None = None
    reflection: Reflection | None = None

    def encode(self, z: Tensor) -> Tensor:
        """The coordinates of ``z``; of a state outside the plane, those of the nearest point in it."""
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
        """Whether any of its tensors is of one sample each."""
        tensors = [] if self.metric is None else [self.metric.root]
        return any(len(t) > 1 for t in (*tensors, *(self.reflection or ())))


def _times(matrix: Tensor, z: Tensor) -> Tensor:
    matrix = matrix.to(z)
    if len(matrix) == 1:
        return z @ matrix[0]  # symmetric
    return torch.bmm(matrix, z[:, :, None])[:, :, 0]
