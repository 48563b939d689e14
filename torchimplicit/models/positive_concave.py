"""Cells with positive states and concave activations: one equilibrium by nonlinear Perron-Frobenius theory."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from torchimplicit.diagnostics.certificate import Certificate, contraction
from torchimplicit.state import row_norm


class _Positive(nn.Module):
    """The softplus of what is trained."""

    def forward(self, raw: Tensor) -> Tensor:
        return functional.softplus(raw)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight + torch.log(-torch.expm1(-weight))


@final
class PositiveConcaveCell(nn.Module):
    """:math:`\\tanh(Wz+c(x))` with :math:`W>0` and :math:`c(x)=\\epsilon+\\mathrm{softplus}(Ux+b)` (after Gabor,
    Piotrowski and Cavalcante 2024, "Positive concave deep equilibrium models", arXiv 2402.04029; Sittoni and Tudisco
    2024, "Subhomogeneous deep equilibrium models", have it as a subhomogeneous map).

    On positive states the map is monotone, concave and positive: it has one equilibrium, whatever W is, and plain
    iteration converges to it geometrically from every start that is not negative. In Thompson's metric, the largest
    difference of logarithms, it contracts by the largest elasticity, which for :math:`t=(Wz)_i` is

    .. math:: e_i(t)=\\frac{2t}{\\sinh 2(t+c_i)},\\qquad 0\\le t\\le w_i=\\sum_j W_{ij},

    since no image exceeds 1. It is largest where :math:`\\tanh 2(t+c_i)=2t`, or at :math:`w_i` before that:
    whatever W is, the factor is at most .69 for a floor of .1, and .93 for one of .01.

    Args:
        features: size of the state.
        in_features: size of the input.
        floor: :math:`\\epsilon>0`.

    Shapes: the state ``[batch, features]``, the input ``[batch, in_features]``.
    """

    def __init__(self, features: int, in_features: int, *, floor: float = 0.1):
        super().__init__()
        if not 0 < floor < float("inf"):
            raise ValueError(f"PositiveConcaveCell: floor is {floor}, and must be a positive finite number")
        self.floor = floor
        self.recurrent = nn.Linear(features, features, bias=False)
        self.injection = nn.Linear(in_features, features)
        with torch.no_grad():
            self.recurrent.weight.copy_((0.2 + 1.6 * torch.rand(features, features)) / features)
        parametrize.register_parametrization(self.recurrent, "weight", _Positive())

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros."""
        return x.new_zeros(len(x), self.recurrent.out_features)

    def shift(self, x: Tensor) -> Tensor:
        """:math:`c(x)`, ``[batch, features]``."""
        return self.floor + functional.softplus(self.injection(x))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""
        return torch.tanh(self.recurrent(z) + self.shift(x))

    def certificate(self, z: Tensor, x: Tensor) -> Certificate:
        """See :func:`~torchimplicit.diagnostics.certify`.

        Raises:
            ValueError: a state that is not positive, as no equilibrium is.
        """
        weight, shift, z = (t.detach().double() for t in (self.recurrent.weight, self.shift(x), z))
        if not bool((z > 0).all()):
            raise ValueError(
                "the state has numbers that are not positive, and the guarantee is for positive ones: take a step of "
                "the cell, whose images are all positive"
            )
        rows = weight.sum(dim=1)
        low, high = torch.zeros_like(shift), torch.full_like(shift, 0.5)
        for _ in range(50):
            middle = (low + high) / 2
            rising = torch.tanh(2 * (middle + shift)) > 2 * middle
            low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
        elasticity = 2 * torch.minimum(high, rows) / torch.sinh(2 * (torch.minimum(low, rows) + shift))
        rounding = 4 * z.shape[1] * torch.finfo(z.dtype).eps
        factor = elasticity.amax(dim=1) * (1 + rounding)
        # The bound of the elasticity holds for states up to 1, where every image lies: the distance to the first image
        # counts as it is, and the contraction from there on.
        image = torch.tanh(functional.linear(z, weight) + shift)
        again = torch.tanh(functional.linear(image, weight) + shift)
        there = (again.log() - image.log()).abs().amax(dim=1) + rounding
        first = (image.log() - z.log()).abs().amax(dim=1) + rounding
        distance = first + contraction(factor, there, "this cell")
        inside = (z <= 1).all(dim=1)
        distance = torch.where(inside, torch.minimum(distance, first / (1 - factor)), distance)
        error = row_norm(z * torch.expm1(distance)[:, None])
        return Certificate(factor, "Thompson", first, error)
