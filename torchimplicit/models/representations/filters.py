"""Filters by which coordinates enter a representation: sines of them, localized or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

FilterName = Literal["fourier", "gabor"]


def phase(inputs: int, width: int, scale: float, depth: int) -> nn.Linear:
    """:math:`\\Omega x + \\varphi` with Ω as ``nn.Linear`` begins, times :math:`s/\\sqrt{L+1}`, and
    :math:`\\varphi\\sim U(-\\pi,\\pi)` (Fathony et al. 2021; Huang et al. 2021).

    Args:
        inputs: coordinates.
        width: frequencies.
        scale: s.
        depth: L, the layers among whose L + 1 filters the frequencies are spread.
    """
    linear = nn.Linear(inputs, width)
    with torch.no_grad():
        linear.weight.mul_(scale / math.sqrt(depth + 1))
        linear.bias.uniform_(-math.pi, math.pi)
    return linear


@final
class Sine(nn.Module):
    """:math:`\\sin(\\Omega x+\\varphi)`."""

    def __init__(self, inputs: int, width: int, scale: float, depth: int):
        super().__init__()
        self.phase = phase(inputs, width, scale, depth)

    def forward(self, x: Tensor) -> Tensor:
        """``[points, inputs]`` to ``[points, width]``."""
        return torch.sin(self.phase(x))


@final
class GaborFilter(nn.Module):
    """:math:`\\sin(\\Omega x+\\varphi)\\,\\exp(-\\tfrac12|\\gamma|\\lVert x-\\mu\\rVert^2)` (Fathony et al. 2021).

    γ begins as :math:`\\Gamma(\\alpha/(L+1),1)`, Ω is larger by :math:`\\sqrt\\gamma` than without the window, and μ is
    uniform over the domain. γ enters by its absolute value, so that the filter stays within [-1, 1] while γ is trained:
    on that the contraction of the implicit model rests.

    Args:
        inputs, width, scale, depth: as for a plain sine.
        low, high: the corners of the domain.
        alpha: see above.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        scale: float,
        depth: int,
        low: Sequence[float],
        high: Sequence[float],
        alpha: float,
    ):
        super().__init__()
        self.phase = phase(inputs, width, scale, depth)
        corner, other = torch.tensor(list(low)), torch.tensor(list(high))
        self.mu = nn.Parameter(corner + (other - corner) * torch.rand(width, inputs))
        self.gamma = nn.Parameter(torch.distributions.Gamma(alpha / (depth + 1), 1.0).sample((width,)))
        with torch.no_grad():
            self.phase.weight.mul_(self.gamma.sqrt()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """``[points, inputs]`` to ``[points, width]``."""
        square = (x * x).sum(-1, keepdim=True) + (self.mu * self.mu).sum(-1) - 2 * (x @ self.mu.T)
        return torch.sin(self.phase(x)) * torch.exp(-0.5 * self.gamma.abs() * square)


def filters(
    name: FilterName,
    inputs: int,
    width: int,
    scale: float,
    depth: int,
    low: Sequence[float],
    high: Sequence[float],
    alphas: tuple[float, float],
) -> nn.ModuleList:
    """The ``depth + 1`` filters of a multiplicative filter network; ``alphas``: of the first one and of the others."""
    if name == "gabor":
        every = (alphas[0], *(alphas[1] for _ in range(depth)))
        return nn.ModuleList(GaborFilter(inputs, width, scale, depth, low, high, alpha) for alpha in every)
    return nn.ModuleList(Sine(inputs, width, scale, depth) for _ in range(depth + 1))
