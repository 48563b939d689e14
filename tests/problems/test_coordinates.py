"""Minima found in other coordinates: the same point, the same derivatives, a better-conditioned Hessian."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, Dense, GradientDescent, Implicit, LinearEquality, Metric, Minimum
from torchimplicit.derivatives import Derivatives
from torchimplicit.diagnostics import compare_gradients, curvature

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def overlap(*shape: int, seed: int = 5) -> torch.Tensor:
    """Positive definite, with a condition number near 1e3."""
    basis = torch.linalg.qr(normal(*shape, shape[-1], seed=seed)).Q
    values = torch.logspace(-1.5, 1.5, shape[-1], dtype=F64)
    return (basis * values[..., None, :]) @ basis.mT


def energy(z, x):
    return ((z - x) ** 2 + 0.1 * z**4).sum(1) + 0.3 * torch.tanh(z).sum(1) ** 2


METRICS = {"none": None, "shared": Metric(overlap(6)), "per sample": Metric(overlap(3, 6))}
SOLVERS = {
    "lbfgs": LBFGS(rtol=0.0, atol=1e-12, keep_trajectory=True),
    "descent": GradientDescent(step_size=0.02, momentum=0.5, rtol=0.0, atol=1e-11, max_steps=20000),
    "newton": ti.NewtonKrylov(rtol=0.0, atol=1e-12),
}


@pytest.mark.parametrize("eliminate", [False, True], ids=["projected", "eliminated"])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_minimum_and_its_gradients_do_not_depend_on_the_coordinates(solver, metric, eliminate):
    if isinstance(solver, GradientDescent) and metric is not None:
        metric = Metric(torch.diag(torch.linspace(0.5, 2, 6, dtype=F64)))
    x = normal(3, 6, seed=1).requires_grad_()
    weight = (normal(6, seed=2).abs() + 0.2).requires_grad_()
    total = torch.tensor([1.0, -2.0, 3.0], dtype=F64, requires_grad=True)

    def found(**coordinates):
        problem = Minimum(energy, LinearEquality(weight, total), **coordinates)
        solution = ti.solve(problem, torch.zeros(3, 6, dtype=F64), x, solver=solver)
        assert solution.converged.all(), solution.summary()
        loss = (solution.value * normal(3, 6, seed=3)).sum() + solution.value.square().sum()
        return solution, torch.autograd.grad(loss, (x, weight, total))

    plain, expected = found()
    other, grads = found(metric=metric, eliminate=eliminate)
    assert other.value.shape == (3, 6)
    assert (other.value - plain.value).abs().max() < 1e-9
    for got, want in zip(grads, expected, strict=True):
        assert (got - want).abs().max() < 1e-8
    for z in other.trajectory:
        assert ((weight * z).sum(1) - total).abs().max() < 1e-10


@pytest.mark.parametrize("metric", [None, METRICS["per sample"]], ids=["none", "per sample"])
def test_second_derivatives_in_an_orthonormal_basis_of_the_plane(metric):
    weight = (normal(4, seed=2).abs() + 0.2).requires_grad_()
    x = normal(2, 4, seed=1).requires_grad_()
    if metric is not None:
        metric = Metric(overlap(2, 4))

    def minimum(x, weight, total):
        problem = Minimum(energy, LinearEquality(weight, total), metric=metric, eliminate=True)
        solver = LBFGS(rtol=0.0, atol=1e-13)
        return ti.solve(problem, torch.zeros(2, 4, dtype=F64), x, solver=solver, gradient=Implicit()).value

    total = torch.tensor(1.5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(minimum, (x, weight, total), atol=1e-5)
    assert torch.autograd.gradgradcheck(minimum, (x, weight, total), atol=1e-4)


def test_forward_mode_and_vmap_in_a_metric():
    metric = Metric(overlap(6))
    x = normal(3, 6, seed=1)

    def minimum(x, metric=metric):
        problem = Minimum(energy, LinearEquality(torch.ones(6, dtype=F64), 1.0), metric=metric, eliminate=True)
        return ti.solve(problem, torch.zeros(3, 6, dtype=F64), x, solver=LBFGS(rtol=0.0, atol=1e-12)).value

    _, tangent = torch.func.jvp(minimum, (x,), (normal(3, 6, seed=4),))
    jacobian = torch.func.jacrev(minimum)(x)
    assert torch.allclose(torch.einsum("bicj,cj->bi", jacobian, normal(3, 6, seed=4)), tangent, atol=1e-8)
    many = torch.func.vmap(minimum)(torch.stack((x, 2 * x)))
    assert torch.allclose(many[1], minimum(2 * x), atol=1e-8)


def test_eigenvalues_and_condition_are_those_of_the_metric():
    s = overlap(6)
    hessian = torch.diag(torch.linspace(1, 2, 6, dtype=F64))
    root = torch.linalg.cholesky(s)
    mixed = root @ hessian @ root.mT  # well conditioned in the metric alone

    problem = Minimum(lambda z: 0.5 * (z @ mixed * z).sum(1), metric=Metric(s))
    z = torch.zeros(1, 6, dtype=F64)
    inverse = torch.linalg.inv(s)
    expected = torch.linalg.eigvals(inverse @ mixed).real.sort().values
    figures = curvature(problem, z)
    assert torch.allclose(torch.stack((figures.least[0], figures.largest[0])), expected[[0, -1]], rtol=1e-9)
    assert curvature(problem.own_coordinates(), z).condition[0] > 10 * figures.condition[0]


def test_a_pytree_that_is_one_system():
    state = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    goal = {"a": normal(2, 2), "b": normal(3)}

    def distance(z):
        return (z["a"] - goal["a"]).square().sum() + 2 * (z["b"] - goal["b"]).square().sum()

    ones = {"a": torch.ones(2, 2, dtype=F64), "b": torch.ones(3, dtype=F64)}
    constraint = LinearEquality(ones, 2.0)
    plain = ti.solve(Minimum(distance, constraint, batched=False), state).value
    problem = Minimum(distance, constraint, batched=False, metric=Metric(overlap(7)), eliminate=True)
    other = ti.solve(problem, state).value
    assert torch.allclose(other["a"], plain["a"], atol=1e-5)
    assert torch.allclose(other["b"], plain["b"], atol=1e-5)


def test_rows_leave_the_batch_under_a_shared_metric():
    calls = []

    def counted(z, x):
        calls.append(len(z))
        return energy(z, x)

    x = torch.cat((normal(3, 6, seed=1), torch.zeros(1, 6, dtype=F64)))
    for metric, least in ((Metric(overlap(6)), 1), (Metric(overlap(4, 6)), 4)):
        calls.clear()
        problem = Minimum(counted, rowwise=True, metric=metric)
        solution = ti.solve(problem, torch.zeros(4, 6, dtype=F64), x)
        assert solution.converged.all()
        assert (min(calls) == 4) == (least == 4)


def test_equilibrium_propagation_and_diagnostics_in_a_metric():
    x = normal(3, 6, seed=1).requires_grad_()
    for eliminate in (False, True):
        constraint = LinearEquality(torch.ones(6, dtype=F64), 1.0)
        problem = Minimum(energy, constraint, metric=Metric(overlap(6)), eliminate=eliminate)
        solver = LBFGS(rtol=0.0, atol=1e-11)
        grads = []
        for gradient in (Implicit(linear_solver=Dense()), ti.EquilibriumPropagation(nudge=1e-3)):
            value = ti.solve(problem, torch.zeros(3, 6, dtype=F64), x, solver=solver, gradient=gradient).value
            grads.append(torch.autograd.grad(value.square().sum(), x)[0])
        assert torch.nn.functional.cosine_similarity(*[g.flatten() for g in grads], dim=0) > 1 - 1e-6
        compared = compare_gradients(problem, value.detach(), x, gradient=Implicit(), cotangent=torch.ones_like(value))
        assert compared.cosine > 1 - 1e-9


def test_a_start_off_the_plane_is_put_on_it():
    problem = Minimum(energy, LinearEquality(torch.ones(6, dtype=F64), 1.0), metric=Metric(overlap(6)), eliminate=True)
    solution = ti.solve(problem, 100 + normal(2, 6), normal(2, 6, seed=1))
    assert torch.allclose(solution.value.sum(1), torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3), r"\[dim, dim\]"),
        (torch.ones(3, 4), r"\[dim, dim\]"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 1.0], [1.0, 1.0]]), "not positive definite"),
    ],
)
def test_what_is_no_metric(matrix, message):
    with pytest.raises(ValueError, match=message):
        Metric(matrix)


def test_coordinates_that_do_not_fit():
    with pytest.raises(TypeError, match="Metric"):
        Minimum(energy, metric=overlap(6))
    with pytest.raises(ValueError, match="no constraint"):
        Minimum(energy, eliminate=True)
    with pytest.raises(ValueError, match="7 numbers"):
        ti.solve(Minimum(energy, metric=Metric(overlap(6))), torch.zeros(2, 7, dtype=F64), normal(2, 7))


def test_derivatives_refuse_a_plane_that_moves():
    x = normal(2, 6).requires_grad_()
    constraint = LinearEquality(torch.ones(6, dtype=F64), 1.0)
    solution = ti.solve(Minimum(energy, constraint, eliminate=True), torch.zeros(2, 6, dtype=F64), x)
    with pytest.raises(ValueError, match="eliminate"):
        Derivatives(solution)


def test_derivatives_in_a_metric():
    x = normal(2, 6).requires_grad_()
    constraint = LinearEquality(torch.ones(6, dtype=F64), 1.0)
    found = []
    for metric in (None, Metric(overlap(6))):
        solver = LBFGS(rtol=0.0, atol=1e-12)
        solution = ti.solve(Minimum(energy, constraint, metric=metric), torch.zeros(2, 6, dtype=F64), x, solver=solver)
        at = Derivatives(solution)
        found.append((at.jacobian(), *at.along((normal(2, 6, seed=3),), order=2)))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-7)
