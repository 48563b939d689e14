"""Constraint sets for minima and optimized inputs, and nonsmooth penalties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.precision import TORCH_RELEASE


@final
@dataclass(frozen=True)
class LinearEquality:
    """The hyperplane of states :math:`p` with :math:`\\langle w, p\\rangle = N`, per sample or shared by all.

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
    """The ball of inputs :math:`x` with :math:`\\lVert x - c\\rVert_2\\le r`, the norm being over all entries of a
    sample.

    The solution is differentiable in both ``radius`` and ``center``.

    Args:
        radius: :math:`r \\ge 0`, a number, a scalar tensor, or a tensor ``[batch]``.
        center: :math:`c`, a number, or a pytree with the structure of the input, whose leaves may have the batch
            dimension or not.

    Raises:
        ValueError: the radius is negative.
    """

    radius: Any
    center: Any = 0.0

    def __post_init__(self) -> None:
        _check_sign("L2Ball", "radius", self.radius)

    def project(self, x: Tensor, radius: Tensor, center: Tensor) -> Tensor:
        """The projection of ``x`` (``[batch, dim]``) onto the set; differentiable."""
        away = x - center
        length = torch.linalg.vector_norm(away, dim=1, keepdim=True)
        outside = length > radius
        shrunk = radius / torch.where(outside, length, 1)
        return torch.where(outside, center + shrunk * away, x)


