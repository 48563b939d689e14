"""Sinusoidal representations, with the coordinates given to every layer."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from torchimplicit.gradients import Gradient
from torchimplicit.models.representations.base import (
    BOUND,
    ExplicitRepresentation,
    ImplicitRepresentation,
    LayerCell,
    Norm,
    check_sizes,
)
from torchimplicit.models.representations.filters import Sine, phase
from torchimplicit.nn import WarmStart
from torchimplicit.solvers import Solver


@final
class SineCell(LayerCell):
    """:math:`h_i=\\sin(W_ih_{i-1}+b_i+\\Omega_ix+\\varphi_i)`, :math:`h_0=z+\\sin(\\Omega_0x+\\varphi_0)`."""

    def join(self, h: Tensor, g: Tensor) -> Tensor:
        return torch.sin(h + g)


@final
class ImplicitSIREN(ImplicitRepresentation):
    """The implicit sinusoidal representation, iSIREN (Huang et al. 2021).

    Args:
        inputs, outputs: number of coordinates, and of values at each point.
        width: size of the state.
        depth: number of layers in the cell.
        scale: scale of the frequencies, for coordinates from -1 to 1; the larger, the finer the details. The paper
            takes 256 for an image of 512 pixels, and 128 where pixels are held out.
        norm, bound, solver, gradient, warm_start: see :class:`ImplicitRepresentation`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int = 1,
        scale: float = 128.0,
        *,
        norm: Norm | None = "spectral",
        bound: float = BOUND,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        warm_start: bool | WarmStart = False,
    ):
        check_sizes("ImplicitSIREN", inputs, outputs, width, depth, scale)
        filters = _filters(inputs, width, depth, scale)
        cell = SineCell(width, depth)
        equilibrium: dict[str, Any] = {"solver": solver, "gradient": gradient, "warm_start": warm_start}
        super().__init__(inputs, outputs, filters, cell, width, norm=norm, bound=bound, **equilibrium)


@final
class SIREN(ExplicitRepresentation):
    """The sinusoidal network (Sitzmann et al. 2020) with the coordinates given to every layer, the explicit counterpart
    of :class:`ImplicitSIREN`: the same parameters, which begin alike.

    Args:
        inputs, outputs, width, depth, scale: as there; ``depth`` counts the layers after the first sine.
        norm, bound: how the layers' weights are normalized; see :class:`ImplicitRepresentation`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: int = 1,
        scale: float = 128.0,
        *,
        norm: Norm | None = None,
        bound: float = BOUND,
    ):
        check_sizes("SIREN", inputs, outputs, width, depth, scale)
        filters = _filters(inputs, width, depth, scale)
        super().__init__(inputs, outputs, filters, SineCell(width, depth), width, norm=norm, bound=bound)


def _filters(inputs: int, width: int, depth: int, scale: float) -> nn.ModuleList:
    first = Sine(inputs, width, scale, depth)
    return nn.ModuleList([first, *(phase(inputs, width, scale, depth) for _ in range(depth))])
