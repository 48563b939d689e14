"""Multiplicative filter networks, and their implicit form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from torchimplicit.gradients import Gradient
from torchimplicit.models.representations.base import (
    BOUND,
    ExplicitRepresentation,
    ImplicitRepresentation,
    LayerCell,
    Norm,
    check_sizes,
)
from torchimplicit.models.representations.filters import FilterName, filters
from torchimplicit.nn import WarmStart
from torchimplicit.solvers import Solver


@final
class MultiplicativeCell(LayerCell):
    """:math:`h_i=(W_ih_{i-1}+b_i)\\circ g_i(x)`, :math:`h_0=z+g_0(x)`."""

    def join(self, h: Tensor, g: Tensor) -> Tensor:
        return h * g


@final
class ImplicitMFN(ImplicitRepresentation):
    """The implicit multiplicative filter network: Fourier-iMFN and Gabor-iMFN (Huang et al. 2021).

    Args:
        inputs, outputs: number of coordinates, and of values at each point.
        width: size of the state.
        depth: number of layers in the cell.
        scale: scale of the frequencies; see :class:`ImplicitSIREN`.
        filter: sines, or sines under Gaussian windows (:class:`GaborFilter`).
        low, high: the corners of the domain, over which the windows are spread; by default from -1 to 1 in every
            coordinate.
        alpha, first_alpha: shape of the gamma distribution of the windows' widths, in the layers' filters and in the
            first one; as published.
        norm, bound, solver, gradient, warm_start: see :class:`ImplicitRepresentation`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int = 1,
        scale: float = 128.0,
        filter: FilterName = "fourier",
        *,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        alpha: float = 3.0,
        first_alpha: float = 6.0,
        norm: Norm | None = "spectral",
        bound: float = BOUND,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        warm_start: bool | WarmStart = False,
    ):
        check_sizes("ImplicitMFN", inputs, outputs, width, depth, scale)
        low, high = _box("ImplicitMFN", inputs, filter, low, high, (alpha, first_alpha))
        modules = filters(filter, inputs, width, scale, depth, low, high, (first_alpha, alpha))
        cell = MultiplicativeCell(width, depth)
        equilibrium: dict[str, Any] = {"solver": solver, "gradient": gradient, "warm_start": warm_start}
        super().__init__(inputs, outputs, modules, cell, width, norm=norm, bound=bound, **equilibrium)


@final
class MFN(ExplicitRepresentation):
    """The multiplicative filter network (Fathony et al. 2021, ICLR), the explicit counterpart of :class:`ImplicitMFN`:
    the same parameters, which begin alike.

    Args:
        inputs, outputs, width, depth, scale, filter, low, high, alpha, first_alpha, norm, bound: as there; the layers
            are free by default.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int = 1,
        scale: float = 128.0,
        filter: FilterName = "fourier",
        *,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        alpha: float = 3.0,
        first_alpha: float = 6.0,
        norm: Norm | None = None,
        bound: float = BOUND,
    ):
        check_sizes("MFN", inputs, outputs, width, depth, scale)
        low, high = _box("MFN", inputs, filter, low, high, (alpha, first_alpha))
        modules = filters(filter, inputs, width, scale, depth, low, high, (first_alpha, alpha))
        cell = MultiplicativeCell(width, depth)
        super().__init__(inputs, outputs, modules, cell, width, norm=norm, bound=bound)


def _box(
    owner: str,
    inputs: int,
    filter: str,
    low: Sequence[float] | None,
    high: Sequence[float] | None,
    alphas: tuple[float, float],
) -> tuple[Sequence[float], Sequence[float]]:
    """The domain, checked with what else is the filters' own."""
    if filter not in ("fourier", "gabor"):
        raise ValueError(f"{owner}: filter is {filter!r}, and must be 'fourier' or 'gabor'")
    for name, alpha in zip(("alpha", "first_alpha"), alphas, strict=True):
        if not 0 < alpha < float("inf"):
            raise ValueError(f"{owner}: {name} is {alpha}, and must be a positive finite number")
    low = (-1.0,) * inputs if low is None else low
    high = (1.0,) * inputs if high is None else high
    if not len(low) == len(high) == inputs or not all(a < b for a, b in zip(low, high, strict=True)):
        raise ValueError(
            f"{owner}: low {tuple(low)} and high {tuple(high)} must be the corners of a box, {inputs} each"
        )
    return low, high
