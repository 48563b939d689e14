"""Normalized weights, computed once per solve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from torchimplicit.validation import at_least

Module = TypeVar("Module", bound=nn.Module)


@final
class WeightNorm(nn.Module):
    """The parametrization :math:`w = g\\, v / \\lVert v\\rVert`, over all dimensions but ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / self._length(v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters that give ``weight``."""
        return self._length(weight), weight

    def _length(self, v: Tensor) -> Tensor:
        others = [d for d in range(v.ndim) if d != self.dim % v.ndim]
        if not others:
            return v.abs()
        return torch.linalg.vector_norm(v, dim=others, keepdim=True)


@final
class SpectralNorm(nn.Module):
    """The parametrization :math:`w\\,b/\\sigma`, with :math:`\\sigma=\\lVert W v\\rVert`, or only where
    :math:`\\sigma > b`.

    Attributes:
        right: :math:`v`, the unit vector that the power method improves.
        held: :math:`v` of the running solve, where the weight is computed anew in every evaluation (compiled cells).
    """

    right: Tensor

    def __init__(self, weight: Tensor, bound: float, only_above: bool, iterations: int, dim: int) -> None:
        super().__init__()
        self.bound, self.only_above, self.iterations, self.dim = bound, only_above, iterations, dim
        self.held: Tensor | None = None
        matrix = self._matrix(weight.detach())
        # a start that is the same in every run, and orthogonal to no singular vector in practice
        start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
        self.register_buffer("right", (start / torch.linalg.vector_norm(start)).to(weight.dtype))
        self._improve(matrix, 50)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            if self.held is not None:
                right = self.held
            elif self.training:
                right = self._improve(matrix.detach(), self.iterations)
            else:
                right = self.right.clone()  # a later forward pass may change it before this one's backward
            ratio = torch.linalg.vector_norm(matrix @ right.to(matrix.dtype)) / self.bound
            return weight / (ratio.clamp_min(1) if self.only_above else ratio).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter for ``weight``, which is taken to be normalized already."""
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}, only_above={self.only_above}, iterations={self.iterations}, dim={self.dim}"

    def _matrix(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.movedim(self.dim, 0).flatten(1).to(wide)

    @torch.no_grad()
    def _improve(self, matrix: Tensor, iterations: int) -> Tensor:
        right = self.right.to(matrix.dtype)
        for _ in range(iterations):
            right = matrix.mT @ (matrix @ right)
            right = right / torch.linalg.vector_norm(right).clamp_min(torch.finfo(right.dtype).tiny)
        self.right.copy_(right)
        return right

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "held": None}


def weight_norm(module: Module, name: str = "weight", dim: int = 0) -> Module:
    """Weight normalization (Salimans and Kingma 2016, arXiv 1602.07868), computed once per solve inside
    :class:`Equilibrium`.

    ``torch.nn.utils.parametrize.remove_parametrizations`` undoes it. As with every parametrization of PyTorch, the
    module can be deep-copied and saved by its ``state_dict``, but not pickled whole.

    Args:
        module: whose parameter ``name`` becomes :math:`g\\,v/\\lVert v\\rVert`; it keeps its value.
        name: of the parameter.
        dim: the dimension that keeps a length of its own (0: one per output).

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, or it has no such dimension.
    """
    _check_dim("weight_norm", _parameter("weight_norm", module, name), name, dim)
    parametrize.register_parametrization(module, name, WeightNorm(dim))
    return module


def spectral_norm(
    module: Module,
    name: str = "weight",
    bound: float = 1.0,
    only_above: bool = False,
    iterations: int = 5,
    dim: int = 0,
) -> Module:
    """Spectral normalization (Miyato et al. 2018, arXiv 1802.05957), computed once per solve inside
    :class:`Equilibrium`.

    The singular value is :math:`\\sigma=\\lVert Wv\\rVert`, with a unit vector :math:`v` that is kept, and improved by
    the power method once per solve in training. Derivatives of every order are those at fixed :math:`v`, as in the
    paper; the first is also that of the largest singular value once :math:`v` has converged. The power method works on
    the parameter as it was when the module last ran in training: after changing it by hand, run once in training mode.

    For a convolution it is the singular value of the kernel as a matrix ``[out, in * kernel]``, not of the convolution
    itself, whose norm may be larger by up to the square root of the kernel's size.

    Args:
        module: whose parameter ``name`` is normalized.
        name: of the parameter.
        bound: the largest singular value afterwards.
        only_above: whether weights below the bound are left alone.
        iterations: of the power method, per solve.
        dim: the dimension of the outputs; 1 for transposed convolutions.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, it is not a matrix or kernel, or a number is out of range.
    """
    at_least("spectral_norm", "iterations", iterations, 1)
    if not 0 < bound < float("inf"):
        raise ValueError(f"spectral_norm: bound is {bound}, and must be a positive finite number")
    weight = _parameter("spectral_norm", module, name)
    if weight.ndim < 2:
        raise ValueError(f"spectral_norm: {name} has shape {tuple(weight.shape)}, and must be a matrix or a kernel")
    _check_dim("spectral_norm", weight, name, dim)
    parametrize.register_parametrization(module, name, SpectralNorm(weight, bound, only_above, iterations, dim))
    return module


def per_solve(module: nn.Module) -> Callable[..., Any]:
    """The module as a function whose parametrized weights are those of now: computed once, with their gradient, and
    not in every call. What :class:`Equilibrium` does for its cell, for a map that is given to :func:`solve` by hand.
    """
    weights = [(chain, chain()) for chain in parametrizations(module)]

    def function(*args: Any) -> Any:
        with fixed(weights):
            return module(*args)

    return function if weights else module


def parametrizations(root: nn.Module) -> Iterator[ParametrizationList]:
    """Every parametrization in ``root``, ours and others."""
    for module in root.modules():
        if parametrize.is_parametrized(module):
            yield from module.parametrizations.values()  # type: ignore[operator]


def settled_vectors(chains: Iterable[ParametrizationList]) -> list[tuple[SpectralNorm, Tensor]]:
    """The vectors of the spectral norms, improved once where they are in training."""
    found = []
    for chain in chains:
        with torch.no_grad():
            chain()
        found += [(step, step.right.clone()) for step in chain if isinstance(step, SpectralNorm)]
    return found


@contextmanager
def fixed(weights: Sequence[tuple[ParametrizationList, Tensor]]) -> Iterator[None]:
    """Each parametrization gives the tensor beside it, and computes nothing, while the context lasts."""
    before = [chain.__dict__.get("forward") for chain, _ in weights]
    for chain, value in weights:
        chain.forward = partial(_given, value)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (chain, _), forward in zip(weights, before, strict=True):
            if forward is None:
                del chain.forward
            else:
                chain.forward = forward  # type: ignore[method-assign]


@contextmanager
def holding(pairs: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    """Each module's ``held`` is the tensor beside it while the context lasts."""
    before = [module.held for module, _ in pairs]
    for module, value in pairs:
        module.held = value
    try:
        yield
    finally:
        for (module, _), value in zip(pairs, before, strict=True):
            module.held = value


def _given(value: Tensor) -> Tensor:
    return value


def _parameter(what: str, module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{what}: {type(module).__name__} has no parameter {name!r} to normalize")
    return weight


def _check_dim(what: str, weight: Tensor, name: str, dim: int) -> None:
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"{what}: {name} has shape {tuple(weight.shape)}, and no dimension {dim}")