@final
@dataclass(frozen=True)
class Box:
    """The box of inputs :math:`x` with :math:`low \\le x\\le high`, entry by entry.

    The solution is differentiable in both bounds.

    Args:
        low, high: a number (infinite for no bound), or a pytree with the structure of the input, whose leaves may have
            the batch dimension or not.

    Raises:
        ValueError: ``low`` exceeds ``high``.
    """

    low: Any
    high: Any

    def __post_init__(self) -> None:
        lows, highs = (pytree.tree_leaves(bound) for bound in (self.low, self.high))
        if len(lows) != len(highs) and min(len(lows), len(highs)) == 1:  # one number for a whole tree
            lows, highs = lows * len(highs), highs * len(lows)
        for low, high in zip(lows, highs, strict=False):  # trees that do not match are reported once the state is known
            _check_order(low, high)

    def project(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The projection of ``x`` (``[batch, dim]``) onto the set; differentiable."""
        return clamped(x, low, high)


def clamped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``torch.clamp`` with a derivative of one in ``x`` where ``x`` lies on a bound.

    An entry that has come to its bound, and is not pushed against it, may move: it takes part in the curvature by which
    a minimum is told from a saddle. torch's own derivative is one up to 2.13, and zero or one half from 2.14 on.
    """
    if TORCH_RELEASE < (2, 14):
        return torch.clamp(x, low, high)
    return torch.where(x < low, low, torch.where(x > high, high, x))


@final
@dataclass(frozen=True)
class NonNegative:
    """The states whose entries are all nonnegative."""


@final
@dataclass(frozen=True)
class Simplex:
    """The simplex of states :math:`z\\ge0` whose entries sum to ``total``.

    Args:
        total: a number, a scalar tensor, or a tensor ``[batch]``; the solution is differentiable in it.

    Raises:
        ValueError: ``total`` is negative.
    """

    total: Any = 1.0

    def __post_init__(self) -> None:
        _check_sign("Simplex", "total", self.total)


@final
@dataclass(frozen=True)
class LinearEqualities:
    """The states :math:`z` with :math:`Az=b`, where z holds the entries of all leaves of a sample, one leaf after
    another.

    The solution is differentiable in A and b. The rows of A must be linearly independent.

    Args:
        matrix: A, ``[m, dim]``, or ``[batch, m, dim]``.
        total: b, ``[m]``, or ``[batch, m]``, or a number.
    """

    matrix: Tensor
    total: Any


@final
@dataclass(frozen=True)
class LinearInequalities:
    """The states :math:`z` with :math:`Gz\\le h`, where z holds the entries of all leaves of a sample, one leaf after
    another.

    The solution is differentiable in G and h.

    Args:
        matrix: G, ``[m, dim]``, or ``[batch, m, dim]``.
        bound: h, ``[m]``, or ``[batch, m]``, or a number.
    """

    matrix: Tensor
    bound: Any


@final
@dataclass(frozen=True)
class Projection:
    """A convex set that is given by the projection onto it.

    Args:
        function: ``function(z, *args)``, the state of the set that is nearest to z; differentiable where it is smooth.
        args: further arguments of ``function``: pytrees of tensors, in which the solution is differentiable. It must
            not capture tensors that require grad.

    Raises:
        TypeError: ``function`` is not callable.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        _check_callable("Projection.function", self.function)


@final
@dataclass(frozen=True)
class Proximal:
    """A convex penalty that is added to the energy and need not be smooth, given by its proximal operator.

    Args:
        prox: ``prox(v, step, *args)``, the state :math:`z` that minimizes
            :math:`penalty(z)+\\lVert z-v\\rVert^2/(2\\,step)`; ``step`` broadcasts against a state of one leaf
            (``[batch]`` if there are several leaves).
        penalty: ``penalty(z, *args)``, ``[batch]``; a scalar if not batched. Infinite outside its domain.
        args: further arguments of both, see :class:`Projection`.

    Raises:
        TypeError: ``prox`` or ``penalty`` is not callable.
    """

    prox: Callable[..., Any]
    penalty: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        _check_callable("Proximal.prox", self.prox)
        _check_callable("Proximal.penalty", self.penalty)


Constraint = (
    LinearEquality
    | LinearEqualities
    | LinearInequalities
    | Box
    | NonNegative
    | Simplex
    | L2Ball
    | Projection
    | Proximal
)


def unit_normal(weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The constraint as :math:`\\langle n, p\\rangle = c` with :math:`\\lVert n\\rVert = 1`.

    Args:
        weight: ``[batch or 1, dim]``.
        total: ``[batch or 1, 1]``.

    Returns:
        n ``[batch or 1, dim]`` and c ``[batch or 1, 1]``.
    """
    # scaled first, since the squares of small or large weights would under- or overflow
    size = weight.detach().abs().amax(dim=1, keepdim=True)
    weight, total = weight / size, total / size
    length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight / length, total / length


def project(v: Tensor, normal: Tensor) -> Tensor:
    """``v`` (``[..., batch, dim]``) without its component along the unit vectors ``normal``."""
    return v - (v * normal).sum(dim=-1, keepdim=True) * normal


def onto_plane(z: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """The projection of ``z`` (``[batch, dim]``) onto the hyperplane :math:`\\langle n, z\\rangle = c`."""
    return z - ((z * normal).sum(dim=1, keepdim=True) - offset) * normal


def check_plane(weight: Tensor, total: Tensor) -> None:
    """Check a :class:`LinearEquality` in flat form, shaped as for :func:`unit_normal`.

    Raises:
        ValueError: the weight of a sample is zero, or a number is not finite.
    """
    if not (_readable(weight) and _readable(total)):
        return
    finite = torch.stack((torch.isfinite(weight).all(), torch.isfinite(total).all(), weight.any(dim=1).all()))
    weights, totals, nonzero = finite.tolist()
    if not (weights and totals):
        what = "total" if weights else "weight"
        raise ValueError(f"the constraint's {what} holds NaN or infinity: no state satisfies such a LinearEquality")
    if not nonzero:
        raise ValueError(
            "the constraint's weight is zero in every entry of a sample: such a LinearEquality does not constrain the "
            "state. Leave the constraint out, or correct the weight"
        )


def _check_callable(what: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{what} must be callable, not {type(function).__name__}")


def _check_sign(kind: str, name: str, value: Any) -> None:
    known = isinstance(value, (int, float)) or (isinstance(value, Tensor) and _readable(value))
    if known and not bool(torch.as_tensor(value >= 0).all()):
        raise ValueError(f"{kind}.{name} is {_shown(value)}, and must not be negative")


def _check_order(low: Any, high: Any) -> None:
    pair = (low, high)
    if not all(isinstance(bound, (int, float)) or (isinstance(bound, Tensor) and _readable(bound)) for bound in pair):
        return
    try:
        ordered = bool(torch.as_tensor(low <= high).all())
    except RuntimeError:  # shapes or devices that do not match are reported once the state is known
        return
    if not ordered:
        raise ValueError(f"Box.low is {_shown(low)} and Box.high is {_shown(high)}: low must not exceed high")


def _readable(t: Tensor) -> bool:
    """Return whether the numbers of ``t`` can be read: it is under no transform, and not on the meta device."""
    return not is_transformed(t) and t.device.type != "meta"


def _shown(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) and value.ndim else f"{float(value)}"
