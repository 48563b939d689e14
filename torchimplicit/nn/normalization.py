"""Normalized weights, computed once per solve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchimplicit.validation import at_least

Module = TypeVar("Module", bound=nn.Module)


class Held(nn.Module):
    """A parametrization whose value can be held: while it is, the weight is that tensor and nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}


@final
class WeightNorm(Held):
    """:math:`w = g\\, v / \\lVert v\\rVert` over all dimensions but ``dim`` (Salimans and Kingma 2016)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        if self.held is not None:
            return self.held
        return g * v / self._length(v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters that give ``weight``."""
        return self._length(weight), weight

    def _length(self, v: Tensor) -> Tensor:
        others = [d for d in range(v.ndim) if d != self.dim % v.ndim]
        return torch.linalg.vector_norm(v, dim=others, keepdim=True)


@final
class SpectralNorm(Held):
    """The weight divided by its largest singular value over ``bound``, or only where that exceeds 1."""

    def __init__(self, weight: Tensor, bound: float, only_above: bool, iterations: int) -> None:
        super().__init__()
        self.bound, self.only_above, self.iterations = bound, only_above, iterations
        matrix = weight.detach().flatten(1)
        # a deterministic start that is orthogonal to no singular vector in practice
        start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
        self.register_buffer("right", start / torch.linalg.vector_norm(start))
        self.right: Tensor
        self._improve(matrix, 50)

    def forward(self, weight: Tensor) -> Tensor:
        if self.held is not None:
            return self.held
        matrix = weight.flatten(1)
        if self.training:
            self._improve(matrix.detach(), self.iterations)
        with torch.no_grad():
            left = matrix @ self.right
            left = left / torch.linalg.vector_norm(left).clamp_min(torch.finfo(left.dtype).tiny)
        ratio = torch.dot(left, torch.mv(matrix, self.right.clone())) / self.bound
        return weight / (ratio.clamp_min(1) if self.only_above else ratio)

    @torch.no_grad()
    def _improve(self, matrix: Tensor, iterations: int) -> None:
        right = self.right
        for _ in range(iterations):
            right = matrix.mT @ (matrix @ right)
            right = right / torch.linalg.vector_norm(right).clamp_min(torch.finfo(right.dtype).tiny)
        self.right.copy_(right)


def weight_norm(module: Module, name: str = "weight", dim: int = 0) -> Module:
    """Weight normalization (Salimans and Kingma 2016), computed once per solve inside :class:`Equilibrium`.

    Args:
        module: whose parameter ``name`` becomes :math:`g\\,v/\\lVert v\\rVert`; it keeps its value.
        name: of the parameter.
        dim: the dimension that keeps a length of its own (0: one per output).

    Returns:
        ``module``.
    """
    parametrize.register_parametrization(_having(module, name), name, WeightNorm(dim))
    return module


def spectral_norm(
    module: Module, name: str = "weight", bound: float = 1.0, only_above: bool = False, iterations: int = 5
) -> Module:
    """Spectral normalization (Miyato et al. 2018), computed once per solve inside :class:`Equilibrium`.

    The singular value is estimated by power iteration, whose vector is kept and improved once per solve in training.
    For a convolution it is that of the weight as a matrix ``[out, in * kernel]``, not of the convolution itself.

    Args:
        module: whose parameter ``name`` is normalized.
        name: of the parameter.
        bound: the largest singular value afterwards.
        only_above: whether weights below the bound are left alone.
        iterations: of the power method, per solve.

    Returns:
        ``module``.
    """
    at_least("spectral_norm", "iterations", iterations, 1)
    if not 0 < bound < float("inf"):
        raise ValueError(f"spectral_norm: bound is {bound}, and must be a positive finite number")
    weight = getattr(_having(module, name), name)
    if weight.ndim < 2:
        raise ValueError(f"spectral_norm: {name} has shape {tuple(weight.shape)}, and must be a matrix or a kernel")
    parametrize.register_parametrization(module, name, SpectralNorm(weight, bound, only_above, iterations))
    return module


def held_parametrizations(root: nn.Module) -> list[tuple[Held, Tensor]]:
    """Every holdable parametrization in ``root`` with the weight it gives now (carrying its gradient)."""
    found = []
    for module in root.modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            last = chain[-1]
            if isinstance(last, Held):
                found.append((last, getattr(module, name)))
    return found


@contextmanager
def holding(pairs: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    """Hold each module's value while the context lasts."""
    before = [module.held for module, _ in pairs]
    for module, value in pairs:
        module.held = value
    try:
        yield
    finally:
        for (module, _), value in zip(pairs, before, strict=True):
            module.held = value


def _having(module: nn.Module, name: str) -> nn.Module:
    if not isinstance(getattr(module, name, None), Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} to normalize")
    return module
