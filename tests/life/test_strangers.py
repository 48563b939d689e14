"""Uses that nobody had in mind: each gives the gradient of the unrolled iteration in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import torchimplicit as ti

F64 = torch.float64


def data():
    generator = torch.Generator().manual_seed(1)
    w = 0.4 * torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=F64)).Q
    x, c = torch.randn(2, 5, 4, generator=generator, dtype=F64)
    return w.requires_grad_(), x.requires_grad_(), c


def unrolled(f):
    z = torch.zeros(5, 4, dtype=F64)
    for _ in range(300):
        z = f(z)
    return z


def agree(value, expected, c, tensors):
    for got, right in zip(
        torch.autograd.grad((value * c).sum(), tensors), torch.autograd.grad((expected * c).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-9)


COUPLED = {  # samples that see each other
    "distances": lambda z: 0.2 * torch.softmax(-torch.cdist(z, z), dim=1) @ z,
    "sorted": lambda z: 0.3 * z.sort(dim=0).values,
    "normalized": lambda z: 0.3 * functional.normalize(z + 1, dim=0),
    "cumulative": lambda z: 0.04 * z.cumsum(dim=0),
    "largest": lambda z: -0.3 * z.amax(dim=0, keepdim=True),
    "singular values": lambda z: 0.1 * torch.linalg.svdvals(z + torch.eye(5, 4, dtype=z.dtype)),
    "fourier": lambda z: 0.1 * torch.fft.fft(z, dim=0).real,
}
LINEAR = [None, ti.GMRES(), ti.BiCGStab(), ti.LSMR(), ti.Neumann(max_steps=500), ti.Dense()]


@pytest.mark.parametrize("which", COUPLED)
def test_coupled_samples_by_each_linear_solver(which):
    w, x, c = data()

    def f(z, x, w):
        return torch.tanh(0.3 * z @ w + COUPLED[which](z) + x)

    expected = unrolled(lambda z: f(z, x, w))
    for linear in LINEAR:
        if which == "distances" and isinstance(linear, ti.LSMR):
            continue  # cdist has no second derivative, and torch says so
        solution = ti.solve(
            ti.FixedPoint(f), torch.zeros(5, 4, dtype=F64), x, w, gradient=ti.Implicit(linear_solver=linear)
        )
        (gradients, right) = (
            torch.autograd.grad((v * c).sum(), (x, w), retain_graph=True) for v in (solution.value, expected)
        )
        torch.testing.assert_close(gradients, right, rtol=1e-7, atol=1e-9)


class Remembering(nn.Module):
    """Computes its weight once, at its first call."""

    def __init__(self, w):
        super().__init__()
        self.w, self.known = nn.Parameter(w.detach().clone()), None

    def forward(self, z, x):
        if self.known is None:
            self.known = self.w / (1 + 0.01 * self.w.norm())
        return torch.tanh(z @ self.known + x)


@pytest.mark.parametrize("how", ["module", "function", "root", "given steps"])
def test_a_weight_that_is_computed_once(how):
    w, x, c = data()
    cell, again = Remembering(w), Remembering(w)
    start = torch.zeros(5, 4, dtype=F64)
    value = {
        "module": lambda: ti.nn.Equilibrium(cell)(x),
        "function": lambda: ti.solve(ti.FixedPoint(lambda z: cell(z, x)), start).value,
        "root": lambda: ti.solve(ti.Root(lambda z: z - cell(z, x)), start).value,
        "given steps": lambda: (
            ti.solve(ti.FixedPoint(lambda z: cell(z, x)), start, solver=ti.FixedPointIteration(steps=200)).value
        ),
    }[how]()
    (got,) = torch.autograd.grad((value * c).sum(), cell.w)
    (right,) = torch.autograd.grad((unrolled(lambda z: again(z, x)) * c).sum(), again.w)
    torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_cached_parametrizations(kind):
    _, x, c = data()
    torch.manual_seed(0)
    cell = kind(nn.Linear(4, 4, dtype=F64)).eval()
    with parametrize.cached():
        value = ti.solve(ti.FixedPoint(lambda z: 0.6 * torch.tanh(cell(z) + x)), torch.zeros(5, 4, dtype=F64)).value
    agree(value, unrolled(lambda z: 0.6 * torch.tanh(cell(z) + x)), c, list(cell.parameters()))


def test_saved_on_the_cpu_and_one_buffer_for_every_value():
    w, x, c = data()
    buffer = torch.zeros(5, 4, dtype=F64)

    def f(z, x, w):
        if torch.is_grad_enabled():
            return torch.tanh(z @ w + x)
        return torch.tanh(z @ w + x, out=buffer)

    with save_on_cpu():
        value = ti.solve(ti.FixedPoint(f), torch.zeros(5, 4, dtype=F64), x, w).value
    agree(value, unrolled(lambda z: torch.tanh(z @ w + x)), c, (x, w))


def test_plain_iteration_refuses_one_buffer_for_every_value():
    w, x, _ = data()
    buffer = torch.zeros(5, 4, dtype=F64)

    def f(z, x, w):
        return torch.tanh(z @ w + x) if torch.is_grad_enabled() else torch.tanh(z @ w + x, out=buffer)

    with pytest.raises(RuntimeError, match="changed its state in place"):
        ti.solve(ti.FixedPoint(f), torch.zeros(5, 4, dtype=F64), x, w, solver=ti.FixedPointIteration())
