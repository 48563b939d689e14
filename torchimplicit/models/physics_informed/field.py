"""A function of coordinates with its derivatives in them, and mixed derivatives from those along straight lines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
Order = tuple[int, ...]
"""A derivative, by the coordinates in which it is taken: ``()`` is the value, ``(1, 1)`` twice in coordinate 1."""


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
    def converged(self) -> Tensor | None:
        """Bool ``[points]``: points of the last evaluation at which all solves converged; ``None`` where there is
        nothing to solve."""
        return None

    @abstractmethod
    def along(
        self, x: Tensor, directions: Tensor, orders: Sequence[int], weights: Weights | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """The value, and derivatives along straight lines.

        Args:
            x: ``[points, inputs]``.
            directions: ``[lines, inputs]``.
            orders: for each line up to which order, none greater than the one before.
            weights: every parameter with the points in a dimension before its own, in place of the module's.

        Returns:
            ``[points, outputs]``, and for each line its derivatives from the first order on, each of the same shape;
            all differentiable in the weights.
        """

    def derivatives(self, x: Tensor, orders: Sequence[Order], weights: Weights | None = None) -> dict[Order, Tensor]:
        """The value, under ``()``, and the partial derivatives asked for.

        Args:
            x: ``[points, inputs]``.
            orders: the coordinates of each derivative, as many as its order.
            weights: as for :meth:`along`.

        Returns:
            ``[points, outputs]`` each, differentiable in the weights.

        Raises:
            ValueError: an order with a coordinate that does not exist.
        """
        if unknown := [order for order in orders if not all(0 <= c < len(self.low) for c in order)]:
            raise ValueError(f"{unknown[0]} is no derivative: its coordinates must lie from 0 to {len(self.low) - 1}")
        plan = lines_of(tuple(orders), len(self.low))
        directions = torch.tensor(plan.directions, dtype=x.dtype, device=x.device).reshape(-1, len(self.low))
        value, derivatives = self.along(x, directions, plan.orders, weights)
        out = {order: _combined(parts, derivatives) for order, parts in plan.parts.items()}
        return {**out, (): value}

    def forward(self, x: Tensor) -> Tensor:
        """The value at ``[points, inputs]``."""
        return self.derivatives(x, ())[()]

    def unit(self, x: Tensor) -> Tensor:
        """The inputs, from -1 to 1."""
        return 2 * (x - self.low) / (self.high - self.low) - 1

    def speeds(self) -> Tensor:
        """Length of a unit of each input inside the model."""
        return 2 / (self.high - self.low)


class Part(NamedTuple):
    """A share of a partial derivative: ``factor`` times the derivative of order ``order`` along line ``line``."""

    factor: float
    line: int
    order: int


class Lines(NamedTuple):
    """The lines along which derivatives are needed, by falling order, and what is made of them."""

    directions: list[tuple[int, ...]]
    orders: list[int]
    parts: dict[Order, list[Part]]


@lru_cache(maxsize=64)
def lines_of(orders: tuple[Order, ...], inputs: int) -> Lines:
    """The lines that give partial derivatives.

    A derivative in one coordinate is one along its axis. A mixed one is polarized,

    .. math::
        D_{v_1}\\dots D_{v_n}u=\\frac{1}{2^{n-1}n!}\\sum_{\\varepsilon_2,\\dots,\\varepsilon_n=\\pm1}
        \\Bigl(\\prod_i\\varepsilon_i\\Bigr)\\,D^n_{v_1+\\varepsilon_2v_2+\\dots+\\varepsilon_nv_n}u .
    """
    wanted: dict[Order, dict[tuple[int, ...], float]] = {}
    for order in orders:
        n = len(order)
        shares: dict[tuple[int, ...], float] = {}
        if n and len(set(order)) == 1:
            shares[_axes([1], order[:1], inputs)] = 1.0
        elif n:
            for signs in product((1, -1), repeat=n - 1):
                line = _axes([1, *signs], order, inputs)
                if any(line):
                    turned = next(c for c in line if c) < 0  # an odd derivative changes sign with its direction
                    line = tuple(-c for c in line) if turned else line
                    factor = math.prod(signs) * (-1) ** (n * turned) / (2 ** (n - 1) * math.factorial(n))
                    shares[line] = shares.get(line, 0.0) + factor
        wanted[order] = shares
    highest: dict[tuple[int, ...], int] = {}
    for order, shares in wanted.items():
        for line in shares:
            highest[line] = max(len(order), highest.get(line, 0))
    directions = sorted(highest, key=lambda line: -highest[line])
    parts = {
        order: [Part(factor, directions.index(line), len(order)) for line, factor in shares.items()]
        for order, shares in wanted.items()
    }
    return Lines(directions, [highest[line] for line in directions], parts)


def _axes(signs: Sequence[int], order: Order, inputs: int) -> tuple[int, ...]:
    line = [0] * inputs
    for sign, coordinate in zip(signs, order, strict=True):
        line[coordinate] += sign
    return tuple(line)


def _combined(parts: list[Part], derivatives: list[list[Tensor]]) -> Tensor:
    terms = [derivatives[part.line][part.order - 1] * part.factor for part in parts]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def tanh_lower(inside: list[Tensor], outside: list[Tensor], slopes: list[Tensor], lines: int) -> Tensor:
    """Return the contribution of lower orders to the next Taylor coefficient of :math:`y=\\tanh a`.

    With :math:`s=1-y^2` the chain rule :math:`y'=s\\,a'` reads, of coefficients of order k,

    .. math:: y_k=s_0a_k+\\frac1k\\sum_{j=1}^{k-1}j\\,a_js_{k-j},\\qquad s_m=-\\sum_{i=0}^my_iy_{m-i} ,

    whose sum this is. Coefficients of order 0 are ``[points, size]``, the others ``[lines, points, size]``.

    Args:
        inside, outside, slopes: the coefficients of a, y and s below k; the slopes lack the one of order k - 1, which
            is added.
        lines: number of lines that go on to order k.
    """
    k = len(outside)
    if k == 1:
        return torch.zeros_like(slopes[0])
    # the new one, s_{k-1}, is what the sum needs at j = 1
    y = [outside[0], *(one[:lines] for one in outside[1:])]
    slopes.append(-sum((y[i] * y[k - 1 - i] for i in range(1, k)), start=y[0] * y[k - 1]))
    terms = (j / k * inside[j][:lines] * slopes[k - j][:lines] for j in range(2, k))
    return sum(terms, start=inside[1][:lines] * slopes[k - 1] / k)


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Vectors ``[..., points, size]`` times a matrix that all points share, or one of each point's own."""
    return vectors @ matrix.mT if matrix.ndim == 2 else torch.einsum("poi,...pi->...po", matrix, vectors)


def lines_left(orders: Sequence[int], order: int) -> int:
    """How many lines are wanted to that order."""
    return sum(one >= order for one in orders)


def by_line(coefficients: list[Tensor], orders: Sequence[int]) -> list[list[Tensor]]:
    """Taylor coefficients ``[lines, points, outputs]`` from order 1 on, as derivatives line by line."""
    return [[coefficients[k][line] * math.factorial(k + 1) for k in range(order)] for line, order in enumerate(orders)]
