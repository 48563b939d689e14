"""Energy densities that depend on the electron density and its gradient at one point, unpolarized, in atomic units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THOMAS_FERMI = 0.3 * (3 * math.pi**2) ** (2 / 3)
EXCHANGE = -0.75 * (3 / math.pi) ** (1 / 3)

PW92 = (0.0310907, 0.21370, 7.5957, 3.5876, 1.6382, 0.49294)
"""A, alpha_1 and beta_1 to beta_4 of Perdew and Wang's fit for the unpolarized gas (1992, table I)."""


def positive_part(rho: Tensor, width: float) -> Tensor:
    """:math:`\\tfrac12(\\rho+\\sqrt{\\rho^2+\\varepsilon^2})`: smooth, positive, and :math:`\\rho` where that is large.

    A fitted density may dip below zero far from the nuclei, where no power of it would have a derivative.
    """
    root = torch.sqrt(rho.square() + width**2)
    # the same number without cancellation where rho is negative; clamped, so that the other branch stays finite
    return torch.where(rho > 0, 0.5 * (rho + root), 0.5 * width**2 / (root - rho.clamp_max(0)))


def thomas_fermi(rho: Tensor) -> Tensor:
    """The kinetic energy of a uniform gas, :math:`\\tfrac3{10}(3\\pi^2)^{2/3}\\rho^{5/3}`."""
    return THOMAS_FERMI * rho ** (5 / 3)


def weizsaecker(rho: Tensor, sigma: Tensor, width: float = 0.0) -> Tensor:
    """The kinetic energy of one orbital, :math:`\\sigma/(8\\rho)`, bounded by ``width`` where :math:`\\rho` vanishes.

    Args:
        rho: positive.
        sigma: :math:`|\\nabla\\rho|^2`.
    """
    return sigma / (8 * (rho + width))


def lda(rho: Tensor) -> Tensor:
    """Exchange (Dirac 1930) and correlation (Perdew and Wang 1992, eq. 10) of a uniform gas."""
    a, alpha, b1, b2, b3, b4 = PW92
    rs = (3 / (4 * math.pi * rho)) ** (1 / 3)
    root = rs.sqrt()
    series = 2 * a * root * (b1 + root * (b2 + root * (b3 + root * b4)))
    correlation = -2 * a * (1 + alpha * rs) * torch.log1p(1 / series)
    return EXCHANGE * rho ** (4 / 3) + rho * correlation


def reduced_gradient(rho: Tensor, sigma: Tensor) -> Tensor:
    """:math:`s^2=\\sigma/(4(3\\pi^2)^{2/3}\\rho^{8/3})`: how fast the density varies, on its own scale."""
    return sigma / (4 * (3 * math.pi**2) ** (2 / 3) * rho ** (8 / 3))
