"""Functions of coordinates that solve differential equations: an equilibrium model, and a plain network beside it.

Both are stated for one point, so that weights may be shared by all points, or each point have its own: the gradient in
the latter are the rows of the Jacobian that a Gauss-Newton method needs.

Their derivatives in the coordinates are written out to the second order. Of :math:`y=\\tanh a` they are
:math:`y_i=s\\,a_i` and :math:`y_{ij}=s\\,a_{ij}+s'a_ia_j`, with :math:`s=1-y^2` and :math:`s'=-2ys`. In an equilibrium
:math:`a` depends on :math:`y` itself, and the derivatives of each order solve a linear system with the same matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from torchimplicit._solve import solve
from torchimplicit.derivatives import Derivatives
from torchimplicit.linear import Dense
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solvers import NewtonKrylov, Solver

NEWTON = NewtonKrylov(linear_solver=Dense(), rtol=1e-12, max_steps=15, halvings=6)
"""Finds an equilibrium in a few steps from a state nearby."""

Weights = Mapping[str, Tensor]
Order = tuple[int, ...]
"""Which derivative: the coordinates it is taken in; ``()`` is the value, ``(1, 1)`` twice in coordinate 1."""


class Field(nn.Module, ABC):
    """A function ``[points, inputs] -> [points, outputs]`` with derivatives in its inputs.

    Args:
        low, high: the box of the inputs; inside the model they run from -1 to 1.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float]):
        super().__init__()
        if len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"low {tuple(low)} and high {tuple(high)} must be the corners of a box, low below high")
        self.register_buffer("low", torch.tensor(list(low)))
        self.register_buffer("high", torch.tensor(list(high)))

    @property
    def trusted(self) -> bool:
        """Whether the last evaluation found all that it had to solve for."""
        return True

    @abstractmethod
    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        """The value, under ``()``, and the derivatives asked for.

        Args:
            x: ``[points, inputs]``.
            orders: one or two coordinates each.
            weights: every parameter with the points in a dimension before its own, in place of the module's.

        Returns:
            ``[points, outputs]`` each, differentiable in the weights.

        Raises:
            ValueError: an order of more than two coordinates, or with one that does not exist.
        """

    def forward(self, x: Tensor) -> Tensor:
        """The value at ``[points, inputs]``."""
        return self.derivatives(x, ())[()]

    def unit(self, x: Tensor) -> Tensor:
        """The inputs, from -1 to 1."""
        return 2 * (x - self.low) / (self.high - self.low) - 1

    def speeds(self) -> Tensor:
        """What a unit of each input is inside the model."""
        return 2 / (self.high - self.low)

    def parted(self, orders: Sequence[Order]) -> tuple[list[int], list[Order]]:
        """The coordinates that the orders ask for, and the second derivatives among them."""
        for order in orders:
            if not 1 <= len(order) <= 2 or not all(0 <= c < len(self.low) for c in order):
                raise ValueError(
                    f"{order} is no derivative that is known here: give one or two coordinates, from 0 to "
                    f"{len(self.low) - 1}"
                )
        return sorted({c for order in orders for c in order}), [order for order in orders if len(order) == 2]


