"""Derivatives against the formulas of the implicit function theorem, with dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from maps import MAPS, assert_agree, data, fixed_point
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp


def at_solution(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """One sample's solution (``[dim]``), x (``[dim]``) and w, found by plain iteration."""
    x, w = data(batch=1)
    z = torch.zeros_like(x[0])
    for _ in range(100):
        z = MAPS[name](z, x[0], w)
    return z, x[0], w


def implicit(name: str):
    return lambda x, w: fixed_point(lambda z, x, w: MAPS[name](z, x, w), torch.zeros_like(x), x, w, batched=False)


@pytest.mark.parametrize("name", MAPS)
def test_gradient_and_tangent(name):
    z, x, w = at_solution(name)
    j, f_x, f_w = jacrev(MAPS[name], argnums=(0, 1, 2))(z, x, w)
    a = torch.eye(len(z), dtype=z.dtype) - j
    u, leaf = torch.cos(x), w.clone().requires_grad_()
    (got,) = torch.autograd.grad(implicit(name)(x, leaf), leaf, u)
    assert_agree(got, torch.einsum("i,ijk->jk", torch.linalg.solve(a.T, u), f_w))
    assert_agree(jacrev(implicit(name))(x, w), torch.linalg.solve(a, f_x))
    along = jvp(lambda x: implicit(name)(x, w), (x,), (u,))[1]
    assert_agree(along, torch.linalg.solve(a, f_x @ u))


def second(name: str, circulating: bool = False) -> Tensor:
    r""":math:`z_{tx}` for t the entry (0, 1) of w, by the closed form, ``[dim, dim]``."""
    z, x, w = at_solution(name)

    def f(z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        moved = w.clone()
        moved[0, 1] = 0
        return MAPS[name](z, x, moved + t * torch.outer(torch.eye(3)[0], torch.eye(3)[1]).to(w.dtype))

    t = w[0, 1].clone()
    f_z, f_t, f_x = jacrev(f, argnums=(0, 1, 2))(z, t, x)
    a = torch.eye(len(z), dtype=z.dtype) - f_z
    z_t, z_x = torch.linalg.solve(a, f_t), torch.linalg.solve(a, f_x)
    f_tz, _, f_tx = jacfwd(jacrev(f, argnums=1), argnums=(0, 1, 2))(z, t, x)
    f_zz, _, f_zx = jacfwd(jacrev(f, argnums=0), argnums=(0, 1, 2))(z, t, x)
    through_t = torch.einsum("ikj,k->ij", f_zx, z_t)
    if circulating:
        return torch.linalg.solve(a, f_tx - through_t)
    through_x = f_tz @ z_x + torch.einsum("ikl,k,lj->ij", f_zz, z_t, z_x)
    return torch.linalg.solve(a, f_tx + through_x + through_t)


def ours(name: str) -> Tensor:
    _, x, w = at_solution(name)
    return jacfwd(jacrev(implicit(name), argnums=1))(x, w)[:, 0, 1]


@pytest.mark.parametrize("name", MAPS)
def test_mixed_second_derivative(name):
    assert_agree(ours(name), second(name))


@pytest.mark.parametrize("name", MAPS)
def test_the_circulating_formula_is_wrong(name):
    """It drops the terms through z_x and has the sign of z_t flipped."""
    right, wrong = second(name), second(name, circulating=True)
    assert torch.linalg.vector_norm(wrong - right) > 0.1 * torch.linalg.vector_norm(right)


def test_attaching_at_a_detached_solution_is_wrong_at_second_order():
    """The usual hook trick: right gradients, and second derivatives without the terms through the solution."""
    z, x, w = at_solution("tanh")
    f = MAPS["tanh"]
    leaf = w.clone().requires_grad_()
    j = jacrev(f)(z, x, w)

    def hooked(w: Tensor) -> Tensor:
        value = f(z, x, w)
        value.register_hook(lambda u: torch.linalg.solve((torch.eye(len(z), dtype=z.dtype) - j).T, u))
        return value

    def derivatives(value: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(value.sin().sum(), leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]

    (first, wrong), (expected, right) = derivatives(hooked(leaf)), derivatives(implicit("tanh")(x, leaf))
    assert_agree(first, expected)
    assert torch.linalg.vector_norm(wrong - right) > 0.05 * torch.linalg.vector_norm(right)
