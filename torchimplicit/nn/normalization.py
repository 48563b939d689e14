"""Normalized weights, computed once per solve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from torchimplicit.validation import at_least

Module = TypeVar("Module", bound=nn.Module)


@final
class WeightNorm(nn.Module):
    """The parametrization :math:`w=v\\min(c,\\,g/\\lVert v\\rVert)`, with the length over all dimensions but ``dim``.

    The length :math:`g` is a parameter, or the constant ``target``; ``clip`` is :math:`c`, ``None`` for no bound.
    """

    def __init__(self, dim: int, target: float | None = None, clip: float | None = None) -> None:
        super().__init__()
        self.dim, self.target, self.clip = dim, target, clip

    def forward(self, *parameters: Tensor) -> Tensor:
        v = parameters[-1]
        g = parameters[0] if self.target is None else self.target
        length = self._length(v)
        return g * v / length if self.clip is None else v * (g / length).clamp_max(self.clip)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The parameters that give ``weight``, which is taken to have the length ``target`` already if there is one."""
        return (self._length(weight), weight) if self.target is None else weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, target={self.target}, clip={self.clip}"

    def _length(self, v: Tensor) -> Tensor:
        others = [d for d in range(v.ndim) if d != self.dim % v.ndim]
        if not others:
            return v.abs()
        return torch.linalg.vector_norm(v, dim=others, keepdim=True)


