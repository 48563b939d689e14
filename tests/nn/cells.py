"""Small cells that contract, and what their equilibria and derivatives must be."""

import torch
from torch import Tensor, nn


class TanhCell(nn.Module):
    """``z = tanh(W z + U x + b)`` with a contraction ``W``."""

    def __init__(self, dim: int = 5, gain: float = 0.5):
        super().__init__()
        self.recurrent = nn.Linear(dim, dim)
        self.input = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.recurrent.weight.mul_(gain / torch.linalg.matrix_norm(self.recurrent.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.input(x))


def unrolled(cell, x, z0=None, steps: int = 200):
    """The plain iteration, with its tape: the reference for values and derivatives of every order."""
    z = torch.zeros_like(x) if z0 is None else z0
    for _ in range(steps):
        z = cell(z, x)
    return z


def loss_of(z: Tensor) -> Tensor:
    return (z**3).sum() + z.sin().sum()


def gradients(z: Tensor, inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(z), tuple(inputs))


def second_derivatives(z: Tensor, x: Tensor, inputs) -> tuple[Tensor, ...]:
    """The gradient of the squared norm of the gradient in ``x``."""
    (first,) = torch.autograd.grad(loss_of(z), x, create_graph=True)
    return torch.autograd.grad((first**2).sum(), tuple(inputs))


def assert_all_close(got, expected, rtol: float = 1e-7, atol: float = 1e-9):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
