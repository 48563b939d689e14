"""Dropout with one mask a solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once per solve of the enclosing :class:`Equilibrium` (Gal and Ghahramani 2016).

    The map is then the same at every iteration, and in the backward pass. In eval mode it does nothing.

    Args:
        p: the share that is dropped, in [0, 1).
        spatial: whether whole channels are dropped, for inputs ``[batch, channels, ...]``.
    """

    def __init__(self, p: float = 0.5, spatial: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"VariationalDropout.p is {p}, and must lie in [0, 1)")
        self.p, self.spatial = p, spatial
        self.held: Tensor | None = None
        self.drawing = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.drawing:
            shape = x.shape[:2] + (1,) * (x.ndim - 2) if self.spatial else x.shape
            self.held = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p) / (1 - self.p)
        if self.held is None:
            raise RuntimeError(
                "VariationalDropout has no mask: in training it must run inside torchimplicit.nn.Equilibrium, which "
                "draws one mask a solve"
            )
        return x * self.held

    def extra_repr(self) -> str:
        return f"p={self.p}, spatial={self.spatial}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None, "drawing": False}


def active_dropouts(root: nn.Module) -> list[VariationalDropout]:
    """Those in ``root`` that need a mask now."""
    return [m for m in root.modules() if isinstance(m, VariationalDropout) and m.training and m.p > 0]


@contextmanager
def drawing(modules: Sequence[VariationalDropout]) -> Iterator[None]:
    """Each module draws a new mask when it is called."""
    for module in modules:
        module.drawing = True
    try:
        yield
    finally:
        for module in modules:
            module.drawing = False
