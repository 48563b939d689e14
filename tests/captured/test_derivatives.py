"""Derivatives at solutions that compiled code has found: those of the eager loop's."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti
from torchimplicit.derivatives import Derivatives
from torchimplicit.errors import CaptureWarning

DIM = 4
pytestmark = pytest.mark.usefixtures("interpreted")


def problem(kind, w):
    if kind == "map":
        return ti.FixedPoint(lambda z, t: torch.tanh(z @ w.T + torch.sin(t)))
    return ti.Minimum(lambda z, t: torch.cosh(z @ w.T).sum(-1) + z.square().sum(-1) - (z * torch.sin(t)).sum(-1))


def solved(kind, compile):
    generator = torch.Generator().manual_seed(0)
    w = 0.7 * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    w, t = w.requires_grad_(), torch.randn(3, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    solver = ti.Anderson(rtol=1e-13) if kind == "map" else ti.LBFGS(rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        return w, t, ti.solve(problem(kind, w), torch.zeros_like(t), t, solver=solver, compile=compile)


def at(kind, compile):
    """First and second derivatives along directions, a Hessian of a loss, and what a physics loss gives the weights."""
    w, t, solution = solved(kind, compile)
    one, other = torch.ones_like(t), torch.cos(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape)
    at = Derivatives(solution)
    first, second = at.along((one,), order=2)
    loss = (second + at.value * first).square().sum()
    return [
        first,
        second,
        at.second((one,), (other,)),
        at.hessian(lambda z, t: z.square().sum(), 0),
        *torch.autograd.grad(loss, (w, t)),
    ]


def twice(kind, compile):
    """A gradient, and one of its own."""
    w, t, solution = solved(kind, compile)
    grads = torch.autograd.grad(solution.value.square().sum(), (w, t), create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (w, t))]


@pytest.mark.parametrize("kind", ["map", pytest.param("energy", marks=pytest.mark.long)])
@pytest.mark.parametrize("given", [at, twice])
def test_they_are_those_of_the_eager_loop(kind, given):
    for got, expected in zip(given(kind, True), given(kind, False), strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()
