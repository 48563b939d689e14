"""The tensors of a case, in units of order one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.truth.case import Case
from tests.truth.cores import Tensors

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Data:
    """What is drawn for a case.

    Attributes:
        tensors: see :data:`~tests.truth.cores.Tensors`; w and N of a constraint too. Rounded to the case's dtype.
        directions: like the tensors.
        cotangent, start: ``[batch, width]``.
    """

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.number)
        batch, dim = case.batch, case.dim
        self.width = 3 * dim if case.kind == "joint" else dim
        self.tensors: Tensors = {
            "x": self._normal(*((batch,) if case.x_batched else ()), case.inputs),
            "W": _matrix(case, self._normal(dim, dim)),
            "U": 0.5 * self._normal(dim, case.inputs),
            "b": 0.3 * self._normal(dim),
            "p": torch.zeros(batch, dim, dtype=torch.float64),
        }
        if case.constraint in ("shared", "own"):
            own = case.constraint == "own" or not case.batched
            rows = (batch,) if own else ()
            self.tensors["w"] = 0.4 + self._normal(*rows, dim).abs()
            self.tensors["N"] = 0.5 + self._normal(*((batch,) if own and case.batched else ())).abs()
        self.tensors = {name: self._rounded(t) for name, t in self.tensors.items()}
        self.directions = {name: self._rounded(self._normal(*t.shape)) for name, t in self.tensors.items()}
        self.cotangent = self._rounded(self._normal(batch, self.width))
        spread = {"random": 1.0, "far": 10.0}.get(case.start, 0.0)
        self.start = self._rounded(spread * self._normal(batch, self.width))
        root = torch.eye(dim, dtype=torch.float64) + 0.2 * self._normal(dim, dim) / math.sqrt(dim)
        self.metric = root @ root.mT

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _rounded(self, t: Tensor) -> Tensor:
        """A tensor that the case's dtype holds exactly, in float64: both sides then have the same data."""
        return t.to(DTYPES[self.case.dtype]).double()


def strided(t: Tensor) -> Tensor:
    """The same tensor as every second entry of a larger one."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0] if t.ndim else t


def _matrix(case: Case, normal: Tensor) -> Tensor:
    dim = case.dim
    if case.matrix == "orthogonal":
        m = torch.linalg.qr(normal).Q
    elif case.matrix == "symmetric":
        m = normal + normal.mT
    elif case.matrix == "rank-one":
        m = normal[:, :1] @ normal[:1]
    elif case.matrix == "triangular":
        m = torch.triu(normal, 1) + 0.5 * torch.eye(dim, dtype=normal.dtype)
    else:
        m = normal
    return m * (case.gain / torch.linalg.matrix_norm(m, 2))
