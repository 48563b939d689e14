"""Equilibria inside each other's maps that depend on the same captured tensors, in every mode and at every depth."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torchimplicit as ti

pytestmark = pytest.mark.usefixtures("one_thread")

INNER = {
    "fixed_point": lambda y, z, W: 0.3 * torch.tanh(y @ W) + torch.sin(z),
    "root": lambda y, z, W: y + 0.1 * y.pow(3) + 0.3 * y @ W - torch.sin(z),
    "minimum": lambda y, z, W: (0.5 * y.square() + 0.1 * y.pow(4) + 0.2 * (y @ W).square() - y * torch.sin(z)).sum(-1),
}
OUTER = {
    "fixed_point": lambda z, y, x, W: torch.tanh(0.5 * z @ W + x + 0.2 * y),
    "root": lambda z, y, x, W: z + 0.1 * z.pow(3) - torch.tanh(0.5 * z @ W + x + 0.2 * y),
    "minimum": lambda z, y, x, W: (0.5 * z.square() + 0.1 * (z @ W).square() + 0.05 * y.square() - z * x).sum(-1),
}
PROBLEMS = {"fixed_point": ti.FixedPoint, "root": ti.Root, "minimum": ti.Minimum}
SOLVERS = {
    "fixed_point": ti.NewtonKrylov(rtol=1e-14),
    "root": ti.NewtonKrylov(rtol=1e-14),
    "minimum": ti.NewtonKrylov(rtol=1e-14),
}


def solved(kind, f, start):
    return ti.solve(
        PROBLEMS[kind](f), start, solver=SOLVERS[kind], gradient=ti.Implicit(linear_solver=ti.Dense(rtol=1e-12))
    ).value


def newton(kind, f, start):
    """The solution of one sample, differentiable by unrolling: Newton's method on the assembled matrix."""
    if kind == "fixed_point":
        residual = lambda z: z - f(z)  # noqa: E731
    else:
        residual = f if kind == "root" else grad(f)
    z = start
    for _ in range(4):
        z = z - torch.linalg.solve(jacrev(residual)(z), residual(z))
    return z


class Cell(nn.Module):
    """A map with an equilibrium inside, both of one parameter."""

    def __init__(self, W, outer, inner):
        super().__init__()
        self.W, self.outer, self.inner = nn.Parameter(W), outer, inner

    def forward(self, z, x):
        y = solved(self.inner, lambda y: INNER[self.inner](y, z, self.W), torch.zeros_like(z))
        return OUTER[self.outer](z, y, x, self.W)


def ours(outer, inner, W, x, style="closure"):
    """``[batch, dim]``, by two nested solves."""
    if style == "closure":

        def f(z):
            y = solved(inner, lambda y: INNER[inner](y, z, W), torch.zeros_like(z))
            return OUTER[outer](z, y, x, W)

        return solved(outer, f, torch.zeros_like(x))
    if style == "partial":

        def within(z, W):
            y = solved(inner, functools.partial(INNER[inner], z=z, W=W), torch.zeros_like(z))
            return OUTER[outer](z, y, x, W)

        return solved(outer, functools.partial(within, W=W), torch.zeros_like(x))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell(torch.zeros(2, 2, dtype=torch.float64), outer, inner)

        def forward(self, x):
            return solved(outer, lambda z: self.cell(z, x), torch.zeros_like(x))

    return functional_call(Layer(), {"cell.W": W}, (x,))


def reference(outer, inner, W, x):
    """The same, dense, a sample at a time."""

    def each(x):
        def f(z):
            y = newton(inner, lambda y: INNER[inner](y, z, W), torch.zeros_like(z))
            return OUTER[outer](z, y, x, W)

        return newton(outer, f, torch.zeros_like(x))

    return torch.stack([each(row) for row in x])


def _dual(f, b, d):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(b, d))).tangent


def _double(f, b, d):
    b = b.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(b).square().sum(), b, create_graph=True)
    return torch.autograd.grad((slope * d).sum(), b)[0]


def _loss(f):
    return lambda b: f(b).square().sum()


def _along(f, d):
    return lambda b: jvp(f, (b,), (d,))[1]


MODES = {
    "dual": _dual,
    "double": _double,
    "jvp": lambda f, b, d: _along(f, d)(b),
    "jvp of jvp": lambda f, b, d: _along(_along(f, d), d)(b),
    "jvp of grad": lambda f, b, d: _along(grad(_loss(f)), d)(b),
    "grad of jvp": lambda f, b, d: grad(lambda b: _along(f, d)(b).square().sum())(b),
    "vjp of vjp": lambda f, b, d: vjp(lambda b: vjp(_loss(f), b)[1](torch.ones((), dtype=b.dtype))[0], b)[1](d)[0],
    "hessian": lambda f, b, d: hessian(f)(b),
    "jacfwd of jacfwd": lambda f, b, d: jacfwd(jacfwd(f))(b),
    "jacrev of jacrev": lambda f, b, d: jacrev(jacrev(f))(b),
    "dual of grad": lambda f, b, d: _dual(grad(_loss(f)), b, d),
    "vmap of jvp": lambda f, b, d: vmap(_along(f, d))(_several(b, d)),
    "jvp of vmap": lambda f, b, d: _along(vmap(f), d.expand(2, -1))(_several(b, d)),
    "vmap of hessian": lambda f, b, d: vmap(hessian(_loss(f)))(_several(b, d)),
}
FEW = ("dual", "double")