@final
class SpectralNorm(nn.Module):
    """The parametrization :math:`w\\min(c,\\,b/\\sigma)`, with :math:`\\sigma=\\lVert W v\\rVert`, or
    :math:`u^\\top Wv` if ``paired``.

    The bound :math:`b` is a constant, or, with ``scale``, a parameter for each entry of ``dim`` that begins there;
    ``clip`` is :math:`c`, ``None`` for no bound on the factor.

    Attributes:
        right, left: :math:`v` and, if ``paired``, :math:`u`, the unit vectors that the power method improves.
        held: the vectors of the running solve, where the weight is computed anew in every evaluation (compiled cells).
    """

    right: Tensor
    left: Tensor

    def __init__(
        self,
        weight: Tensor,
        bound: float,
        clip: float | None,
        iterations: int,
        dim: int,
        scale: bool = False,
        paired: bool = False,
    ) -> None:
        super().__init__()
        self.bound, self.clip, self.iterations, self.dim = bound, clip, iterations, dim
        self.scale, self.paired = scale, paired
        self.held: tuple[Tensor, ...] | None = None
        matrix = self._matrix(weight.detach())
        # a fixed seed makes runs reproducible; a random vector is practically never orthogonal to the singular vector
        # that the power method looks for
        start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
        self.register_buffer("right", (start / torch.linalg.vector_norm(start)).to(weight.dtype))
        if paired:
            self.register_buffer("left", _unit(matrix @ self.right.to(matrix)).to(weight.dtype))
        self._improve(matrix, 50)

    def forward(self, *parameters: Tensor) -> Tensor:
        weight = parameters[-1]
        # autocast would multiply in half precision, and sigma, and with it the bound, would be off by as much
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            if self.held is not None:
                vectors = self.held
            elif self.training:
                vectors = self._improve(matrix.detach(), self.iterations)
            else:
                vectors = self.vectors()
            right, *left = (vector.to(matrix.dtype) for vector in vectors)
            image = matrix @ right
            sigma = left[0] @ image if left else torch.linalg.vector_norm(image)
            if self.scale or self.paired:  # a paired sigma may be negative at first
                factor = (parameters[0] if self.scale else self.bound) / sigma
                return weight * (factor if self.clip is None else factor.clamp_max(self.clip)).to(weight.dtype)
            ratio = sigma / self.bound
            return weight / (ratio if self.clip is None else ratio.clamp_min(1 / self.clip)).to(weight.dtype)

    def vectors(self) -> tuple[Tensor, ...]:
        """Copies of the current vectors: a later forward pass may change them before this one's backward pass."""
        return (self.right.clone(), self.left.clone()) if self.paired else (self.right.clone(),)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The parameters for ``weight``, which is taken to be normalized already."""
        if not self.scale:
            return weight
        shape = [n if d == self.dim % weight.ndim else 1 for d, n in enumerate(weight.shape)]
        return weight.new_full(shape, self.bound), weight

    def extra_repr(self) -> str:
        names = ("bound", "clip", "iterations", "dim", "scale", "paired")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _matrix(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.movedim(self.dim, 0).flatten(1).to(wide)

    @torch.no_grad()
    def _improve(self, matrix: Tensor, iterations: int) -> tuple[Tensor, ...]:
        right = self.right.to(matrix.dtype)
        left = self.left.to(matrix.dtype) if self.paired else None
        for _ in range(iterations):
            right = _unit(matrix.mT @ (matrix @ right if left is None else left))
            if left is not None:
                left = _unit(matrix @ right)
        self.right.copy_(right)
        if left is None:
            return (right,)
        self.left.copy_(left)
        return right, left

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "held": None}


def weight_norm(
    module: Module, name: str = "weight", dim: int = 0, *, target: float | None = None, clip: float | None = None
) -> Module:
    """Weight normalization (Salimans and Kingma 2016, arXiv 1602.07868), computed once per solve inside
    :class:`Equilibrium`.

    ``torch.nn.utils.parametrize.remove_parametrizations`` undoes it, and :func:`remove_norm` for a whole model. As with
    every parametrization of PyTorch, the module can be deep-copied and saved by its ``state_dict``, but not pickled
    whole, and its parameters are new ones: make the optimizer afterwards.

    Args:
        module: whose parameter ``name`` becomes :math:`v\\min(c,\\,g/\\lVert v\\rVert)`.
        name: the name of the parameter.
        dim: the dimension whose entries each have a length (0: one per output).
        target: the length :math:`g`, the same for all and not learned; ``None``: learned, one per entry of ``dim``,
            beginning at the parameter's present lengths.
        clip: :math:`c`, the largest factor by which :math:`v` is multiplied; ``None`` for no bound.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, the parameter has no such dimension or a zero vector along it, or
            a number is out of range.
    """
    weight = _parameter("weight_norm", module, name)
    _check_dim("weight_norm", weight, name, dim)
    for option, value in (("target", target), ("clip", clip)):
        if value is not None:
            _check_positive("weight_norm", option, value)
    norm = WeightNorm(dim, target, clip)
    if not weight.is_meta and not bool(norm._length(weight.detach()).all()):
        raise ValueError(_zero("weight_norm", module, name, f"a zero vector along dimension {dim}"))
    if target is None:
        _check_first("weight_norm", module, name, "target=...")
    parametrize.register_parametrization(module, name, norm)
    return module


def spectral_norm(
    module: Module,
    name: str = "weight",
    bound: float = 1.0,
    only_above: bool = False,
    iterations: int = 5,
    dim: int = 0,
    *,
    clip: float | None = None,
    scale: bool = False,
    paired: bool = False,
) -> Module:
    """Spectral normalization (Miyato et al. 2018, arXiv 1802.05957), computed once per solve inside
    :class:`Equilibrium`.

    The singular value is :math:`\\sigma=\\lVert Wv\\rVert`, with a stored unit vector :math:`v` that the power method
    improves once per solve in training. Derivatives of every order are taken at fixed :math:`v`, as in the paper; the
    first equals that of the largest singular value once :math:`v` has converged. In eval mode :math:`v` belongs to the
    parameter as it was when the module last ran in training: after changing the parameter by hand, run the module once
    in training mode.

    For a convolution, :math:`\\sigma` belongs to the kernel as a matrix ``[out, in * kernel]``. The norm of the
    convolution itself may be larger by a factor of up to the square root of the kernel's size.

    Args:
        module: whose parameter ``name`` is multiplied by :math:`\\min(c,\\,b/\\sigma)`.
        name: the name of the parameter.
        bound: :math:`b`, the largest singular value after normalization.
        only_above: whether weights with singular values below the bound are left unchanged; the same as ``clip=1``.
        iterations: the number of iterations of the power method per solve.
        dim: the dimension of the outputs; 1 for transposed convolutions.
        clip: :math:`c`, the largest factor; ``None`` for no bound.
        scale: whether :math:`b` is learned, one per entry of ``dim``, beginning at ``bound``, which then no longer
            bounds the singular value.
        paired: whether the left vector :math:`u` is stored too and :math:`\\sigma=u^\\top Wv`, as in PyTorch and
            TorchDEQ; after a step of the optimizer it is out of date until the module runs in training.

    Returns:
        ``module``.

    Raises:
        ValueError: the module has no such parameter, the parameter is zero or neither a matrix nor a kernel, or a
            number is out of range.
    """
    at_least("spectral_norm", "iterations", iterations, 1)
    _check_positive("spectral_norm", "bound", bound)
    if clip is not None:
        _check_positive("spectral_norm", "clip", clip)
    if only_above:
        if clip is not None and clip != 1:
            raise ValueError(f"spectral_norm: only_above=True means clip=1, but clip={clip} is given too: give one")
        clip = 1.0
    weight = _parameter("spectral_norm", module, name)
    if weight.ndim < 2:
        raise ValueError(f"spectral_norm: {name} has shape {tuple(weight.shape)}, but must be a matrix or a kernel")
    _check_dim("spectral_norm", weight, name, dim)
    bounded = clip is not None and not scale and not paired  # then zero stays zero
    if not bounded and not weight.is_meta and not bool(weight.detach().any()):
        raise ValueError(_zero("spectral_norm", module, name, "no entry but zeros"))
    if scale:
        _check_first("spectral_norm", module, name, "scale=False")
    norm = SpectralNorm(weight, bound, clip, iterations, dim, scale, paired)
    parametrize.register_parametrization(module, name, norm)
    return module


def parametrizations(root: nn.Module) -> Iterator[ParametrizationList]:
    """Every parametrization in ``root``, ours and others."""
    for module in root.modules():
        if parametrize.is_parametrized(module):
            yield from module.parametrizations.values()  # type: ignore[operator]


def settled_vectors(chains: Iterable[ParametrizationList]) -> list[tuple[SpectralNorm, Any]]:
    """The spectral norms with their vectors, improved once in those that are in training mode."""
    pairs = []
    for chain in chains:
        with torch.no_grad():
            chain()
        pairs += [(step, step.vectors()) for step in chain if isinstance(step, SpectralNorm)]
    return pairs


@contextmanager
def fixed(weights: Sequence[tuple[ParametrizationList, Tensor]], read: bool = False) -> Iterator[None]:
    """While the context lasts, each parametrization returns the tensor paired with it and computes nothing.

    Args:
        read: whether a compiler traces the module. It guards on the identity of the replaced ``forward``, which must
            therefore be the same object in every solve.
    """
    before = [chain.__dict__.get("forward") for chain, _ in weights]
    for chain, value in weights:
        if read:
            giver = _givers.setdefault(chain, _Giver())
            giver.value = value
        chain.forward = giver if read else partial(_given, value)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (chain, _), forward in zip(weights, before, strict=True):
            if forward is None:
                del chain.forward
            else:
                chain.forward = forward  # type: ignore[method-assign]


@contextmanager
def holding(pairs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """While the context lasts, the ``held`` of each module is the value paired with it."""
    before = [module.held for module, _ in pairs]
    for module, value in pairs:
        module.held = value
    try:
        yield
    finally:
        for (module, _), value in zip(pairs, before, strict=True):
            module.held = value


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)


class _Giver:
    """A callable that returns a tensor and is the same object in every solve."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


