"""Complex states as such: against complex algebra, the real view, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import torchimplicit as ti

C128 = torch.complex128


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=C128, generator=torch.Generator().manual_seed(seed))


W = 0.3 * normal(4, 4)
ZERO = torch.zeros(3, 4, dtype=C128)


def shift(z: Tensor, c: Tensor) -> Tensor:
    """Not analytic."""
    return torch.tanh(z.real @ W.real) + 0.2j * (z.conj() @ W) + c


PROBLEMS = {
    "fixed point": ti.FixedPoint(shift),
    "root": ti.Root(lambda z, c: z - shift(z, c)),
    "minimum": ti.Minimum(lambda z, c: ((z - c).abs().square() + 0.1 * (z @ W).abs().square().square()).sum(1)),
    "least squares": ti.LeastSquares(lambda z, c: torch.cat((z - shift(z, c), 0.1 * z * z), dim=1)),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_it_is_the_real_view(problem):
    c = normal(3, 4, seed=1).requires_grad_()
    found = ti.solve(problem, ZERO, c)
    assert found.value.dtype == C128
    assert found.converged.all()

    def real(z: Tensor, c: Tensor) -> Tensor:
        out = problem.function(torch.view_as_complex(z), c)
        return torch.view_as_real(out) if out.is_complex() else out

    kind = type(problem)
    other = ti.solve(kind(real), torch.view_as_real(ZERO), c)
    torch.testing.assert_close(torch.view_as_real(found.value), other.value, rtol=1e-9, atol=1e-9)
    (got,) = torch.autograd.grad(found.value.abs().square().sum(), c)
    (expected,) = torch.autograd.grad(other.value.square().sum(), c)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_derivatives_of_two_orders(problem):
    c = normal(2, 4, seed=1).requires_grad_()

    def solved(c: Tensor) -> Tensor:
        return ti.solve(problem, torch.zeros_like(c), c).value

    assert gradcheck(solved, c, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solved, c, fast_mode=True)


def test_transforms():
    c = normal(3, 4, seed=1)

    def loss(c: Tensor) -> Tensor:
        value = ti.solve(PROBLEMS["root"], ZERO[:1], c[None]).value
        return value.abs().square().sum()

    apart = torch.stack([grad(loss)(one) for one in c])
    torch.testing.assert_close(vmap(grad(loss))(c), apart, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "gradient",
    [
        ti.UnrolledPhantom(steps=60, damping=1.0),
        ti.NeumannPhantom(steps=60, damping=1.0),
        ti.Unrolled(),
        ti.AdaptivePhantom(tolerance=1e-8),
    ],
    ids=repr,
)
def test_estimators(gradient):
    c = normal(3, 4, seed=1).requires_grad_()
    grads = []
    for chosen in (gradient, ti.Implicit()):
        value = ti.solve(
            PROBLEMS["fixed point"], ZERO, c, gradient=chosen, solver=ti.FixedPointIteration(max_steps=500)
        ).value
        grads.append(torch.autograd.grad(value.sin().real.sum(), c)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_equilibrium_propagation():
    c = normal(3, 4, seed=1).requires_grad_()
    grads = []
    for chosen in (ti.EquilibriumPropagation(), ti.Implicit()):
        value = ti.solve(PROBLEMS["minimum"], ZERO, c, gradient=chosen).value
        grads.append(torch.autograd.grad(value.real.sum() + value.imag.square().sum(), c)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hermitian", [False, True])
def test_linear_systems(hermitian):
    a, b = normal(3, 4, 4) + 4 * torch.eye(4), normal(3, 4, seed=1)
    a = a @ a.mH if hermitian else a
    a, b = a.requires_grad_(), b.requires_grad_()
    found = ti.linear_solve(a, b, symmetric=hermitian, solver=ti.CG(rtol=1e-13) if hermitian else None).value
    reference = torch.linalg.solve(a, b)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found.sin().abs().sum(), (a, b))
    torch.testing.assert_close(got, torch.autograd.grad(reference.sin().abs().sum(), (a, b)), rtol=1e-8, atol=1e-8)


def test_least_squares_of_complex_systems():
    a, b = normal(6, 4).requires_grad_(), normal(2, 6, seed=1)
    found = ti.linear_solve(a, b).value
    reference = (torch.linalg.pinv(a) @ b.mT).mT
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found.sin().abs().sum(), a)
    torch.testing.assert_close(got, torch.autograd.grad(reference.sin().abs().sum(), a), rtol=1e-8, atol=1e-8)


def test_trees_of_real_and_complex_leaves():
    c = normal(3, 2, seed=1).requires_grad_()

    def f(z: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
        return {"a": 0.3 * z["a"].conj() * z["b"] + c, "b": 0.2 * z["a"].abs() + 0.1 * z["b"]}

    start = {"a": torch.zeros(3, 2, dtype=C128), "b": torch.zeros(3, 2, dtype=torch.float64)}
    found = ti.solve(ti.FixedPoint(f, rowwise=True), start, c)
    assert found.converged.all()
    assert found.value["a"].dtype == C128
    assert found.value["b"].dtype == torch.float64
    again = f(found.value, c)
    for key in start:
        torch.testing.assert_close(again[key], found.value[key], rtol=1e-8, atol=1e-9)


def test_solvers():
    c = normal(3, 4, seed=1)
    first = ti.solve(PROBLEMS["fixed point"], ZERO, c).value
    for solver in (ti.Broyden(), ti.NewtonKrylov(), ti.FixedPointIteration(max_steps=500)):
        other = ti.solve(PROBLEMS["fixed point"], ZERO, c, solver=solver).value
        torch.testing.assert_close(other, first, rtol=1e-8, atol=1e-9)
    first = ti.solve(PROBLEMS["minimum"], ZERO, c).value
    for solver in (ti.NewtonKrylov(), ti.GradientDescent(step_size=0.05)):
        other = ti.solve(PROBLEMS["minimum"], ZERO, c, solver=solver).value
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-7)


def test_a_map_to_real_numbers_is_refused():
    with pytest.raises(ValueError, match="but the state is complex"):
        ti.solve(ti.FixedPoint(lambda z: z.real), ZERO)
    with pytest.raises(ValueError, match="keep the dtype"):
        ti.solve(ti.FixedPoint(lambda z: z + 0j), torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="real view"):
        ti.derivatives.Derivatives(ti.solve(PROBLEMS["root"], ZERO, normal(3, 4)))
