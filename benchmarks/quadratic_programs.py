"""Quadratic programs as layers, beside qpth's (``pip install qpth``)."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti

SHAPES = ((1, 5, 5, 2), (16, 5, 3, 1), (16, 20, 20, 5), (64, 10, 12, 3), (64, 50, 30, 10), (16, 100, 100, 20))
"""Batch, unknowns, inequalities, equalities."""


def program(batch: int, dim: int, less: int, equal: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root, inside = normal(dim, dim), normal(batch, dim)
    matrix = root.T @ root / dim + 0.1 * torch.eye(dim, dtype=torch.float64)
    g, a = normal(batch, less, dim), normal(batch, equal, dim)
    room = 0.3 * torch.rand(batch, less, generator=generator, dtype=torch.float64)
    h, b = (g @ inside[:, :, None])[:, :, 0] + room, (a @ inside[:, :, None])[:, :, 0]
    return [t.requires_grad_() for t in (matrix, 3 * normal(batch, dim), g, h, a, b)]


def ours(matrix: Tensor, price: Tensor, g: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def energy(z: Tensor, price: Tensor, matrix: Tensor) -> Tensor:
        return 0.5 * ((z @ matrix) * z).sum(1) + (price * z).sum(1)

    problem = ti.Minimum(energy, (ti.LinearInequalities(g, h), ti.LinearEqualities(a, b)))
    value: Tensor = ti.solve(problem, torch.zeros_like(price), price, matrix).value
    return value


def theirs(matrix: Tensor, price: Tensor, g: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    from qpth.qp import QPFunction

    value: Tensor = QPFunction(verbose=-1, eps=1e-12, maxIter=30)(matrix.expand(len(price), -1, -1), price, g, h, a, b)
    return value


def timed(layer: Callable[..., Tensor], given: list[Tensor], repeats: int) -> tuple[float, float, Tensor, Any]:
    """Seconds of the processor for the forward pass and for both, the least of several; the solution; gradients."""
    first = both = float("inf")
    for _ in range(repeats):
        begun = time.process_time()
        value = layer(*given)
        done = time.process_time()
        slopes = torch.autograd.grad(value.sin().sum(), given)
        first, both = min(first, done - begun), min(both, time.process_time() - begun)
    return first, both, value.detach(), slopes


def against_qpth(repeats: int) -> None:
    print(
        "| batch, unknowns, inequalities, equalities | ours | qpth | ours, both | qpth, both | solutions | gradients |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        given = program(*shape)
        one, other = timed(ours, given, repeats), timed(theirs, given, repeats)
        gap = max(float((a - b).norm() / (1 + b.norm())) for a, b in zip(one[3], other[3], strict=True))
        times = " | ".join(f"{1000 * t:.1f} ms" for t in (one[0], other[0], one[1], other[1]))
        print(f"| {shape} | {times} | {float((one[2] - other[2]).abs().max()):.0e} | {gap:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=4)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    against_qpth(repeats)


if __name__ == "__main__":
    main()
