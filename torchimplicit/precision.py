"""Floating-point precision: default tolerances, half precision, extreme magnitudes, and autocast."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method")


@functools.cache
def default_rtol(dtype: torch.dtype) -> float:
    """The relative tolerance for ``rtol=None``: :math:`\\epsilon^{2/3}`, which leaves a margin above rounding."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for inner products and recurrences: at least float32, since half precision is too coarse for them."""
    return torch.promote_types(dtype, torch.float32)


def widened(v: Tensor) -> Tensor:
    """``v`` in its :func:`working_dtype`; ``v`` itself where it is in that already."""
    return v.float() if v.dtype in (torch.bfloat16, torch.float16) else v


class UnitRows(NamedTuple):
    """Vectors scaled to about unit size, so that their squares neither underflow nor overflow.

    Attributes:
        unit: ``[..., dim]``, each vector times a power of two; zero in place of a vector that is not finite.
        factor: ``[..., 1]``, those powers.
        finite: bool ``[..., 1]``, whether the vector is finite.
    """

    unit: Tensor
    factor: Tensor
    finite: Tensor

    @classmethod
    def of(cls, v: Tensor) -> UnitRows:
        """Scale the vectors ``v`` (``[..., dim]``). Powers of two round nothing."""
        if not v.shape[-1]:
            return cls(v, v.new_ones(*v.shape[:-1], 1), v.new_ones(*v.shape[:-1], 1, dtype=torch.bool))
        peak = torch.linalg.vector_norm(v.detach(), torch.inf, dim=-1, keepdim=True)
        finite = peak < torch.inf  # false for NaN
        _, exponent = torch.frexp(peak)  # 0 for 0, and for what is not finite
        limit = -math.frexp(torch.finfo(v.dtype).tiny)[1]
        factor = torch.ldexp(torch.ones_like(peak), -exponent.clamp(-limit, limit))
        return cls((v * factor).masked_fill_(~finite, 0), factor, finite)

    @classmethod
    def as_they_are(cls, v: Tensor) -> UnitRows:
        """The vectors without scaling, for products that may mix them; zero in place of one that is not finite."""
        finite = v.detach().isfinite().all(dim=-1, keepdim=True)
        return cls(torch.where(finite, v, 0), torch.ones_like(v[..., :1]), finite)

    def restored(self, y: Tensor) -> Tensor:
        """Undo the scaling for a result ``y`` (``[..., n]``) that is linear in the vectors; NaN where these were not
        finite."""
        return torch.where(self.finite, y / self.factor, torch.nan)


def safe_norm(v: Tensor) -> Tensor:
    """The norms of vectors ``[..., dim]`` whose squares may underflow or overflow."""
    whole = UnitRows.of(v)
    return whole.restored(torch.linalg.vector_norm(whole.unit, dim=-1, keepdim=True)).squeeze(-1)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context with autocast off: only the user's function runs under it, not the algebra of the solvers."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


TORCH_RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
"""The release of PyTorch, as ``(2, 13)``."""

CASTS_OUTLIVE_NO_GRAD = TORCH_RELEASE < (2, 11)
"""True if autocast's cache reuses a weight that was cast under ``no_grad`` in recorded evaluations, where the weight
then silently gets no gradient, as in PyTorch up to 2.10. The cache is off then."""


class AutocastState:
    """The current autocast state of a device type, to be entered again later (in a backward pass).

    Attributes:
        kind: the device type.
        dtype: the lower precision; ``None`` where autocast is off.
    """

    def __init__(self, device: torch.device):
        self.kind = device.type
        self.dtype = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """A context with that state."""
        now = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None
        if now == self.dtype and (now is None or not CASTS_OUTLIVE_NO_GRAD):
            return contextlib.nullcontext()
        if self.dtype is None:
            return torch.autocast(self.kind, enabled=False)
        kept = torch.is_autocast_cache_enabled() and not CASTS_OUTLIVE_NO_GRAD
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=kept)


def at_precision(method: Method, dtype: torch.dtype | None) -> Method:
    """``method``, a solver or linear solver, with the default tolerance of ``dtype`` if it has none of its own.

    Under autocast the map is evaluated in a lower precision than that of the state, so the default tolerance of the
    state's dtype would be out of reach.
    """
    if dtype is None or getattr(method, "rtol", 0.0) is not None or getattr(method, "steps", None) is not None:
        return method
    return replace(method, rtol=default_rtol(dtype))  # type: ignore[type-var]
