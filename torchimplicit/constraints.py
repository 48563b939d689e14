"""Sets that a minimum, or an optimized input, may be restricted to."""

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


@final
@dataclass(frozen=True)
class L2Ball:
    """The inputs :math:`x` with :math:`\\lVert x - c\\rVert_2\\le r`, the norm being over all of a sample's numbers.

    The solution is differentiable in both ``radius`` and ``center``.

    Args:
        radius: :math:`r \\ge 0`, a number, a scalar tensor, or a tensor ``[batch]``.
        center: :math:`c`, a number, or what has the structure of the input: leaves with the batch dimension or
            without it.
    """

    radius: Any
    center: Any = 0.0

    def __post_init__(self) -> None:
        _check_sign("L2Ball", "radius", self.radius)

    def project(self, x: Tensor, radius: Tensor, center: Tensor) -> Tensor:
        """The nearest point of the set to ``x`` (``[batch, dim]``); differentiable."""
        away = x - center
        length = torch.linalg.vector_norm(away, dim=1, keepdim=True)
        outside = length > radius
        shrunk = radius / torch.where(outside, length, 1)
        return torch.where(outside, center + shrunk * away, x)


@final
@dataclass(frozen=True)
class Box:
    """The inputs :math:`x` with :math:`low \\le x\\le high`, number by number.

    The solution is differentiable in both bounds.

    Args:
        low, high: a number (infinite for none), or what has the structure of the input: leaves with the batch dimension
            or without it.
    """

    low: Any
    high: Any

    def __post_init__(self) -> None:
        if isinstance(self.low, (int, float)) and isinstance(self.high, (int, float)) and not self.low <= self.high:
            raise ValueError(f"Box.low is {self.low} and Box.high is {self.high}: low must not exceed high")

    def project(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The nearest point of the set to ``x`` (``[batch, dim]``); differentiable."""
        return torch.where(x < low, low, torch.where(x > high, high, x))


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


def _check_sign(kind: str, name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(f"{kind}.{name} is {value}, and must not be negative")
