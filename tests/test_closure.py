"""Captured tensors become arguments, whatever the function does with them; where that fails, it is said."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import torchimplicit as ti
from torchimplicit.closure import Closure, check_graph

BATCH, DIM = 2, 2
CELL = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
Solve = Callable[..., Tensor]


def implicit(f: Any, *args: Any, problem: Any = ti.FixedPoint, **options: Any) -> Tensor:
    z0 = torch.zeros(BATCH, DIM, dtype=torch.float64)
    gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-15))
    given = {"solver": ti.Anderson(rtol=1e-14), "gradient": gradient, **options}
    return ti.solve(problem(f), z0, *args, **given).value


def unrolled(f: Any, *args: Any, steps: int | None = None) -> Tensor:
    z = torch.zeros(BATCH, DIM, dtype=torch.float64)
    for _ in range(50 if steps is None else steps):
        z = f(z, *args)
    return z


def tensors() -> tuple[Tensor, Tensor]:
    """x ``[batch, dim]`` and w ``[dim, dim]``."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, DIM, dtype=torch.float64, generator=generator) for n in (BATCH, DIM))
    return 0.5 * x, 0.3 * w / torch.linalg.matrix_norm(w, 2)


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, w: Tensor) -> Tensor:
        return z @ w.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, w = ctx.saved_tensors
        return g @ w, g.mT @ z

    @staticmethod
    def jvp(ctx: Any, dz: Tensor, dw: Tensor) -> Tensor:
        z, w = ctx.saved_tensors
        return dz @ w.mT + z @ dw.mT


# -- odd functions -----------------------------------------------------------------------------------------------------


def base(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w.mT * (1 + 0.3 * x) + 0.1 * z * x + x)


def passed_and_captured(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z, v: base(z, x, w) + 0.1 * torch.sin(z @ v), w)


def passed_twice(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z, v, u: base(z, x, v) + 0.1 * torch.sin(z @ u), w, w)


def inner_vmap(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z: vmap(lambda z, x: base(z, x, w))(z, x))


def inner_vmap_over_a_captured_tensor(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z: base(z, x, vmap(lambda row: 0.3 * torch.tanh(row), in_dims=1)(w)))


def inner_grad(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z: torch.tanh(grad(lambda z: 0.1 * ((z @ w).sin() * x).sum())(z) + x))


def inner_vjp(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z: 0.3 * torch.func.vjp(lambda z: base(z, x, w), z)[1](torch.cos(z))[0] + x)


