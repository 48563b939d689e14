"""Explicit fields: the perceptron with tanh, whose derivatives are written out, and any module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from torchimplicit.models.physics_informed.field import Field, Weights, by_line, lines_left, tanh_lower, times


@final
class NetworkField(Field):
    """A physics-informed neural network: a perceptron with tanh (Raissi et al. 2019).

    Args:
        low, high: see :class:`Field`.
        outputs: number of values at a point.
        width, depth: width and number of the hidden layers.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], *, outputs: int, width: int, depth: int):
        super().__init__(low, high)
        sizes = [len(low), *[width] * depth]
        hidden = [nn.Linear(one, other) for one, other in pairwise(sizes)]
        self.layers = nn.ModuleList([*hidden, nn.Linear(sizes[-1], outputs)])

    def along(
        self, x: Tensor, directions: Tensor, orders: Sequence[int], weights: Weights | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        used = dict(self.named_parameters()) if weights is None else weights
        highest = max(orders, default=0)
        moved = (directions * self.speeds())[:, None].expand(-1, len(x), -1)
        coefficients = [self.unit(x), *(moved * (k == 1) for k in range(1, highest + 1))]  # Taylor coefficients
        for number in range(len(self.layers)):
            if number:
                coefficients = _tanh(coefficients, orders)
            coefficients = [times(used[f"layers.{number}.weight"], one) for one in coefficients]
            coefficients[0] = coefficients[0] + used[f"layers.{number}.bias"]
        return coefficients[0], by_line(coefficients[1:], orders)


def _tanh(inside: list[Tensor], orders: Sequence[int]) -> list[Tensor]:
    outside = [torch.tanh(inside[0])]
    slopes = [1 - outside[0] ** 2]
    for order in range(1, len(inside)):
        lines = lines_left(orders, order)
        lower = tanh_lower(inside, outside, slopes, lines)
        outside.append(slopes[0] * inside[order][:lines] + lower)
    return outside


@final
class ModuleField(Field):
    """A field that a module of one's own is: ``u = module(x)``, ``[points, inputs]`` from -1 to 1 to
    ``[points, outputs]``, point by point and smooth. Derivatives are forward-mode ones, nested for higher orders.

    Args:
        low, high: see :class:`Field`.
        module: the function.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], module: nn.Module):
        super().__init__(low, high)
        self.module = module

    def along(
        self, x: Tensor, directions: Tensor, orders: Sequence[int], weights: Weights | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        unit = self.unit(x)
        per_line = []
        for line, order in zip((directions * self.speeds()).unbind(), orders, strict=True):
            ray = _ray(lambda at: self._values(at, weights), unit, line.expand_as(unit))
            derivatives = []
            for _ in range(order):
                ray = _moving(ray)
                derivatives.append(ray(unit.new_zeros(())))
            per_line.append(derivatives)
        return self._values(unit, weights), per_line

    def _values(self, x: Tensor, weights: Weights | None) -> Tensor:
        if weights is None:
            return self.module(x)

        def one(x: Tensor, module_weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.module, module_weights, (x[None],))[0]

        values: Tensor = torch.func.vmap(one)(x, {name.removeprefix("module."): w for name, w in weights.items()})
        return values


Ray = Callable[[Tensor], Tensor]
"""A function of the distance along a line."""


def _ray(function: Ray, x: Tensor, line: Tensor) -> Ray:
    return lambda distance: function(x + distance * line)


def _moving(ray: Ray) -> Ray:
    return lambda distance: torch.func.jvp(ray, (distance,), (torch.ones_like(distance),))[1]
