"""Finite differences of the loss along random directions in all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.recipes.ofdft_gradients.optimum import Optimum
from torchimplicit.recipes.ofdft_gradients.results import Difference


def difference(optimum: Optimum, exact: Tensor, directions: int, step: float, generator: torch.Generator) -> Difference:
    """The fourth-order central difference along each direction, the minimum found anew at every displacement.

    Args:
        optimum: left as it was.
        exact: the gradient, flat.
        directions: how many.
        step: the length of the smaller displacement.
        generator: of the directions.
    """
    parameters = optimum.parameters
    felt = exact != 0  # coefficients of elements that the molecule lacks do nothing
    start = torch.nn.utils.parameters_to_vector(parameters).detach()

    def loss(moved: Tensor) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved, parameters)
            return float(optimum.loss(optimum.minimize(optimum.value).value))

    measured, expected = [], []
    try:
        for _ in range(directions):
            direction = torch.where(felt, torch.randn(len(start), dtype=start.dtype, generator=generator), 0)
            direction = step * direction / direction.norm()
            near, far = (loss(start + k * direction) - loss(start - k * direction) for k in (1, 2))
            measured.append((8 * near - far) / 12)
            expected.append(float(exact @ direction))
    finally:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(start, parameters)
    a, b = torch.tensor(measured, dtype=start.dtype), torch.tensor(expected, dtype=start.dtype)
    return Difference(error=float((a - b).norm() / b.norm()), worst=float(((a - b) / b).abs().max()))
