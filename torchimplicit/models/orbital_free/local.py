"""Energy densities that depend on the electron density and its gradient at one point, unpolarized, in atomic units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THOMAS_FERMI = 0.3 * (3 * math.pi**2) ** (2 / 3)
EXCHANGE = -0.75 * (3 / math.pi) ** (1 / 3)

PW92 = (0.0310907, 0.21370, 7.5957, 3.5876, 1.6382, 0.49294)
"""A, alpha_1 and beta_1 to beta_4 of Perdew and Wang's fit for the unpolarized gas (1992, table I)."""

PBE_KAPPA, PBE_BETA = 0.804, 0.06672455060314922
PBE_MU, PBE_GAMMA = PBE_BETA * math.pi**2 / 3, (1 - math.log(2)) / math.pi**2
"""Constants of Perdew, Burke and Ernzerhof (1996): the bound on exchange, and the gradient coefficients of correlation
and of exchange, which cancel in the uniform limit."""


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
    return EXCHANGE * rho ** (4 / 3) + rho * _correlation(rho)


def pbe(rho: Tensor, sigma: Tensor) -> Tensor:
    """Exchange and correlation with the density's gradient (Perdew, Burke and Ernzerhof 1996).

    Exchange is that of the gas times :math:`1+\\kappa-\\kappa/(1+\\mu s^2/\\kappa)` (eqs. 10, 14); correlation that of
    the gas plus :math:`H` (eqs. 7 and 8, unpolarized) of :math:`t^2=\\sigma/(4k_s^2\\rho^2)`.

    Args:
        rho: positive.
        sigma: :math:`|\\nabla\\rho|^2`.
    """
    enhancement = 1 + PBE_KAPPA - PBE_KAPPA / (1 + PBE_MU / PBE_KAPPA * reduced_gradient(rho, sigma))
    gas = _correlation(rho)
    screening = 4 * (3 * math.pi**2 * rho) ** (1 / 3) / math.pi  # the square of Thomas and Fermi's wave number
    t2 = sigma / (4 * screening * rho.square())
    at2 = PBE_BETA / PBE_GAMMA / torch.expm1(-gas / PBE_GAMMA) * t2
    gradient = torch.log1p(PBE_BETA / PBE_GAMMA * t2 * (1 + at2) / (1 + at2 + at2.square()))
    return EXCHANGE * rho ** (4 / 3) * enhancement + rho * (gas + PBE_GAMMA * gradient)


def _correlation(rho: Tensor) -> Tensor:
    """Correlation energy per electron of a uniform gas."""
    a, alpha, b1, b2, b3, b4 = PW92
    rs = (3 / (4 * math.pi * rho)) ** (1 / 3)
    root = rs.sqrt()
    series = 2 * a * root * (b1 + root * (b2 + root * (b3 + root * b4)))
    return -2 * a * (1 + alpha * rs) * torch.log1p(1 / series)


def reduced_gradient(rho: Tensor, sigma: Tensor) -> Tensor:
    """:math:`s^2=\\sigma/(4(3\\pi^2)^{2/3}\\rho^{8/3})`: how fast the density varies, on its own scale."""
    return sigma / (4 * (3 * math.pi**2) ** (2 / 3) * rho ** (8 / 3))
