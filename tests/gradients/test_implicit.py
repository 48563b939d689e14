"""Derivatives of every order and mode, against unrolling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from maps import BATCH, DIM, EXACT, MAPS, TIGHT, assert_agree, data, fixed_point, sine_map, tanh_map, unrolled
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torchimplicit as ti
from torchimplicit.testing import GradientSuite

Solve = Callable[..., Any]


class TestImplicit(GradientSuite):
    def make(self) -> ti.Implicit:
        return EXACT


def both(compute: Callable[[Solve], Any], bound: float = 1e-7) -> None:
    """``compute`` gives the same with the implicit solution and with the unrolled one."""
    assert_agree(compute(fixed_point), compute(unrolled), bound)


# How the tensors come into the function: each takes the way to solve, a map, and its tensors.
WAYS = {
    "arguments": lambda solve, f, z0, x, w: solve(f, z0, x, w),
    "captured": lambda solve, f, z0, x, w: solve(lambda z: f(z, x, w), z0),
    "computed": lambda solve, f, z0, x, w: _computed(solve, f, z0, x, w),
    "mixed": lambda solve, f, z0, x, w: solve(lambda z, x: f(z, x, w), z0, x),
    "dependent": lambda solve, f, z0, x, w: _dependent(solve, f, z0, x, w),
    "both": lambda solve, f, z0, x, w: solve(lambda z, v: f(z, x, v) + 0.1 * torch.sin(z @ w), z0, w),
    "twice": lambda solve, f, z0, x, w: solve(lambda z, v, u: f(z, x, v) + 0.1 * torch.sin(z @ u), z0, w, w),
}


def _computed(solve: Solve, f: Any, z0: Tensor, x: Tensor, w: Tensor) -> Tensor:
    y, v = torch.sin(x), w * (1 + w)
    return solve(lambda z: f(z, y, v), z0)


def _dependent(solve: Solve, f: Any, z0: Tensor, x: Tensor, w: Tensor) -> Tensor:
    v = torch.nn.functional.softplus(w)
    return solve(lambda z: f(z, x, w) + 0.1 * torch.tanh(z @ v), z0)


# -- reverse mode ------------------------------------------------------------------------------------------------------


def three_orders(solve: Solve, f: Any, way: str) -> list[Tensor]:
    """First, second and third derivatives in x and w, contracted by nonlinear functions of themselves."""
    x, w = (t.requires_grad_() for t in data())
    loss = WAYS[way](solve, f, torch.zeros(BATCH, DIM, dtype=x.dtype), x, w).sin().sum()
    found: list[Tensor] = []
    for _ in range(3):
        found += torch.autograd.grad(loss, (x, w), create_graph=True)
        loss = found[-1].square().sum() + found[-2].pow(3).sum()
    return [t.detach() for t in found]


@pytest.mark.parametrize("way", WAYS)
def test_reverse_mode_to_third_order(way):
    both(lambda solve: three_orders(solve, tanh_map, way))


@pytest.mark.parametrize("name", [name for name in MAPS if name != "tanh"])
def test_reverse_mode_to_third_order_of_other_maps(name):
    both(lambda solve: three_orders(solve, MAPS[name], "arguments"))


def test_module_parameters():
    cell = nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, DIM), nn.Tanh()).double()
    x, _ = data()

    def compute(solve):
        z = solve(lambda z: 0.5 * cell(z * (1 + x)), torch.zeros_like(x))
        first = torch.autograd.grad(z.sin().sum(), tuple(cell.parameters()), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tuple(cell.parameters()))]

    both(compute)


def test_only_the_asked_inputs():
    x, w = (t.requires_grad_() for t in data())
    for inputs in ((x,), (w,)):
        both(lambda solve: torch.autograd.grad(solve(tanh_map, torch.zeros_like(x), x, w).sin().sum(), inputs))  # noqa: B023


def test_backward_accumulates_and_can_be_repeated():
    x, w = (t.requires_grad_() for t in data())
    value = fixed_point(tanh_map, torch.zeros_like(x), x, w)
    value.sum().backward(retain_graph=True)
    once = x.grad.clone()
    value.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)


# -- forward mode and torch.func ---------------------------------------------------------------------------------------


def solver_of(way: str, f: Any = sine_map) -> Callable[[Solve], Callable[[Tensor, Tensor], Tensor]]:
    def made(solve: Solve) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: WAYS[way](solve, f, torch.zeros(BATCH, DIM, dtype=x.dtype), x, w)

    return made


def scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: fn(*args).sin().sum()


TRANSFORMS = {
    "grad": lambda s, x, w: grad(scalar(s), argnums=(0, 1))(x, w),
    "jvp": lambda s, x, w: jvp(s, (x, w), (torch.cos(x), torch.sin(w)))[1],
    "jacrev": lambda s, x, w: jacrev(s, argnums=(0, 1))(x, w),
    "jacfwd": lambda s, x, w: jacfwd(s, argnums=(0, 1))(x, w),
    "hessian": lambda s, x, w: hessian(scalar(s))(x, w),
    "hessian, mixed": lambda s, x, w: jacfwd(jacrev(scalar(s), argnums=1), argnums=0)(x, w),
    "reverse over reverse": lambda s, x, w: jacrev(jacrev(scalar(s), argnums=0), argnums=1)(x, w),
    "reverse over forward": lambda s, x, w: jacrev(lambda x: jvp(lambda w: s(x, w), (w,), (w,))[1])(x),
    "forward over forward": lambda s, x, w: jacfwd(lambda x: jvp(lambda w: s(x, w), (w,), (w,))[1])(x),
    "forward over reverse": lambda s, x, w: jvp(grad(scalar(s)), (x, w), (w[:BATCH], w))[1],
    "vmap": lambda s, x, w: vmap(s, in_dims=(None, 2))(x, torch.stack((w, w.mT), 2)),
    "vmap over both": lambda s, x, w: vmap(s, in_dims=(1, 0))(torch.stack((x, 0.5 * x), 1), torch.stack((w, w.mT))),
    "vmap, out_dims": lambda s, x, w: vmap(s, in_dims=(0, None), out_dims=1)(torch.stack((x, 0.5 * x)), w),
    "vmap of grad": lambda s, x, w: vmap(grad(scalar(s), argnums=(0, 1)), in_dims=(0, None))(torch.stack((x, -x)), w),
    "vmap of jvp": lambda s, x, w: vmap(lambda v: jvp(lambda w: s(x, w), (w,), (v,))[1])(torch.stack((w, w.mT))),
    "vmap of vjp": lambda s, x, w: vmap(vjp(s, x, w)[1])(torch.stack((x, x.cos()))),
    "vmap of hessian": lambda s, x, w: vmap(hessian(scalar(s)), in_dims=(0, None))(torch.stack((x, -x)), w),
    "grad of vmap": lambda s, x, w: grad(
        lambda w: vmap(lambda x: s(x, w))(torch.stack((x, -x))).sin().sum()
    )(w),
    "nested vmap": lambda s, x, w: vmap(
        lambda x: vmap(lambda w: s(x, w))(torch.stack((w, w.mT)))
    )(torch.stack((x, -x))),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("way", ["arguments", "dependent"])
def test_transforms(name, way):
    x, w = data()
    both(lambda solve: TRANSFORMS[name](solver_of(way)(solve), x, w))


@pytest.mark.parametrize(
    "third",
    [
        lambda s, x: jacfwd(jacfwd(jacrev(s)))(x),
        lambda s, x: jacrev(jacfwd(jacrev(s)))(x),
        lambda s, x: jacfwd(jacrev(jacfwd(s)))(x),
        lambda s, x: jacrev(jacrev(jacrev(s)))(x),
        lambda s, x: jacfwd(jacfwd(jacfwd(s)))(x),
    ],
    ids=["forward-forward-reverse", "reverse-forward-reverse", "forward-reverse-forward", "reverse", "forward"],
)
def test_third_derivatives_of_every_mix(third):
    x, w = data(batch=1, dim=2)
    both(lambda solve: third(lambda t: solve(sine_map, torch.zeros_like(x), x * t, w * t.cos()).sin().sum(), w[0]))


@pytest.mark.parametrize("way", ["arguments", "captured", "dependent"])
def test_dual_tensors(way):
    x, w = data()

    def compute(solve):
        with forward_ad.dual_level():
            value = solver_of(way)(solve)(forward_ad.make_dual(x, x.cos()), forward_ad.make_dual(w, w.sin()))
            return forward_ad.unpack_dual(value).tangent

    both(compute)


def test_dual_tensors_whose_tangent_needs_a_gradient():
    x, w = data()

    def compute(solve):
        leaf = w.clone().requires_grad_()
        with forward_ad.dual_level():
            value = solve(tanh_map, torch.zeros_like(x), forward_ad.make_dual(x, x.cos()), leaf)
            tangent = forward_ad.unpack_dual(value).tangent
        return torch.autograd.grad(tangent.sin().sum(), leaf)

    both(compute)


def test_a_transform_beside_leaves_that_require_grad():
    x, w = data()

    def compute(solve):
        leaf = w.clone().requires_grad_()
        inner = grad(lambda x: solve(lambda z: tanh_map(z, x, leaf), torch.zeros_like(x)).sin().sum())(x)
        return torch.autograd.grad(inner.square().sum(), leaf)

    both(compute)


def test_a_map_that_is_not_batched():
    x, w = data(batch=4)

    def f(z, x, w):  # one system: the rows are mixed
        return torch.tanh(z @ w.mT * (1 + 0.2 * x) + 0.2 * z.flip(0) * x + x)

    def compute(solve):
        options = {"batched": False} if solve is fixed_point else {}

        def value(x, w):
            return solve(f, torch.zeros_like(x), x, w, **options).sin().sum()

        leaf = w.clone().requires_grad_()
        (first,) = torch.autograd.grad(value(x, leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return [
            first.detach(),
            second,
            jacfwd(grad(value))(x, w),
            vmap(grad(value, 1), (0, None))(torch.stack((x, -x)), w),
        ]

    both(compute)


def test_a_root():
    x, w = data()

    def root(f, z0, *args):
        solver = ti.NewtonKrylov(rtol=0.0, atol=1e-14)
        return ti.solve(ti.Root(f), z0, *args, solver=solver, gradient=EXACT).value

    def g(z, x, w):
        return z + 0.3 * z.pow(3) * (1 + x.square()) - tanh_map(z, x, w)

    def compute(solve):
        def value(x, w):
            if solve is unrolled:
                return unrolled(lambda z, x, w: z - 0.5 * g(z, x, w), torch.zeros_like(x), x, w, steps=120)
            return root(g, torch.zeros_like(x), x, w)

        def loss(x, w):
            return value(x, w).sin().sum()

        leaf = w.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x, leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return [first.detach(), second, jvp(value, (x, w), (x, w))[1], jacfwd(grad(loss))(x, w)]

    both(compute)


# -- numerical checks --------------------------------------------------------------------------------------------------


def test_gradcheck():
    x, w = (t.requires_grad_() for t in data(batch=2, dim=2))

    def value(x, w):
        return fixed_point(tanh_map, torch.zeros_like(x), x, w)

    assert torch.autograd.gradcheck(value, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value, (x, w), check_fwd_over_rev=True)


# -- the report of the adjoint solve -----------------------------------------------------------------------------------


def test_the_adjoint_is_reported_once_it_is_solved():
    x, w = data(batch=4)
    solution = ti.solve(ti.FixedPoint(tanh_map), torch.zeros_like(x), x.requires_grad_(), w, solver=TIGHT)
    assert solution.adjoint is None
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=x.dtype)
    (weight[:, None] * solution.value).sum().backward()
    assert solution.adjoint.converged.tolist() == [True] * 4
    assert solution.adjoint.steps[2] == 0, "a sample without a cotangent takes no steps"
    assert (solution.adjoint.steps[:2] > 0).all()
    assert (solution.adjoint.residual < 1e-9).all()
    assert solution.adjoint.evaluations > 0


def test_an_adjoint_that_falls_short_warns():
    x, w = data()
    gradient = ti.Implicit(linear_solver=ti.GMRES(max_steps=1, rtol=1e-12))
    solution = ti.solve(ti.FixedPoint(tanh_map), torch.zeros_like(x), x.requires_grad_(), w, gradient=gradient)
    with pytest.warns(ti.ConvergenceWarning, match="adjoint solve did not converge"):
        solution.value.sum().backward()
    assert not solution.adjoint.converged.any()
    assert (solution.adjoint.status == ti.Status.MAX_STEPS).all()


def test_the_default_is_exact_to_its_tolerances():
    x, w = data()
    w = w.requires_grad_()

    def of(**options):
        value = ti.solve(ti.FixedPoint(tanh_map), torch.zeros_like(x), x, w, **options).value
        return torch.autograd.grad(value.sin().sum(), w)

    assert_agree(of(), of(solver=TIGHT, gradient=EXACT))


@pytest.mark.parametrize(
    "linear_solver",
    [ti.GMRES(rtol=1e-13), ti.BiCGStab(rtol=1e-13), ti.LSMR(rtol=1e-13), ti.Neumann(rtol=1e-13), ti.Dense()],
    ids=lambda s: type(s).__name__,
)
def test_every_linear_solver_serves_both_directions(linear_solver):
    x, w = data()
    gradient = ti.Implicit(linear_solver=linear_solver)
    _, tangent = jvp(lambda w: fixed_point(tanh_map, torch.zeros_like(x), x, w, gradient=gradient), (w,), (w,))
    (pulled,) = vjp(lambda w: fixed_point(tanh_map, torch.zeros_like(x), x, w, gradient=gradient), w)[1](x)
    both(lambda solve: [tangent, pulled] if solve is fixed_point else [
        jvp(lambda w: unrolled(tanh_map, torch.zeros_like(x), x, w), (w,), (w,))[1],
        vjp(lambda w: unrolled(tanh_map, torch.zeros_like(x), x, w), w)[1](x)[0],
    ])  # fmt: skip


@pytest.mark.parametrize("linear_solver", [None, ti.Dense()])
def test_batched_cotangents_of_autograd_are_refused_in_words(linear_solver):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    problem = ti.FixedPoint(lambda z, x: torch.tanh(0.3 * z + x))
    value = ti.solve(problem, torch.zeros_like(x), x, gradient=ti.Implicit(linear_solver=linear_solver)).value
    with pytest.raises(ti.UnsupportedDerivativeError, match=r"is_grads_batched.*torch.func.jacrev"):
        torch.autograd.grad(value, x, torch.ones(2, 2, 3, dtype=torch.float64), is_grads_batched=True)


CONSTANTS = {
    "root": lambda start: ti.solve(ti.Root(lambda z: z.pow(3) - 2), start),
    "minimum": lambda start: ti.solve(ti.Minimum(lambda z: (z.pow(3) - 2).square().sum(1)), start),
    "newton": lambda start: ti.solve(ti.FixedPoint(torch.cos), start, solver=ti.NewtonKrylov()),
    "unrolled": lambda start: ti.solve(ti.FixedPoint(torch.cos), start, gradient=ti.UnrolledPhantom()),
}


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_under_a_transform(name, like):
    """A solve that does not depend on what is differentiated, from a start that belongs to the transform or not."""
    a = torch.tensor([[2.0]], dtype=torch.float64)
    outside = torch.ones(1, 1, dtype=torch.float64)
    value = CONSTANTS[name](outside).value

    def f(a):
        return (a.square() * CONSTANTS[name](torch.ones_like(a) if like else outside).value).sum()

    torch.testing.assert_close(torch.func.grad(f)(a), 2 * a * value)
    torch.testing.assert_close(torch.func.jvp(f, (a,), (a,))[1], (2 * a.square() * value).sum())
    torch.testing.assert_close(torch.func.hessian(f)(a).reshape(1, 1), 2 * value)
    torch.testing.assert_close(torch.func.vmap(f)(a[None]), (a.square() * value).reshape(1))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(a[None]), 2 * (a * value)[None])
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.jvp(f, (a,), (a,))[1])(a), 4 * a * value)
