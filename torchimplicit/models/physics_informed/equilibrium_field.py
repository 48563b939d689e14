"""The physics-informed equilibrium with tanh, whose derivatives are written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torchimplicit.models.physics_informed.field import Field, Weights, by_line, lines_left, tanh_lower, times
from torchimplicit.models.physics_informed.settling import Settling
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


@final
class EquilibriumField(Field):
    """A physics-informed deep equilibrium model: ``z = tanh(Ax + Bz + b)``, ``u = Cz + c`` (Pacheco's PIDEQ).

    Its derivatives of any order are exact, and so are theirs in the weights: with :math:`S=\\mathrm{diag}(1-z^2)`, the
    Taylor coefficients along a line, and the derivative in the weights, each solve a linear system with
    :math:`I-SB`, which is known here in closed form. :class:`CellField` does the same for any cell, at more cost.

    Without a bound there may be several equilibria. Those at the training points are followed and continued elsewhere;
    :attr:`converged` tells at which points none was found, or one that does not continue its neighbours'. With a bound
    :math:`\\beta` the parameter ``inner`` is W in :math:`B=W/\\sqrt{1+\\lVert W\\rVert_F^2/\\beta^2}`, so that
    :math:`\\lVert B\\rVert_F<\\beta`. For :math:`\\beta\\le1` the map contracts at any weights and has one equilibrium,
    but it is nearly a single layer, ten times less accurate on a steep front. (Pacheco penalizes the Jacobian instead.)

    Args:
        low, high: see :class:`Field`.
        outputs: number of values at a point.
        states: size of the equilibrium state at a point.
        gain: spectral norm of the initial W.
        bound: :math:`\\beta`, the bound of B's Frobenius norm; ``None``: unbounded.
        solver: solver for the equilibrium; ``None``: Newton's method with factorized Jacobians.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        *,
        outputs: int,
        states: int,
        gain: float = 0.3,
        bound: float | None = None,
        solver: Solver | None = None,
    ):
        super().__init__(low, high)
        if bound is not None and not bound > 0:
            raise ValueError(f"bound must be positive, or None, and it is {bound}")
        self.bound = bound
        self.input = nn.Parameter(torch.empty(states, len(low)).uniform_(-2, 2))
        inner = torch.randn(states, states)
        self.inner = nn.Parameter(gain * inner / torch.linalg.matrix_norm(inner, 2))
        self.bias = nn.Parameter(torch.empty(states).uniform_(-1, 1))
        self.head = nn.Parameter(torch.empty(outputs, states).uniform_(-1, 1) / states**0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))
        self._settle = Settling(states, solver, unique=bound is not None and bound <= 1)

    @property
    def last(self) -> Solution | None:
        """The last solution for the states."""
        return self._settle.last

    @property
    def converged(self) -> Tensor | None:
        return self._settle.converged

    def coupling(self, inner: Tensor | None = None) -> Tensor:
        """B, of the parameter or of another like it, ``[..., states, states]``."""
        w = self.inner if inner is None else inner
        return w if self.bound is None else w / (1 + w.square().sum((-2, -1), keepdim=True) / self.bound**2).sqrt()

    def along(
        self, x: Tensor, directions: Tensor, orders: Sequence[int], weights: Weights | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        w = dict(self.named_parameters()) if weights is None else weights
        b = self.coupling(w["inner"])
        unit = self.unit(x)
        drive = times(w["input"], unit) + w["bias"]
        solution = self._settle(_cell, unit, drive, b, own=weights is not None, nearer=lambda z: _nearer(z, drive, b))
        z = Settled.apply(drive, b, solution.value)
        slope = 1 - z * z
        inside, outside, slopes = [drive], [z], [slope]
        moved = times(w["input"], (directions * self.speeds())[:, None].expand(-1, len(x), -1))
        for order in range(1, max(orders, default=0) + 1):
            lower = tanh_lower(inside, outside, slopes, lines_left(orders, order))
            right = slope * moved if order == 1 else lower
            outside.append(_solved(slope, b, right))
            inside.append(times(b, outside[order]) + (moved if order == 1 else 0))
        value, *coefficients = (times(w["head"], y) for y in outside)
        return value + w["shift"], by_line(coefficients, orders)


def _cell(z: Tensor, drive: Tensor, b: Tensor) -> Tensor:
    """The map, of states and drives ``Ax + b``, ``[points, states]``; B shared or ``[points, states, states]``."""
    return torch.tanh(drive + times(b, z))


def _nearer(z: Tensor, drive: Tensor, b: Tensor) -> Tensor:
    """States after a few of Newton's steps, each taken where it lowers the residual."""
    image = _cell(z, drive, b)
    for _ in range(6):
        residual = image - z
        if residual.abs().max() < 1e-13:
            break
        tried = z + _solved(1 - image * image, b, residual[None])[0]
        there = _cell(tried, drive, b)
        better = (there - tried).norm(dim=1, keepdim=True) < residual.norm(dim=1, keepdim=True)
        if not bool(better.any()):
            break
        z, image = torch.where(better, tried, z), torch.where(better, there, image)
    return z


def _solved(slope: Tensor, b: Tensor, right: Tensor) -> Tensor:
    """:math:`(I-SB)^{-1}` times vectors ``[lines, points, states]``."""
    matrix = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device) - slope[..., None] * b
    return torch.linalg.solve(matrix, right.movedim(0, -1)).movedim(-1, 0)


class Settled(torch.autograd.Function):
    """The state z as a function of what it settles under, ``z = tanh(drive + Bz)``, by the implicit function theorem.

    With :math:`S=\\mathrm{diag}(1-z^2)` and :math:`(I-SB)^\\top g=u`, the cotangents of the drive and of B are
    :math:`Sg` and :math:`Sg\\,z^\\top`. The backward pass is made of the output itself, and so can be
    differentiated further.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, b: Tensor, z: Tensor) -> Tensor:
        z = z.clone()
        ctx.save_for_backward(b, z)
        return z

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        b, z = ctx.saved_tensors
        slope = 1 - z * z
        matrix = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) - (slope[..., None] * b).mT
        g = slope * torch.linalg.solve(matrix, cotangents[0][..., None])[..., 0]
        return g, g.mT @ z if b.ndim == 2 else g[..., :, None] * z[..., None, :], None