_givers: WeakKeyDictionary[ParametrizationList, _Giver] = WeakKeyDictionary()


def _given(value: Tensor) -> Tensor:
    return value


def _parameter(what: str, module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    kind = type(module).__name__
    if not isinstance(weight, Tensor):
        raise ValueError(f"{what}: {kind} has no parameter {name!r} to normalize")
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{what}: {kind}.{name} has no shape yet: call the model once before")
    if not (name in module._parameters or name in module._buffers or parametrize.is_parametrized(module, name)):
        raise ValueError(
            f"{what}: {kind}.{name} is not a parameter but the result of another normalization (a hook of "
            "torch.nn.utils or of TorchDEQ): remove that one first"
        )
    return weight


def _check_first(what: str, module: nn.Module, name: str, instead: str) -> None:
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{what}: {type(module).__name__}.{name} has a parametrization already, but one with a learned scale must "
            f"be the first: use {instead}, or remove the other one (remove_norm)"
        )


def _check_positive(what: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}: {name} must be a number, not {type(value).__name__} ({value!r})")
    if not 0 < value < float("inf"):
        raise ValueError(f"{what}: {name} is {value}, but must be a positive finite number")


def _zero(what: str, module: nn.Module, name: str, zeros: str) -> str:
    return (
        f"{what}: {type(module).__name__}.{name} has {zeros}, which cannot be normalized: the result would be NaN. "
        "Initialize it with other numbers, or leave this layer out (apply_norm has skip=...)"
    )


def _check_dim(what: str, weight: Tensor, name: str, dim: int) -> None:
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"{what}: {name} has shape {tuple(weight.shape)}, but no dimension {dim}")
