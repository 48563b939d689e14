"""A field whose states are the equilibrium of any cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from torchimplicit.derivatives import Derivatives
from torchimplicit.linear import Dense
from torchimplicit.models.physics_informed.field import Field, Weights, times
from torchimplicit.models.physics_informed.settling import Settling
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


@final
class CellField(Field):
    """A physics-informed equilibrium with a cell of one's own: ``z = cell(z, x)``, ``u = Cz + c``.

    The derivatives are those of :class:`torchimplicit.derivatives.Derivatives`: exact, of any order, a linear system
    for each order and line.

    ::

        class Cell(nn.Module):
            def __init__(self, inputs, states):
                super().__init__()
                self.inner = nn.Linear(states, states)
                self.input = nn.Linear(inputs, states, bias=False)

            def forward(self, z, x):
                return torch.sin(self.inner(z) + self.input(x))

        field = ti.models.CellField((0.0,), (1.0,), Cell(1, 16), states=16, outputs=1)

    Args:
        low, high: see :class:`Field`.
        cell: ``cell(z, x)``, with ``z [points, states]`` and ``x [points, inputs]`` from -1 to 1, point by point, and
            smooth: as many times differentiable as the equation asks, and once more.
        states: size of the equilibrium state at a point.
        outputs: number of values at a point.
        solver: solver for the equilibrium; ``None``: Newton's method with factorized Jacobians.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        cell: nn.Module,
        *,
        states: int,
        outputs: int,
        solver: Solver | None = None,
    ):
        super().__init__(low, high)
        self.cell = cell
        self.head = nn.Parameter(torch.empty(outputs, states).uniform_(-1, 1) / states**0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))
        self._settle = Settling(states, solver)

    @property
    def last(self) -> Solution | None:
        """The last solution for the states."""
        return self._settle.last

    @property
    def converged(self) -> Tensor | None:
        return self._settle.converged

    def along(
        self, x: Tensor, directions: Tensor, orders: Sequence[int], weights: Weights | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        w = dict(self.named_parameters()) if weights is None else weights
        unit = self.unit(x)
        if weights is None:
            solution = self._settle(self.cell, unit, unit, own=True)
        else:
            cell_weights = {
                name.removeprefix("cell."): one for name, one in weights.items() if name.startswith("cell.")
            }
            solution = self._settle(self._pointwise, unit, unit, cell_weights, own=True)
        at = Derivatives(solution, linear_solver=Dense())
        derivatives = []
        for line, order in zip((directions * self.speeds()).unbind(), orders, strict=True):
            direction = (line.expand(len(x), -1), *(None for _ in solution.args[1:]))
            derivatives.append([times(w["head"], z) for z in at.along(direction, order)])
        return times(w["head"], at.value) + w["shift"], derivatives

    def _pointwise(self, z: Tensor, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The cell with weights of each point's own."""

        def one(z: Tensor, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.cell, weights, (z[None], x[None]))[0]

        values: Tensor = torch.func.vmap(one)(z, x, weights)
        return values