def views(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    row, turned, first = w[0], x.T, w.diagonal()
    return solve(lambda z: torch.tanh(z @ w[:, :].T + turned.T + 0.1 * z * row + first))


def dependent(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    v = nn.functional.softplus(w)
    return solve(lambda z: 0.2 * torch.tanh(z @ v.T * w[0] + x @ w))


def written_in_place(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    def f(z: Tensor) -> Tensor:
        y = z @ w.T
        y += x
        out = torch.zeros_like(y) + y
        out[:, 0] = y[:, 0] * w[0, 0]
        return out.mul_(0.5).add_(0.1 * torch.sin(z * x))

    return solve(f)


def attributes(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    class Cell:
        def __call__(self, z: Tensor) -> Tensor:
            return base(z, self.x, self.weights["w"])

    cell = Cell()
    cell.x, cell.weights = x, {"w": w}
    return solve(cell)


def functional(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z: torch.tanh(functional_call(CELL, {"weight": w}, (z,)) * (1 + x) + x))


def functional_with_arguments(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z, p: torch.tanh(functional_call(CELL, p, (z,)) * (1 + x) + x), {"weight": w})


def containers(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    def f(z: Tensor, index: Tensor, none: None, scale: float, tree: dict[str, Any]) -> Tensor:
        return base(z, x[:, index], w[index]) * scale + 0.1 * tree["a"][1] + 0 * len(tree["b"])

    return solve(f, torch.tensor([1, 0]), None, 0.9, {"a": [None, x], "b": "text"})


def keywords_and_lists(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(
        lambda z: (
            0.5 * torch.tanh(torch.cat([z @ w.T, x], 1)[:, :DIM] + 0.5 * torch.stack([x, z * x]).sum(0))
            + 0.1 * torch.addmm(input=x, mat1=z, mat2=w)
            + 0.1 * torch.einsum("bi,oi->bo", z, w)
        )
    )


def complex_numbers(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    c = torch.complex(w, 0.3 * w.T)
    return solve(lambda z, c: torch.tanh((z.to(c.dtype) @ c).real * x + ((z * x).to(c.dtype) @ c.conj()).imag + x), c)


def captured_complex_numbers(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    c = torch.complex(w, 0.3 * w.T)
    return solve(lambda z: torch.tanh((z.to(c.dtype) @ c).real * x + ((z * x).to(c.dtype) @ c.conj()).imag + x))


def custom_function_of_arguments(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    return solve(lambda z, x, w: torch.tanh(Product.apply(z, w) * (1 + 0.3 * x) + x), x, w)


def nested(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    def f(z: Tensor) -> Tensor:
        inner = solve(lambda y: 0.5 * torch.tanh(y @ w.T + 0.5 * z * x))
        return 0.5 * torch.tanh(inner * z + x @ w)

    return solve(f)


def nested_with_inner_captures_only(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    def f(z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(solve(lambda y: 0.5 * torch.tanh(y @ w.T + 0.5 * z * x + x))) + 0.3

    return solve(f)


def nested_with_arguments(solve: Solve, x: Tensor, w: Tensor) -> Tensor:
    def f(z: Tensor, w: Tensor) -> Tensor:
        inner = solve(lambda y, z, w: 0.5 * torch.tanh(y @ w.T + 0.5 * z * x), z, w)
        return 0.5 * torch.tanh(inner * z + x @ w)

    return solve(f, w)


ODD = [
    passed_and_captured,
    passed_twice,
    inner_vmap,
    inner_vmap_over_a_captured_tensor,
    inner_grad,
    inner_vjp,
    views,
    dependent,
    written_in_place,
    attributes,
    functional,
    functional_with_arguments,
    containers,
    keywords_and_lists,
    complex_numbers,
    captured_complex_numbers,
    custom_function_of_arguments,
]
NESTED = [nested, nested_with_inner_captures_only, nested_with_arguments]


def reverse(value: Callable[[Tensor, Tensor], Tensor], leaf: bool) -> list[Tensor]:
    """First and second derivatives by plain autograd; the function sees leaves, or tensors computed from them."""
    x, w = (t.requires_grad_() for t in tensors())
    seen = (x, w) if leaf else (x * 1.0, w * 1.0)
    first = torch.autograd.grad(value(*seen).sin().sum(), (x, w), create_graph=True)
    return [g.detach() for g in (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w)))]


def transformed(value: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    x, w = tensors()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return value(x, w).sin().sum()

    return [
        grad(loss, 1)(x, w),
        jvp(value, (x, w), (x.cos(), w.cos()))[1],
        vmap(grad(loss), (None, 1))(x, torch.stack((w, w.T), 1)),
        hessian(loss, 1)(x, w),
    ]


def agree(got: list[Tensor], expected: list[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", [*ODD, *NESTED], ids=lambda case: case.__name__)
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_reverse_mode(case, leaf):
    agree(*(reverse(lambda x, w: case(solve, x, w), leaf) for solve in (implicit, unrolled)))  # noqa: B023


@pytest.mark.parametrize("case", ODD, ids=lambda case: case.__name__)
def test_transforms(case):
    agree(*(transformed(lambda x, w: case(solve, x, w)) for solve in (implicit, unrolled)))  # noqa: B023


@pytest.mark.parametrize("case", NESTED, ids=lambda case: case.__name__)
def test_transforms_of_nested_solves(case):
    x, w = tensors()

    def compute(solve):
        def loss(w):
            return case(solve, x, w).sin().sum()

        return [grad(loss)(w), vmap(loss)(torch.stack((w, w.T)))]

    agree(compute(implicit), compute(unrolled))


def test_forward_mode_of_captured_tensors_without_grad_mode():
    """The solver's steps must not be what is differentiated: grad mode is off, forward mode is not."""
    x, w = tensors()

    def tangent(solve: Solve) -> Tensor:
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(w, w.cos())
            return forward_ad.unpack_dual(solve(lambda z: base(z, x, dual))).tangent

    agree([tangent(implicit)], [tangent(unrolled)])


# -- what cannot be right must be said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_custom_function_that_captures(create_graph):
    """A captured tensor that the recording does not see is not lost: there is an error."""
    x, w = tensors()
    theta = w.clone().requires_grad_()
    captured = theta * 1.0
    value = implicit(lambda z: torch.tanh(Product.apply(z, captured) * (1 + 0.3 * x) + x))
    with pytest.raises(RuntimeError, match="captured tensor"):
        torch.autograd.grad(value.sin().sum(), theta, create_graph=create_graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scripted_module(wrapped):
    """Its parameters are known, though no mode sees them being used."""
    x, _ = tensors()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM, dtype=x.dtype)
            nn.init.orthogonal_(self.linear.weight, 0.3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    cell = torch.jit.script(Cell())
    inputs = (x.requires_grad_(), *cell.parameters())
    value = implicit((lambda z, x: cell(z, x)) if wrapped else cell, x)
    agree(*(list(torch.autograd.grad(v.sin().sum(), inputs)) for v in (value, unrolled(cell, x))))
    with torch.no_grad():
        torch.testing.assert_close(implicit(cell, x), value.detach())


def test_a_tensor_that_is_first_used_in_another_evaluation():
    x, w = (t.requires_grad_() for t in tensors())

    def f(z: Tensor) -> Tensor:
        shift = torch.tanh(z @ w) if bool((z != 0).any()) else torch.zeros_like(z)
        return 0.3 * torch.tanh(z + x) + 0.1 * shift

    value = implicit(f)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="captured tensor"):
            torch.autograd.grad(value.sum(), x, create_graph=create_graph, retain_graph=True)


def test_an_inner_gradient_in_a_captured_tensor():
    x, w = tensors()
    w = w.requires_grad_()
    with pytest.raises(RuntimeError, match="pass that tensor to solve as an argument"):
        implicit(lambda z: 0.3 * torch.tanh(z @ grad(lambda w: w.pow(3).sum())(w) + x))
    value = implicit(lambda z, w: 0.3 * torch.tanh(z @ grad(lambda w: w.pow(3).sum())(w) + x), w)
    (got,) = torch.autograd.grad(value.sum(), w)
    (expected,) = torch.autograd.grad(unrolled(lambda z: 0.3 * torch.tanh(z @ (3 * w.square()) + x)).sum(), w)
    agree([got], [expected])


def test_a_function_that_changes_its_state_in_place():
    x, _ = tensors()
    with pytest.raises(RuntimeError, match="changed its state in place"):
        implicit(lambda z, x: z.mul_(0.5).add_(x), x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed its state in place"):
        implicit(lambda z, x: z.mul_(0.5).add_(x), x)


def test_a_parameter_changed_between_forward_and_backward():
    x, w = (t.requires_grad_() for t in tensors())
    value = implicit(lambda z: base(z, x, w))
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# -- grad mode and flags -----------------------------------------------------------------------------------------------


def test_parts_without_grad_mode_carry_no_gradient():
    x, w = (t.requires_grad_() for t in tensors())

    def f(z: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 0.5 + 0.1 * w.square().sum()
        return scale * base(z, x, w.detach())

    value = implicit(f)
    got = torch.autograd.grad(value.sum(), (x, w), allow_unused=True)
    expected = torch.autograd.grad(unrolled(f).sum(), (x, w), allow_unused=True)
    agree([got[0]], [expected[0]])
    assert expected[1] is None
    assert got[1] is None or got[1].eq(0).all()


def test_a_frozen_parameter_gets_no_gradient():
    x, w = tensors()
    w = nn.Parameter(w, requires_grad=False)
    x = x.requires_grad_()
    implicit(lambda z: base(z, x, w)).sum().backward()
    assert w.grad is None
    w.requires_grad_(True)
    implicit(lambda z: base(z, x, w)).sum().backward()
    assert w.grad is not None


def test_buffers_are_read_and_may_be_updated():
    x, w = tensors()
    cell = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM, affine=False)).double()
    with torch.no_grad():
        cell[0].weight.copy_(w)
    value = implicit(lambda z: 0.2 * torch.tanh(cell(z + x)) + 0.5 * z * x)
    got = torch.autograd.grad(value.sin().sum(), cell[0].weight)[0]
    expected = torch.autograd.grad(
        unrolled(lambda z: 0.2 * torch.tanh(cell(z + x)) + 0.5 * z * x).sin().sum(), cell[0].weight
    )[0]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_a_solution_found_without_grad_mode_is_a_constant():
    x, w = (t.requires_grad_() for t in tensors())
    with torch.no_grad():
        value = implicit(lambda z: base(z, x, w))
    assert not value.requires_grad
    (got,) = torch.autograd.grad((value * x).sum(), x)
    torch.testing.assert_close(got, value)
    with torch.inference_mode():
        assert not implicit(lambda z: base(z, x, w)).requires_grad


# -- the class ---------------------------------------------------------------------------------------------------------


def test_what_is_recorded():
    x, w = tensors()
    leaf = w.clone().requires_grad_()
    computed = leaf * 2
    constant = torch.ones(DIM, dtype=w.dtype)
    closure, value = Closure(
        lambda z, y: z @ leaf + z @ computed + y * constant, (x,), extra=0
    ).record(torch.ones_like(x))  # fmt: skip
    assert [id(t) for t in closure.captured] == [id(leaf), id(computed)]
    assert not value.requires_grad
    z = torch.ones_like(x)
    torch.testing.assert_close(value, (z @ leaf + z @ computed + x).detach())
    torch.testing.assert_close(closure(z, x, w, w), z @ w + z @ w + x)
    torch.testing.assert_close(closure(z, 2 * x, leaf, computed), z @ leaf + z @ computed + 2 * x)


def test_check_graph_stops_at_what_is_known():
    leaf = torch.ones(2, requires_grad=True)
    computed = leaf * 2
    check_graph(computed * 3, (computed,))
    check_graph(computed * 3, (leaf,))
    with pytest.raises(RuntimeError, match="shape \\(2,\\)"):
        check_graph(computed * 3 + leaf, (computed,))


def test_what_a_call_makes_is_not_held_until_it_ends():
    frozen = torch.ones(DIM, DIM, dtype=torch.float64)
    alive = []

    def f(z, x):
        made = [weakref.ref(t) for t in (z @ frozen, (z @ frozen).requires_grad_(), x @ frozen)]
        alive.append([ref() is not None for ref in made])
        inner = (z.detach() @ frozen).requires_grad_()  # made here, and no captured tensor
        return torch.autograd.grad(inner.square().sum(), inner)[0] + x

    x, _ = tensors()
    closure, _ = Closure(f, (x,), extra=0).record(torch.ones_like(x))
    assert not closure.captured
    assert alive == [[False] * 3]


def test_a_graph_from_before_the_call_keeps_its_ends():
    """The pullback of torch.func.vjp: with tensors of the solve in the places of its ends it gave zeros."""
    at, matrix = torch.randn(2, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    _, pull = torch.func.vjp(lambda y: torch.tanh(y @ matrix), at)
    slope = 1 - torch.tanh(at @ matrix) ** 2
    b = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for product in (lambda v: pull(v)[0], lambda v: (slope * v) @ matrix.T):
        linear = ti.linear_solve(lambda y, product=product: product(y @ matrix) + 20 * y, b)
        fixed = ti.solve(ti.FixedPoint(lambda z, b, product=product: 0.1 * torch.tanh(product(z)) + b), at, b)
        (first,) = torch.autograd.grad((linear.value * fixed.value).sum(), b, create_graph=True)
        results.append((linear.value, fixed.value, first, torch.autograd.grad(first.square().sum(), b)[0]))
    torch.testing.assert_close(*results)


def test_such_a_graph_that_leads_to_a_parameter_is_refused():
    at, weight = torch.randn(2, 6), torch.randn(6, 6, requires_grad=True)
    _, pull = torch.func.vjp(lambda y: torch.tanh(y @ weight), at)
    with pytest.raises(RuntimeError, match=r"pullback of torch\.func\.vjp"):
        ti.solve(ti.FixedPoint(lambda z: 0.1 * torch.tanh(pull(z)[0])), at)
