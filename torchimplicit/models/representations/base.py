"""The parts that implicit and explicit representations share: filters, a cell of layers, and a linear head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium, WarmStart, spectral_norm, weight_norm
from torchimplicit.solvers import Solver
from torchimplicit.validation import at_least

Norm = Literal["spectral", "weight", "frobenius"]
"""How the weight of every layer in a cell is normalized: see :func:`normalized`."""

BOUND = 0.97
"""The bound of the spectral and the Frobenius norm (Huang et al. 2021)."""


class LayerCell(nn.Module, ABC):
    """:math:`z\\mapsto h_L`, :math:`h_0=z+g_0(x)`, :math:`h_{i}=` :meth:`join` :math:`(W_ih_{i-1}+b_i,\\,g_i(x))`.

    What depends on the coordinates alone is computed before the solve and given as ``x``: an evaluation in the solve
    is its matrix products.

    Args:
        width: size of the state and of every layer.
        depth: L, the number of layers.

    Shapes: ``z``: ``[points, width]``; ``x``: L + 1 tensors like it; the result is like ``z``.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))

    @abstractmethod
    def join(self, h: Tensor, g: Tensor) -> Tensor:
        """Joins a layer's linear map ``h`` with the filter's values ``g``; its slope in ``h`` is at most 1."""

    def initial_state(self, x: Sequence[Tensor]) -> Tensor:
        """Zeros that take no memory."""
        return x[0].new_zeros(()).expand_as(x[0])

    def forward(self, z: Tensor, x: Sequence[Tensor]) -> Tensor:
        """One application of the map."""
        return self.after(z + x[0], x)

    def after(self, h: Tensor, x: Sequence[Tensor]) -> Tensor:
        """The layers, from :math:`h_0`."""
        for layer, g in zip(self.layers, x[1:], strict=True):
            h = self.join(layer(h), g)
        return h


@final
class FrobeniusNorm(nn.Module):
    """The parametrization :math:`w\\min(1,\\,b/\\lVert W\\rVert_F)`."""

    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.bound / torch.linalg.matrix_norm(weight).clamp_min(self.bound))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter that gives ``weight``, if that is within the bound."""
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def normalized(cell: LayerCell, norm: Norm | None, bound: float) -> LayerCell:
    """Normalizes the weight of each layer of a cell, in place, and returns the cell.

    Args:
        cell: the cell, changed in place.
        norm: ``"spectral"``: weights are scaled down where their spectral norm exceeds ``bound``; ``"frobenius"``: the
            same for the Frobenius norm, which is never smaller, so that both make an implicit cell a contraction;
            ``"weight"``: a learned direction and length for each row, without a bound; ``None``: free weights.
        bound: the bound of ``"spectral"`` and ``"frobenius"``; the others ignore it.
    """
    if norm not in ("spectral", "weight", "frobenius", None):
        raise ValueError(f'norm is {norm!r}, and must be "spectral", "weight", "frobenius" or None')
    if not 0 < bound < float("inf"):
        raise ValueError(f"bound is {bound}, and must be a positive finite number")
    for layer in cell.layers:
        if norm == "spectral":
            spectral_norm(layer, bound=bound, only_above=True)
        elif norm == "frobenius":
            parametrize.register_parametrization(layer, "weight", FrobeniusNorm(bound))
        elif norm == "weight":
            weight_norm(layer)
    return cell


class ExplicitRepresentation(nn.Module):
    """A network that applies a cell once, to zero: ``[points, inputs] -> [points, outputs]``.

    Args:
        inputs, outputs: number of coordinates, and of values at each point.
        filters: modules from ``[points, inputs]`` to ``[points, width]``; one more than the cell has layers.
        cell: the cell of the layers.
        width: size of every layer.
        norm, bound: how the layers' weights are normalized, see :func:`normalized`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        filters: nn.ModuleList,
        cell: LayerCell,
        width: int,
        *,
        norm: Norm | None = None,
        bound: float = BOUND,
    ):
        super().__init__()
        self.inputs = inputs
        self.filters = filters
        self.cell = normalized(cell, norm, bound)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The values at the coordinates."""
        injected = filtered(self.filters, x, self.inputs)
        return self.head(self.cell.after(injected[0], injected))


class ImplicitRepresentation(nn.Module):
    """A linear function of the fixed point of a cell: ``[points, inputs] -> [points, outputs]``.

    By default every layer of the cell has a spectral norm of at most 0.97, and no filter exceeds 1, so that the cell is
    a contraction at any weights, with the constant :math:`0.97^L`, up to what the power method lags behind the weights.
    With ``norm=None`` nothing guarantees that: the solution's status tells whether the solve converged. The paper
    bounds both twins for pictures, neither for sound and video, and the implicit one alone for occupancy. Every point
    is a problem of its own (``rowwise=True``).

    With ``gradient=Implicit()``, the default, derivatives in the coordinates are exact to any order, and so are those
    of a loss that contains them (an eikonal term, a fit to a given gradient). Estimators of the adjoint give first
    derivatives only and raise where a second one is asked for.

    Args:
        inputs, outputs, filters, cell, width, norm, bound: as for :class:`ExplicitRepresentation`.
        solver, gradient, warm_start: settings of the :class:`~torchimplicit.nn.Equilibrium`.

    Attributes:
        equilibrium: the layer.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        filters: nn.ModuleList,
        cell: LayerCell,
        width: int,
        *,
        norm: Norm | None = "spectral",
        bound: float = BOUND,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        warm_start: bool | WarmStart = False,
    ):
        super().__init__()
        self.inputs = inputs
        self.filters = filters
        normalized(cell, norm, bound)
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, warm_start=warm_start, rowwise=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """The values at the coordinates.

        Args:
            x: ``[points, inputs]``.
            index: int64 ``[points]``, the numbers of these points, for a :class:`~torchimplicit.nn.WarmStart` that
                remembers the state of each.
        """
        return self.head(self.equilibrium(filtered(self.filters, x, self.inputs), index=index))


def filtered(filters: nn.ModuleList, x: Tensor, inputs: int) -> list[Tensor]:
    """The values of every filter at the coordinates ``[points, inputs]``."""
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"coordinates must be [points, {inputs}], and they are {list(x.shape)}")
    return [one(x) for one in filters]


def check_sizes(owner: str, inputs: int, outputs: int, width: int, depth: int, scale: float) -> None:
    """Raise where a size of a representation makes no sense."""
    for name, value in (("inputs", inputs), ("outputs", outputs), ("width", width), ("depth", depth)):
        at_least(owner, name, value, 1)
    if not 0 < scale < float("inf"):
        raise ValueError(f"{owner}: scale is {scale}, and must be a positive finite number")