@final
class EquilibriumField(Field):
    """A physics-informed deep equilibrium model: ``z = tanh(Ax + Bz + b)``, ``u = Cz + c`` (Pacheco's PIDEQ).

    The parameter ``inner`` is W in :math:`B=W/\\sqrt{1+\\lVert W\\rVert_F^2/\\beta^2}`, whose Frobenius norm stays
    below the bound :math:`\\beta`. Up to one the map contracts whatever the weights: there is one equilibrium, Newton's
    method finds it, and the field is a function. (Pacheco's penalty on the Jacobian aims at the same.) Without a bound
    there may be several, and two evaluations of the field need not agree.

    Its derivatives in the inputs are those of the equilibrium, exact, one linear system for each. The value's own
    derivative in the weights is the implicit one.

    Args:
        low, high: see :class:`Field`.
        outputs: of the function.
        states: of the equilibrium.
        gain: the spectral norm that W begins with.
        bound: of B; ``None`` for none.
        solver: of the equilibrium; ``None``: Newton's method with factorized Jacobians.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        *,
        outputs: int,
        states: int,
        gain: float = 0.3,
        bound: float | None = 1.0,
        solver: Solver | None = None,
    ):
        super().__init__(low, high)
        if bound is not None and not bound > 0:
            raise ValueError(f"bound must be positive, or None, and it is {bound}")
        inputs = len(low)
        self.bound = bound
        self.solver = solver
        self.input = nn.Parameter(torch.empty(states, inputs).uniform_(-2, 2))
        inner = torch.randn(states, states)
        self.inner = nn.Parameter(gain * inner / torch.linalg.matrix_norm(inner, 2))
        self.bias = nn.Parameter(torch.empty(states).uniform_(-1, 1))
        self.head = nn.Parameter(torch.empty(outputs, states).uniform_(-1, 1) / states**0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))
        self.last: Solution | None = None
        self._starts: dict[int, Tensor] = {}

    @property
    def trusted(self) -> bool:
        return self.last is None or bool(self.last.converged.all())

    def coupling(self, inner: Tensor | None = None) -> Tensor:
        """B, of the parameter or of another like it, ``[..., states, states]``."""
        w = self.inner if inner is None else inner
        return w if self.bound is None else w / (1 + w.square().sum((-2, -1), keepdim=True) / self.bound**2).sqrt()

    @staticmethod
    def cell(z: Tensor, x: Tensor, weights: Weights) -> Tensor:
        """The map: ``z [..., states]``, ``x [..., inputs]`` from -1 to 1, and weights that points share, or each has
        its own; ``inner`` among them is B."""
        return torch.tanh(_times(weights["input"], x) + _times(weights["inner"], z) + weights["bias"])

    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        coordinates, pairs = self.parted(orders)
        used = dict(self.named_parameters()) if weights is None else weights
        inner = {"input": used["input"], "inner": self.coupling(used["inner"]), "bias": used["bias"]}
        states: dict[Order, Tensor] = {(): self._equilibrium(self.unit(x), inner, own=weights is not None)}
        if coordinates:
            states |= self._moved(states[()], inner, coordinates, pairs)
        out = {order: _times(used["head"], states[order]) for order in ((), *orders)}
        out[()] = out[()] + used["shift"]
        return out

    def _equilibrium(self, x: Tensor, inner: Weights, own: bool) -> Tensor:
        # where a set of points was solved before, its last states are near: weights move little from step to step
        z0 = self._starts.get(len(x), x.new_zeros(len(x), len(self.bias))).to(x)
        problem = FixedPoint(self.cell, rowwise=own)
        with torch.no_grad():
            self.last = solve(problem, z0, x, dict(inner), solver=self.solver or NEWTON, throw=False)
        if self.trusted:
            self._starts[len(x)] = self.last.value
        value: Tensor = Derivatives(self.last, linear_solver=Dense()).value
        return value

    def _moved(self, z: Tensor, inner: Weights, coordinates: list[int], pairs: list[Order]) -> dict[Order, Tensor]:
        """The derivatives of the states: all those of one order solve their systems together."""
        slope = 1 - z * z
        matrix = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) - slope[..., None] * inner["inner"]
        direct = (inner["input"] * self.speeds())[..., coordinates].expand(*z.shape, -1)
        first = torch.linalg.solve(matrix, slope[..., None] * direct)
        found: dict[Order, Tensor] = {(c,): first[..., i] for i, c in enumerate(coordinates)}
        if pairs:
            inside = direct + inner["inner"] @ first
            place = {c: i for i, c in enumerate(coordinates)}
            bent = torch.stack([inside[..., place[a]] * inside[..., place[b]] for a, b in pairs], dim=-1)
            second = torch.linalg.solve(matrix, (-2 * z * slope)[..., None] * bent)
            found |= {order: second[..., i] for i, order in enumerate(pairs)}
        return found


@final
class NetworkField(Field):
    """A physics-informed neural network: a perceptron with tanh (Raissi et al. 2019).

    Args:
        low, high: see :class:`Field`.
        outputs: of the function.
        width, depth: of the hidden layers, and how many.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], *, outputs: int, width: int, depth: int):
        super().__init__(low, high)
        sizes = [len(low), *[width] * depth]
        hidden = [nn.Linear(one, other) for one, other in pairwise(sizes)]
        self.layers = nn.ModuleList([*hidden, nn.Linear(width, outputs)])

    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        coordinates, pairs = self.parted(orders)
        used = dict(self.named_parameters()) if weights is None else weights
        found: dict[Order, Tensor] = {(): self.unit(x)}
        for c in coordinates:
            found[c,] = torch.zeros_like(x)
            found[c,][:, c] = self.speeds()[c]
        for number in range(len(self.layers)):
            if number:
                found = _through_tanh(found, coordinates, pairs)
            found = {order: _times(used[f"layers.{number}.weight"], value) for order, value in found.items()}
            found[()] = found[()] + used[f"layers.{number}.bias"]
        zero = torch.zeros_like(found[()])  # of a perceptron without a hidden layer
        return {order: found.get(order, zero) for order in ((), *orders)}


def _through_tanh(inside: dict[Order, Tensor], coordinates: list[int], pairs: list[Order]) -> dict[Order, Tensor]:
    y = torch.tanh(inside[()])
    slope = 1 - y * y
    out: dict[Order, Tensor] = {(): y} | {(c,): slope * inside[c,] for c in coordinates}
    for a, b in pairs:
        bent = -2 * y * slope * inside[a,] * inside[b,]
        out[a, b] = bent + slope * inside[a, b] if (a, b) in inside else bent
    return out


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Of each point: a matrix that all share, or one of its own."""
    return vector @ matrix.mT if matrix.ndim == 2 else (matrix @ vector[..., None])[..., 0]
