"""Smooth maps that mix the state with what it depends on, and what their derivatives are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing.gradient_suite import relative_error

BATCH, DIM = 2, 3
TIGHT = ti.Anderson(rtol=1e-14)
EXACT = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-15))


def tanh_map(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w.mT * (1 + 0.2 * torch.sin(x)) + 0.1 * z * x + x)


def sine_map(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return 0.4 * torch.sin(z @ w.mT + 0.4 * z * x) + x * torch.cos(0.2 * z * x)


def rational_map(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return (z @ w.mT + torch.sinh(0.5 * x)) / (1.5 + (z * x).square() + (x @ w).square())


MAPS = {"tanh": tanh_map, "sine": sine_map, "rational": rational_map}


def data(batch: int = BATCH, dim: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x ``[batch, dim]`` and w ``[dim, dim]``, for which the maps contract."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (batch, dim))
    return 0.7 * x, 0.4 * w / torch.linalg.matrix_norm(w, 2)


def fixed_point(f: Callable[..., Any], z0: Any, *args: Any, batched: bool = True, **options: Any) -> Any:
    """The value of the solution, to the last digit."""
    return ti.solve(
        ti.FixedPoint(f, batched=batched), z0, *args, **{"solver": TIGHT, "gradient": EXACT, **options}
    ).value


def unrolled(f: Callable[..., Any], z0: Any, *args: Any, steps: int = 60) -> Any:
    """The same by plain iteration, which autograd differentiates."""
    z = z0
    for _ in range(steps):
        z = f(z, *args)
    return z


def assert_agree(got: Sequence[Tensor] | Tensor, expected: Sequence[Tensor] | Tensor, bound: float = 1e-7) -> None:
    """Each tensor to a relative error of at most ``bound``."""
    if isinstance(got, Tensor):
        got, expected = [got], [expected]  # type: ignore[list-item]
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert float(torch.linalg.vector_norm(e)) > 0, "nothing to compare with"
        assert relative_error(g, e) <= bound
