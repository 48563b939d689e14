"""UPG, NPG and the one-step gradient against their matrices (Geng et al. 2021, eqs. 16 and 17)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from maps import EXACT, TIGHT, assert_agree, data, fixed_point, sine_map, tanh_map
from torch import Tensor
from torch.func import hessian, jacrev, jvp

import torchimplicit as ti
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import relative_error

SETTINGS = [(1, 0.5), (3, 0.5), (5, 0.8), (4, 1.0), (60, 0.9)]


class TestUnrolledPhantom(GradientSuite):
    bound = 1e-6

    def make(self) -> ti.UnrolledPhantom:
        return ti.UnrolledPhantom(steps=40, damping=0.75)


class TestNeumannPhantom(GradientSuite):
    bound = 1e-6
    second_order = False

    def make(self) -> ti.NeumannPhantom:
        return ti.NeumannPhantom(steps=60, damping=0.9)


class TestOneStep(GradientSuite):
    bound = 0.7
    second_order = False

    def make(self) -> ti.OneStep:
        return ti.OneStep()


def at_solution() -> tuple[Tensor, Tensor, Tensor]:
    """z, x (``[1, dim]``) and w."""
    x, w = data(batch=1)
    return fixed_point(sine_map, torch.zeros_like(x), x, w), x, w


def pulled(gradient: ti.Implicit, u: Tensor, z0: Tensor | None = None, solver: object = TIGHT) -> Tensor:
    """The estimate of :math:`u^T \\partial z/\\partial w`."""
    _, x, w = at_solution()
    w = w.requires_grad_()
    value = fixed_point(
        sine_map, torch.zeros_like(x) if z0 is None else z0, x, w, solver=solver, gradient=gradient, throw=False
    )
    return torch.autograd.grad(value, w, u)[0]


def neumann(k: int, damping: float, j: Tensor) -> Tensor:
    """:math:`\\lambda\\sum_{i<k}B^i`, :math:`B=\\lambda J+(1-\\lambda)I`."""
    eye = torch.eye(len(j), dtype=j.dtype)
    b = damping * j + (1 - damping) * eye
    return damping * sum(torch.linalg.matrix_power(b, i) for i in range(k))


def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J, f_w at the state z (``[1, dim]``), and a cotangent."""
    _, x, w = at_solution()
    j, f_w = jacrev(sine_map, argnums=(0, 2))(z[0], x[0], w)
    return j, f_w, torch.cos(x)


@pytest.mark.parametrize(("k", "damping"), SETTINGS)
def test_npg_is_its_matrix(k, damping):
    z, x, w = at_solution()
    j, f_w, u = parts(z)
    m = neumann(k, damping, j)
    gradient = ti.NeumannPhantom(steps=k, damping=damping)
    assert_agree(pulled(gradient, u), torch.einsum("i,ij,jkl->kl", u[0], m, f_w), 1e-8)
    _, tangent = jvp(lambda w: fixed_point(sine_map, torch.zeros_like(x), x, w, gradient=gradient), (w,), (w,))
    assert_agree(tangent[0], torch.einsum("ij,jkl,kl->i", m, f_w, w), 1e-8)


@pytest.mark.parametrize(("k", "damping"), SETTINGS)
def test_upg_equals_npg_at_an_exact_solution(k, damping):
    z, _, _ = at_solution()
    j, f_w, u = parts(z)
    expected = torch.einsum("i,ij,jkl->kl", u[0], neumann(k, damping, j), f_w)
    assert_agree(pulled(ti.UnrolledPhantom(steps=k, damping=damping), u), expected, 1e-8)


@pytest.mark.parametrize(("k", "damping"), SETTINGS[:-1])
@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_upg_is_the_product_at_its_own_iterates(k, damping):
    """Eq. 16, at a solution that is far from exact."""
    _, x, w = at_solution()
    start = 0.3 * torch.ones_like(x)
    rough = ti.FixedPointIteration(max_steps=1)
    h = sine_map(start, x, w)
    total, u = torch.zeros_like(w).expand(x.shape[1], -1, -1), torch.cos(x)
    for _ in range(k):
        j, f_w, _ = parts(h)
        b = damping * j + (1 - damping) * torch.eye(len(j), dtype=j.dtype)
        total = damping * f_w + torch.einsum("ij,jkl->ikl", b, total)
        h = damping * sine_map(h, x, w) + (1 - damping) * h
    gradient = ti.UnrolledPhantom(steps=k, damping=damping)
    assert_agree(pulled(gradient, u, start, rough), torch.einsum("i,ikl->kl", u[0], total), 1e-8)
    value = fixed_point(sine_map, start, x, w.requires_grad_(), solver=rough, gradient=gradient)
    assert_agree(value.detach(), h.detach(), 1e-12)


