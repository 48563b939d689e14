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

    The map is then the same at every iteration, and in the backward pass. What is kept is scaled by ``1 / (1 - p)``, so
    that the mean stays. In eval mode it does nothing. Where the cell uses one module twice, both uses share the mask.

    Args:
        p: the share that is dropped, in [0, 1).
        spatial: whether whole channels are dropped, for inputs ``[batch, channels, ...]``.

    Raises:
        RuntimeError: in training, outside an :class:`Equilibrium`.

    Shapes: the input is any tensor, with at least two dimensions if ``spatial``; the output is like it.
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
        mask = self.held
        if mask is None:
            if not self.drawing:
                raise RuntimeError(
                    "VariationalDropout has no mask: in training it must run inside torchimplicit.nn.Equilibrium, "
                    "which draws one mask a solve"
                )
            mask = self.held = self._draw(x)
        return x * mask

    def _draw(self, x: Tensor) -> Tensor:
        if self.spatial and x.ndim < 2:
            raise ValueError(f"VariationalDropout(spatial=True) needs [batch, channels, ...], not {tuple(x.shape)}")
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.spatial else x.shape
        return torch.bernoulli(x.detach().new_full(shape, 1 - self.p)) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, spatial={self.spatial}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "held": None, "drawing": False}


def active_dropouts(root: nn.Module) -> list[VariationalDropout]:
    """Those in ``root`` that need a mask now."""
    return [m for m in root.modules() if isinstance(m, VariationalDropout) and m.training and m.p > 0]


@contextmanager
def drawing(modules: Sequence[VariationalDropout]) -> Iterator[None]:
    """Each module without a mask draws one when it is called."""
    before = [module.drawing for module in modules]
    for module in modules:
        module.drawing = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.drawing = value
