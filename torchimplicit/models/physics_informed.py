"""Functions of coordinates that solve differential equations: an equilibrium model, and a plain network beside it.

Both are stated for one point, so that weights may be shared by all points, or each point have its own: the gradient in
the latter are the rows of the Jacobian that a Gauss-Newton method needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from torchimplicit.derivatives import Derivatives
from torchimplicit.linear import Dense
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import NewtonKrylov, Solver

NEWTON = NewtonKrylov(linear_solver=Dense(), rtol=1e-12, max_steps=15, halvings=6)
"""Finds an equilibrium in a few steps from a state nearby. One that it does not find in these few belongs to weights
that an optimizer had better leave again, and more steps would only take time."""

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

    @abstractmethod
    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        """The value, under ``()``, and the derivatives asked for.

        Args:
            x: ``[points, inputs]``.
            orders: one or two coordinates each.
            weights: every parameter with the points in a dimension before its own, in place of the module's.

        Returns:
            ``[points, outputs]`` each, differentiable in the weights.
        """

    def forward(self, x: Tensor) -> Tensor:
        """The value at ``[points, inputs]``."""
        return self.derivatives(x, ())[()]

    def unit(self, x: Tensor) -> Tensor:
        """The inputs, from -1 to 1."""
        return 2 * (x - self.low) / (self.high - self.low) - 1


@final
class EquilibriumField(Field):
    """A physics-informed deep equilibrium model: ``z = tanh(Ax + Bz + b)``, ``u = Cz + c`` (Pacheco's PIDEQ).

    Its derivatives in the inputs are those of the equilibrium, exact and by direct routines
    (:class:`~torchimplicit.derivatives.Derivatives`): one linear solve for each order and direction.

    Args:
        low, high: see :class:`Field`.
        outputs: of the function.
        states: of the equilibrium.
        gain: the spectral norm that B begins with; below 1 the map begins as a contraction.
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
        solver: Solver | None = None,
    ):
        super().__init__(low, high)
        inputs = len(low)
        self.solver = solver
        self.input = nn.Parameter(torch.empty(states, inputs).uniform_(-2, 2))
        inner = torch.randn(states, states)
        self.inner = nn.Parameter(gain * inner / torch.linalg.matrix_norm(inner, 2))
        self.bias = nn.Parameter(torch.empty(states).uniform_(-1, 1))
        self.head = nn.Parameter(torch.empty(outputs, states).uniform_(-1, 1) / states**0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))
        self.last: Solution | None = None
        self._starts: dict[int, Tensor] = {}

    def cell(self, z: Tensor, x: Tensor, weights: Weights) -> Tensor:
        """The map: ``z [..., states]``, ``x [..., inputs]``, and weights that points share, or each has its own."""
        moved = _times(weights["input"], self.unit(x)) + _times(weights["inner"], z)
        return torch.tanh(moved + weights["bias"])

    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        used = dict(self.named_parameters()) if weights is None else weights
        # where a set of points was solved before, its last states are near: weights move little from step to step
        z0 = self._starts.get(len(x), x.new_zeros(len(x), len(self.bias))).to(x)
        inner = {name: used[name] for name in ("input", "inner", "bias")}
        problem = FixedPoint(self.cell, rowwise=weights is not None)
        with torch.no_grad():
            found = solve(problem, z0, x, inner, solver=self.solver or NEWTON, throw=False)
        self.last = found
        if bool(found.converged.all()):
            self._starts[len(x)] = found.value
        at = Derivatives(found, linear_solver=Dense())
        states = {(): at.value} | _derivatives_of(at, x, orders)
        out = {order: _times(used["head"], state) for order, state in states.items()}
        out[()] = out[()] + used["shift"]
        return out


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
        layers: list[nn.Module] = []
        for one, other in pairwise(sizes):
            layers += [nn.Linear(one, other), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        own = None if weights is None else {name.removeprefix("layers."): w for name, w in weights.items()}

        def value(x: Tensor) -> Tensor:
            if own is None:
                return self.layers(self.unit(x))
            return vmap(lambda w, x: functional_call(self.layers, w, (self.unit(x),)))(own, x)

        found: dict[Order, Tensor] = {(): value(x)}
        for order in orders:
            slope: Callable[[Tensor], Tensor] = value
            for coordinate in order:
                slope = _slope(slope, _unit_like(x, coordinate))
            found[order] = slope(x)
        return found


def _slope(fn: Callable[[Tensor], Tensor], direction: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(fn, (x,), (direction,))[1]


def _derivatives_of(at: Derivatives, x: Tensor, orders: Sequence[Order]) -> dict[Order, Tensor]:
    """Each coordinate's derivatives by one recursion, and mixed ones beside."""
    found: dict[Order, Tensor] = {}
    for coordinate in sorted({order[0] for order in orders if len(set(order)) == 1}):
        highest = max(len(order) for order in orders if set(order) == {coordinate})
        along = at.along((_unit_like(x, coordinate), None), order=highest)
        found |= {(coordinate,) * n: state for n, state in enumerate(along, start=1)}
    for order in orders:
        if len(set(order)) == 2 and len(order) == 2:
            one, other = (_unit_like(x, coordinate) for coordinate in order)
            found[order] = at.second((one, None), (other, None))
        elif order not in found:
            raise ValueError(f"the derivative {order} is of a kind that is not supported: mixed ones up to order two")
    return {order: found[order] for order in orders}


def _unit_like(x: Tensor, coordinate: int) -> Tensor:
    direction = torch.zeros_like(x)
    direction[:, coordinate] = 1
    return direction


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
