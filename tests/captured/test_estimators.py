"""Given numbers of steps, and the estimators that people train with, against the eager path."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Anderson, Broyden, FixedPoint, FixedPointIteration, GradientDescent, Minimum, Root
from torchimplicit.captured import compilations
from torchimplicit.errors import CaptureWarning, ConvergenceWarning
from torchimplicit.solution import Status

DIM = 4


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


def tensors(batch=3):
    generator = torch.Generator().manual_seed(0)
    w = 0.8 * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
    return w.requires_grad_(), x.requires_grad_()


def stated(kind, w):
    if kind == "map":
        return FixedPoint(lambda z, x: torch.tanh(z @ w.T + x))
    if kind == "coupled":
        return FixedPoint(lambda z, x: torch.tanh(z @ w.T + 0.3 * z.mean(0) + x))
    if kind == "tree":
        return FixedPoint(lambda z, x: (torch.tanh(z[1] @ w.T + x), 0.5 * torch.sin(z[0]) + 0.1 * z[1]))
    if kind == "root":
        return Root(lambda z, x: 2 * (z - torch.tanh(z @ w.T + x)))
    return Minimum(lambda z, x: torch.cosh(z @ w.T).sum(-1) + 0.5 * (z**2).sum(-1) - (z * x).sum(-1))


def both(kind, solver, gradient, batch=3):
    w, x = tensors(batch)
    z0 = (torch.zeros_like(x), torch.zeros_like(x)) if kind == "tree" else torch.zeros_like(x)
    found = []
    for compile in (False, True):
        solution = ti.solve(stated(kind, w), z0, x, solver=solver, gradient=gradient, compile=compile)
        value = solution.value[0] + 2 * solution.value[1] if kind == "tree" else solution.value
        u = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        found.append((solution, value, torch.autograd.grad(value, (w, x), u)))
    return found


def agree(kind, solver, gradient):
    (one, before, grads), (two, after, compiled) = both(kind, solver, gradient)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-10)
    for a, b in zip(compiled, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert torch.equal(two.status, one.status)
    assert torch.equal(two.steps, one.steps)
    # where samples depend on each other, the eager loop evaluates the whole once more
    assert two.evaluations == one.evaluations - (kind == "coupled" and solver.steps is None)
    torch.testing.assert_close(two.residual, one.residual, rtol=1e-2, atol=1e-13, equal_nan=True)
    torch.testing.assert_close(two.absolute_residual, one.absolute_residual, rtol=1e-2, atol=1e-13)
    assert torch.equal(two.adjoint.status, one.adjoint.status)
    assert torch.equal(two.adjoint.steps, one.adjoint.steps)
    # a minimum's eager estimate takes one product more, to find saddles
    assert two.adjoint.evaluations == one.adjoint.evaluations - (
        kind == "energy" and isinstance(gradient, ti.NeumannPhantom)
    )
    torch.testing.assert_close(two.adjoint.residual, one.adjoint.residual, rtol=1e-2, atol=1e-14, equal_nan=True)


PLAIN = FixedPointIteration
QUICK = [
    ("map", PLAIN(rtol=1e-10), ti.UnrolledPhantom(steps=3, damping=0.7)),
    ("map", PLAIN(steps=5), ti.NeumannPhantom(steps=3)),
    ("map", PLAIN(steps=5, damping=0.8), ti.OneStep()),
    ("tree", Anderson(memory=2, steps=5), ti.UnrolledPhantom(steps=2)),
]
THOROUGH = [
    ("map", PLAIN(rtol=1e-10), ti.NeumannPhantom(steps=1)),
    ("map", PLAIN(rtol=1e-10), ti.OneStep()),
    ("map", PLAIN(steps=1), ti.OneStep()),
    ("map", PLAIN(steps=5), ti.UnrolledPhantom(steps=2)),
    ("map", PLAIN(steps=5), ti.Implicit(linear_solver=ti.Dense())),
    ("map", Broyden(memory=3, steps=7), ti.UnrolledPhantom(steps=2)),
    ("map", Broyden(steps=17), ti.OneStep()),
    ("coupled", PLAIN(rtol=1e-10), ti.NeumannPhantom(steps=4)),
    ("coupled", PLAIN(steps=6), ti.UnrolledPhantom(steps=2)),
    ("tree", PLAIN(steps=5), ti.OneStep()),
    ("root", Broyden(rtol=1e-9), ti.UnrolledPhantom(steps=3, damping=0.3)),
    ("root", Broyden(steps=9), ti.NeumannPhantom(steps=3, damping=0.3)),
    ("energy", GradientDescent(step_size=0.2, steps=9), ti.UnrolledPhantom(steps=3, damping=0.2)),
    ("energy", GradientDescent(step_size=0.2, rtol=1e-9), ti.NeumannPhantom(steps=3, damping=0.2)),
]


@pytest.mark.parametrize(("kind", "solver", "gradient"), QUICK)
@pytest.mark.usefixtures("interpreted")
def test_what_is_compiled_gives_what_the_eager_path_gives(kind, solver, gradient):
    agree(kind, solver, gradient)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "solver", "gradient"), THOROUGH)
@pytest.mark.usefixtures("interpreted")
def test_so_does_the_rest(kind, solver, gradient):
    agree(kind, solver, gradient)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "solver", "gradient"), QUICK)
def test_so_it_does_when_the_compiler_has_been_at_it(kind, solver, gradient):
    agree(kind, solver, gradient)


@pytest.mark.usefixtures("interpreted")
def test_second_derivatives_of_compiled_steps_are_those_of_the_steps():
    w, x = tensors()
    found = []
    for compile in (False, True):
        problem, gradient = stated("map", w), ti.UnrolledPhantom(steps=2)
        value = ti.solve(problem, torch.zeros_like(x), x, solver=PLAIN(rtol=1e-10), gradient=gradient, compile=compile)
        first = torch.autograd.grad(value.value.square().sum(), (w, x), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (w, x)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("interpreted")
def test_a_tensor_written_to_since_is_an_error_as_without():
    w, x = tensors()
    found = ti.solve(
        stated("map", w), torch.zeros_like(x), x, solver=PLAIN(steps=4), gradient=ti.OneStep(), compile=True
    )
    with torch.no_grad():
        w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.value.sum().backward()


@pytest.mark.usefixtures("interpreted")
def test_a_sample_that_goes_non_finite_in_given_steps_is_alone():
    w, x = tensors()
    spoilt = x.detach().clone()
    spoilt[1, 0] = torch.nan
    with torch.no_grad():
        good, bad = (
            ti.solve(stated("map", w), torch.zeros_like(x), v, solver=PLAIN(steps=4), compile=True, throw=False)
            if v is x
            else _quietly(stated("map", w), v)
            for v in (x, spoilt)
        )
    assert bad.status.tolist() == [Status.STEPS_TAKEN, Status.NONFINITE, Status.STEPS_TAKEN]
    assert torch.equal(bad.value[[0, 2]], good.value[[0, 2]])


def _quietly(problem, x):
    with pytest.warns(ConvergenceWarning, match="NaN"):
        return ti.solve(problem, torch.zeros_like(x), x, solver=PLAIN(steps=4), compile=True, throw=False)


@pytest.mark.usefixtures("interpreted")
def test_the_last_iterate_where_steps_run_out():
    w, x = tensors()
    for solver in (PLAIN(max_steps=4, return_last=True), Anderson(memory=2, max_steps=4, return_last=True)):
        found = []
        for compile in (False, True):
            with torch.no_grad(), pytest.warns(ConvergenceWarning, match="last iterate"):
                found.append(ti.solve(stated("map", w), torch.zeros_like(x), x, solver=solver, compile=compile))
        torch.testing.assert_close(found[1].value, found[0].value)
        torch.testing.assert_close(found[1].residual, found[0].residual)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("solver", [PLAIN(steps=4), Broyden(memory=3, rtol=1e-10)], ids=["steps", "Broyden"])
def test_batches_of_any_size_are_served_by_one_compilation(solver):
    before = compilations()
    for batch in (3, 5, 2):
        (_, one, grads), (_, two, compiled) = both("map", solver, ti.UnrolledPhantom(steps=2), batch)
        torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(compiled, grads, rtol=1e-7, atol=1e-8)
    assert compilations() == before + 1