def _several(b, d):
    return torch.stack((b, b + 0.1 * d))


def compared(f, g, mode, b, d):
    """The derivative of ``f``, with that of ``g``: of the latter without vmap."""
    if "vmap" in mode:
        each = {"vmap of jvp": _along(g, d), "jvp of vmap": _along(g, d), "vmap of hessian": hessian(_loss(g))}[mode]
        expected = torch.stack([each(b) for b in _several(b, d)])
    else:
        expected = MODES[mode](g, b, d)
    torch.testing.assert_close(MODES[mode](f, b, d), expected, rtol=1e-8, atol=1e-9)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return 0.4 * normal(2, 2), 0.5 * normal(2, 2), normal(2), normal(2)


@pytest.mark.parametrize(
    ("outer", "inner", "mode"),
    [("fixed_point", "root", mode) for mode in MODES]
    + [(outer, inner, mode) for outer in OUTER for inner in INNER for mode in FEW],
)
def test_both_depend_on_what_is_differentiated(outer, inner, mode, data):
    W, x, b, d = data
    compared(
        lambda b: ours(outer, inner, W * (1 + 0.1 * b), x + 0.2 * b),
        lambda b: reference(outer, inner, W * (1 + 0.1 * b), x + 0.2 * b),
        mode,
        b,
        d,
    )


@pytest.mark.parametrize("mode", FEW)
@pytest.mark.parametrize("style", ["partial", "module"])
def test_however_they_come_by_it(style, mode, data):
    W, x, b, d = data
    compared(
        lambda b: ours("fixed_point", "root", W * (1 + 0.1 * b), x, style),
        lambda b: reference("fixed_point", "root", W * (1 + 0.1 * b), x),
        mode,
        b,
        d,
    )


@pytest.mark.parametrize("mode", [*FEW, "vmap of hessian"])
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_one_of_them_depends_on_it(which, mode, data):
    W, x, b, d = data

    def at(b):
        moved = W * (1 + 0.1 * b)
        return (W, moved) if which == "inner" else (moved, W)

    def f(b):
        of_outer, of_inner = at(b)

        def step(z):
            y = solved("root", lambda y: INNER["root"](y, z, of_inner), torch.zeros_like(z))
            return OUTER["fixed_point"](z, y, x, of_outer)

        return solved("fixed_point", step, torch.zeros_like(x))

    def g(b):
        of_outer, of_inner = at(b)

        def each(x):
            def step(z):
                y = newton("root", lambda y: INNER["root"](y, z, of_inner), torch.zeros_like(z))
                return OUTER["fixed_point"](z, y, x, of_outer)

            return newton("fixed_point", step, torch.zeros_like(x))

        return torch.stack([each(row) for row in x])

    compared(f, g, mode, b, d)


@pytest.mark.parametrize("mode", ["dual", "double"])
def test_three_levels(mode, data):
    W, x, b, d = data

    def at(b, solve, x):
        V = W * (1 + 0.1 * b)

        def middle(y, z):
            deepest = solve("fixed_point", lambda u: 0.2 * torch.tanh(u @ V) + torch.cos(y), torch.zeros_like(y))
            return y + 0.3 * y @ V - torch.sin(z) + 0.1 * deepest

        def step(z):
            y = solve("root", lambda y: middle(y, z), torch.zeros_like(z))
            return torch.tanh(0.5 * z @ V + x + 0.2 * y)

        return solve("fixed_point", step, torch.zeros_like(x))

    compared(lambda b: at(b, solved, x), lambda b: torch.stack([at(b, newton, row) for row in x]), mode, b, d)


@pytest.mark.parametrize("estimator", [ti.Unrolled(), ti.UnrolledPhantom(steps=300, damping=1.0)])
def test_an_inner_one_that_is_unrolled(estimator, data):
    W, x, b, d = data

    def f(b):
        V = W * (1 + 0.1 * b)

        def step(z):
            inner = ti.FixedPoint(lambda y: INNER["fixed_point"](y, z, V))
            solver = ti.FixedPointIteration(rtol=1e-15)
            return OUTER["fixed_point"](
                z, ti.solve(inner, torch.zeros_like(z), solver=solver, gradient=estimator).value, x, V
            )

        return solved("fixed_point", step, torch.zeros_like(x))

    compared(f, lambda b: reference("fixed_point", "fixed_point", W * (1 + 0.1 * b), x), "double", b, d)