@pytest.mark.parametrize("estimator", [ti.UnrolledPhantom, ti.NeumannPhantom])
def test_both_tend_to_the_exact_gradient(estimator):
    u = torch.cos(at_solution()[1])
    exact = pulled(EXACT, u)
    errors = [relative_error(pulled(estimator(steps=k, damping=0.8), u), exact) for k in (1, 4, 16, 64)]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-7


def test_the_hessian_of_upg_tends_to_the_exact_one():
    x, w = data(batch=1, dim=2)

    def of(gradient: object) -> Tensor:
        return hessian(
            lambda w: fixed_point(tanh_map, torch.zeros_like(x), x, w, gradient=gradient).sin().sum()
        )(w)  # fmt: skip

    errors = [relative_error(of(ti.UnrolledPhantom(steps=k, damping=1.0)), of(EXACT)) for k in (1, 4, 16)]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-7


def test_one_step_is_the_pullback_of_the_map():
    z, _, _ = at_solution()
    _, f_w, u = parts(z)
    expected = torch.einsum("i,ikl->kl", u[0], f_w)
    assert_agree(pulled(ti.OneStep(), u), expected, 1e-8)
    assert_agree(pulled(ti.NeumannPhantom(steps=1, damping=1.0), u), expected, 1e-8)


@pytest.mark.parametrize(
    ("gradient", "forward", "backward"),
    [
        (ti.NeumannPhantom(steps=5), 0, 4),
        (ti.UnrolledPhantom(steps=5), 5, 4),
        (ti.UnrolledPhantom(steps=1), 1, 0),
        (ti.OneStep(), 0, 0),
    ],
)
def test_a_truncated_adjoint_is_reported_as_such(gradient, forward, backward):
    x, w = data(batch=4)
    problem = ti.FixedPoint(tanh_map)
    with torch.no_grad():
        plain = ti.solve(problem, torch.zeros_like(x), x, w, gradient=gradient).evaluations
    solution = ti.solve(problem, torch.zeros_like(x), x, w.requires_grad_(), gradient=gradient)
    assert solution.evaluations == plain + forward
    assert solution.adjoint is None
    solution.value.sum().backward()
    assert solution.adjoint.status.tolist() == [ti.Status.STEPS_TAKEN] * 4
    assert not solution.adjoint.fell_short.any()
    assert solution.adjoint.evaluations == backward


def test_the_counts_are_what_the_map_sees():
    """Every evaluation of the map, and every product with its Jacobian in the state."""
    x, w = data(batch=4)

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            seen["evaluations"] += 1
            return z.clone()

        @staticmethod
        def backward(ctx, u):
            seen["products"] += 1
            return u

    for gradient in (ti.UnrolledPhantom(steps=6), ti.Unrolled()):
        seen = {"evaluations": 0, "products": 0}
        problem = ti.FixedPoint(lambda z, x, w: tanh_map(Counted.apply(z), x, w))
        solution = ti.solve(
            problem, torch.zeros_like(x), x, w.requires_grad_(), solver=ti.FixedPointIteration(), gradient=gradient
        )
        assert solution.evaluations <= seen["evaluations"] <= solution.evaluations + 1, "one records what is captured"
        solution.value.sum().backward()
        assert solution.adjoint.evaluations == seen["products"]


@pytest.mark.parametrize("bad", [{"steps": 0}, {"damping": 0.0}, {"damping": 1.5}])
def test_bad_settings(bad):
    for estimator in (ti.UnrolledPhantom, ti.NeumannPhantom):
        with pytest.raises(ValueError, match=next(iter(bad))):
            estimator(**bad)
