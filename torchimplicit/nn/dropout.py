"""Dropout with one mask per solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once per solve of the enclosing :class:`Equilibrium` (Gal and Ghahramani 2016).

    The map is then the same in every iteration, and in the backward pass. Kept entries are scaled by ``1 / (1 - p)``,
    so that the mean stays. In eval mode it is the identity. If the cell uses one module twice, both uses share the
    mask.

    Outside an equilibrium, :func:`dropout_masks` keeps the masks for the length of a ``with`` block, and
    :func:`per_solve` makes a map for :func:`solve` whose masks are fixed.

    ============================  =====================  ===================
    dropped                       input                  option
    ============================  =====================  ===================
    single entries                of any shape
    channels, at all positions    ``[batch, C, ...]``    ``spatial=True``
    channels, at all positions    ``[batch, L, C]``      ``shared=1``
    positions (tokens)            ``[batch, L, C]``      ``shared=2``
    channels of an image          ``[batch, H, W, C]``   ``shared=(1, 2)``
    pixels of an image            ``[batch, C, H, W]``   ``shared=1``
    ============================  =====================  ===================

    Args:
        p: the probability that an entry is dropped, in [0, 1).
        spatial: whether whole channels are dropped, for inputs ``[batch, channels, ...]``.
        shared: the dimension or dimensions along which the mask is constant; not 0, the batch. Negative ones count from
            the end.

    Raises:
        ValueError: a number out of range; an input that has no such dimension.
        RuntimeError: in training, a call outside an equilibrium, :func:`dropout_masks` and :func:`per_solve`; an input
            of another shape than the one for which the mask was drawn.

    Shapes: the input is any tensor, with at least two dimensions if ``spatial``; the output is like it.
    """

    def __init__(self, p: float = 0.5, spatial: bool = False, *, shared: int | Sequence[int] = ()) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"VariationalDropout.p is {p}, but must lie in [0, 1)")
        dims = tuple(shared) if isinstance(shared, Sequence) else (shared,)
        if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
            raise TypeError(f"VariationalDropout.shared must be a dimension or several, not {shared!r}")
        if spatial and dims:
            raise ValueError(
                "VariationalDropout: spatial=True already shares all dimensions from 2 on: give spatial=True or "
                "shared=..., not both"
            )
        self.p, self.spatial, self.shared = p, spatial, dims
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
                    "which draws one mask per solve; elsewhere, inside `with torchimplicit.nn.dropout_masks(model):`, "
                    "or, for torchimplicit.solve, in a map made by torchimplicit.nn.per_solve(module)"
                )
            mask = self.held = self._draw(x)
        if mask.shape != x.shape and mask.shape != self._shape(x):
            raise RuntimeError(
                f"VariationalDropout has a mask of shape {tuple(mask.shape)}, but its input has shape "
                f"{tuple(x.shape)}. Uses with different shapes need a module each. If the batch shrinks during a solve "
                "(rowwise=True), use torchimplicit.nn.Equilibrium, which selects the rows of the masks too"
            )
        return x * mask

    def _draw(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x.detach().new_full(self._shape(x), 1 - self.p)) / (1 - self.p)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the mask for ``x``."""
        if self.spatial:
            if x.ndim < 2:
                raise ValueError(f"VariationalDropout(spatial=True) needs [batch, channels, ...], not {tuple(x.shape)}")
            return (*x.shape[:2], *(1 for _ in x.shape[2:]))
        shape = list(x.shape)
        for d in self.shared:
            if not -x.ndim < d < x.ndim or d == 0:
                raise ValueError(
                    f"VariationalDropout(shared={d}) does not fit an input of shape {tuple(x.shape)}: shared must be "
                    "one of its dimensions other than the batch (0), since each sample has a mask of its own"
                )
            shape[d] = 1
        return tuple(shape)

    def extra_repr(self) -> str:
        return f"p={self.p}, spatial={self.spatial}" + (f", shared={self.shared}" if self.shared else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "held": None, "drawing": False}


@contextmanager
def dropout_masks(model: nn.Module) -> Iterator[None]:
    """Keep one mask of every :class:`VariationalDropout` in ``model`` until the end of the ``with`` block.

    Each draws its mask when it is first used. This is for training steps with hand-written iterations, or with dropout
    outside an equilibrium. An :class:`Equilibrium` inside uses these masks too, the same in all its solves.
    """
    modules = [m for m in model.modules() if isinstance(m, VariationalDropout) and m.held is None]
    try:
        with drawing(modules):
            yield
    finally:
        for module in modules:
            if not module.drawing:  # otherwise an enclosing block keeps it
                module.held = None


def active_dropouts(root: nn.Module) -> list[VariationalDropout]:
    """The dropouts in ``root`` that need a mask in the current mode."""
    return [m for m in root.modules() if isinstance(m, VariationalDropout) and m.training and m.p > 0]


@contextmanager
def drawing(modules: Sequence[VariationalDropout]) -> Iterator[None]:
    """While the context lasts, each module without a mask draws one when it is called."""
    before = [module.drawing for module in modules]
    for module in modules:
        module.drawing = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.drawing = value
