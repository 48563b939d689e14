"""A map that is piecewise linear: second derivatives warn, however they are asked for, and first ones never do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

DIM = 4
WEIGHT = 0.2 * torch.ones(DIM, DIM)


def value(x: Tensor, weight: Tensor = WEIGHT, act: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    return ti.solve(ti.FixedPoint(lambda z, x: act(z @ weight + x)), torch.zeros_like(x), x).value


def loss(x: Tensor) -> Tensor:
    return value(x).square().sum()


def leaf() -> Tensor:
    return torch.linspace(-0.5, 1, 3 * DIM).reshape(3, DIM).requires_grad_()


def first_by_backward(x: Tensor) -> None:
    weight = WEIGHT.clone().requires_grad_()
    value(x, weight).square().sum().backward()


def first_by_create_graph(x: Tensor) -> None:
    torch.autograd.grad(loss(x), x, create_graph=True)


def second_by_double_backward(x: Tensor) -> None:
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    first.square().sum().backward()


def second_by_a_loss_on_a_tangent(x: Tensor) -> None:
    weight = WEIGHT.clone().requires_grad_()
    torch.func.jvp(lambda x: value(x, weight), (x,), (torch.ones_like(x),))[1].square().sum().backward()


def derivatives(x: Tensor, weight: Tensor) -> Tensor:
    problem = ti.FixedPoint(lambda z, x: torch.relu(z @ weight + x))
    at = ti.derivatives.Derivatives(ti.solve(problem, torch.zeros_like(x), x))
    return at.tangent((torch.ones_like(x),))


def second_by_direct_routines(x: Tensor) -> None:
    derivatives(x, WEIGHT.clone().requires_grad_()).square().sum().backward()


FIRST = {
    "backward": first_by_backward,
    "create_graph": first_by_create_graph,
    "func.grad": lambda x: torch.func.grad(loss)(x),
    "func.jacrev": lambda x: torch.func.jacrev(value)(x),
    "func.jacfwd": lambda x: torch.func.jacfwd(value)(x),
    "func.jvp": lambda x: torch.func.jvp(value, (x,), (x,)),
    "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(x.detach()),
    "direct": lambda x: derivatives(x, WEIGHT),
}
SECOND = {
    "double backward": second_by_double_backward,
    "a loss on a tangent": second_by_a_loss_on_a_tangent,
    "func.hessian": lambda x: torch.func.hessian(loss)(x),
    "jacrev of jacrev": lambda x: torch.func.jacrev(torch.func.jacrev(value))(x),
    "jvp of grad": lambda x: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
    "direct": second_by_direct_routines,
}


@pytest.mark.parametrize("name", FIRST)
def test_first_derivatives_do_not_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ti.SmoothnessWarning)
        FIRST[name](leaf())


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_warn_once(name):
    with pytest.warns(ti.SmoothnessWarning, match=r"uses relu, which is piecewise linear.*tanh") as caught:
        SECOND[name](leaf())
    (one,) = (one for one in caught if issubclass(one.category, ti.SmoothnessWarning))
    assert one.filename == __file__  # the user's line, behind PyTorch's and the library's own


def test_second_derivatives_of_a_smooth_map_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ti.SmoothnessWarning)
        torch.func.hessian(lambda x: value(x, act=torch.tanh).square().sum())(leaf())
