"""Sets that a minimum may be restricted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class LinearEquality:
    """The states :math:`p` with :math:`\\langle w, p\\rangle = N`, per sample or shared by all.

    The solution is differentiable in both ``weight`` and ``total``.

    Args:
        weight: :math:`w`, with the structure of the state; leaves with the batch dimension (one weight per sample)
            or without it (shared by all samples).
        total: :math:`N`, a number, a scalar tensor, or a tensor ``[batch]``.
    """

    weight: Any
    total: Any


def unit_normal(weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The constraint as :math:`\\langle n, p\\rangle = c` with :math:`\\lVert n\\rVert = 1`.

    Args:
        weight: ``[batch or 1, dim]``.
        total: ``[batch or 1, 1]``.

    Returns:
        n ``[batch or 1, dim]`` and c ``[batch or 1, 1]``.
    """
    length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight / length, total / length


def project(v: Tensor, normal: Tensor) -> Tensor:
    """``v`` (``[..., batch, dim]``) without its component along the unit vectors ``normal``."""
    return v - (v * normal).sum(dim=-1, keepdim=True) * normal


def place(z: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """The point nearest to ``z`` (``[batch, dim]``) with :math:`\\langle n, z\\rangle = c`."""
    return z - ((z * normal).sum(dim=1, keepdim=True) - offset) * normal
