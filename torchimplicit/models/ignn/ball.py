"""The ball of the infinity norm, as a parametrization: what makes an IGNN well-posed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


def project_rows(weight: Tensor, radius: float) -> Tensor:
    """The nearest matrix (in the Frobenius norm) each of whose rows has an L1 norm of at most ``radius``.

    Each row that is too long is soft-thresholded, by the amount that brings it onto the ball, found by sorting (Duchi
    et al., *Efficient projections onto the L1-ball*, ICML 2008). The derivative is that of the projection, to every
    order, wherever it has one: almost everywhere. Rows inside come back as they are, zeros among them, whose derivative
    is then one.

    Args:
        weight: ``[rows, columns]``.
        radius: positive.
    """
    size = weight.abs()
    ordered = size.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    # the entries that stay are the largest ones, as long as each exceeds the threshold that they give
    stay = (ordered * counts > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, stay - 1) / stay
    shrunk = weight.sign() * torch.relu(size - threshold)
    return torch.where(excess[:, -1:] <= 0, weight, shrunk)


@final
class InfinityNormBall(nn.Module):
    """The parametrization that projects a matrix on :math:`\\lVert W\\rVert_\\infty\\le r` (the L1 norms of its rows).

    The trained parameter is the matrix before the projection, which no forward pass changes.

    Args:
        radius: r.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return project_rows(weight, self.radius)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter that gives ``weight``, or what is nearest to it: its projection."""
        return project_rows(weight, self.radius)

    def extra_repr(self) -> str:
        return f"radius={self.radius:.4g}"
