"""Theorem 1 of the phantom-gradient paper, against dense singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.diagnostics import ascent_condition, compare_gradients

F64 = torch.float64
N = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def case(radius: float, samples: int = 1, seed: int = 0) -> tuple[ti.FixedPoint, Tensor, Tensor, Tensor, Tensor]:
    """z = J z + D^T theta, whose D is well conditioned: problem, solution, theta, J, D."""
    j = radius * torch.linalg.qr(normal(N, N, seed=seed)).Q
    d = torch.linalg.qr(normal(N * samples, N * samples, seed=seed + 1)).Q
    d = d @ torch.diag(torch.linspace(1, 1.5, N * samples, dtype=F64))
    theta = normal(N * samples, seed=seed + 2).requires_grad_()
    problem = ti.FixedPoint(lambda z, t: z @ j.mT + (t @ d).reshape(samples, N))
    z = torch.linalg.solve(torch.eye(N, dtype=F64) - j, (theta.detach() @ d).reshape(samples, N).mT).mT
    return problem, z, theta, j, d


@pytest.mark.parametrize("samples", [1, 2])
def test_both_sides_are_the_dense_ones(samples):
    problem, z, theta, j, d = case(0.6, samples)
    k, damping = 3, 0.7
    found = ascent_condition(problem, z, theta, gradient=ti.NeumannPhantom(steps=k, damping=damping))
    b = damping * j + (1 - damping) * torch.eye(N, dtype=F64)
    tail = torch.block_diag(*[torch.linalg.matrix_power(b, k)] * samples).mT
    values = torch.linalg.svdvals(d)
    assert found.left == pytest.approx(float(torch.linalg.matrix_norm(d @ tail, 2)), rel=1e-8)
    assert found.series_left == pytest.approx(float(torch.linalg.matrix_norm(tail, 2)), rel=1e-8)
    assert found.sigma_max == pytest.approx(float(values[0]), rel=1e-8)
    assert found.sigma_min == pytest.approx(float(values[-1]), rel=1e-8)
    assert found.right == pytest.approx(float(values[-1] ** 2 / values[0]), rel=1e-8)
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 6, 12])
def test_what_it_claims_holds_for_every_cotangent(steps):
    problem, z, theta, _, _ = case(0.6)
    gradient = ti.NeumannPhantom(steps=steps, damping=1.0)
    found = ascent_condition(problem, z, theta, gradient=gradient)
    assert found.series_holds <= found.holds
    cosines = [
        compare_gradients(problem, z, theta, gradient=gradient, cotangent=normal(1, N, seed=seed)).cosine
        for seed in range(20)
    ]
    assert min(cosines) >= found.cosine
    if found.holds:
        assert min(cosines) > 0
    assert found.holds == (steps >= 3)


def test_the_condition_is_not_necessary():
    problem, z, theta, _, _ = case(0.6)
    found = ascent_condition(problem, z, theta, gradient=ti.OneStep())
    assert not found.holds
    compared = compare_gradients(problem, z, theta, gradient=ti.OneStep(), cotangent=normal(1, N, seed=9))
    assert compared.ascent


def test_the_tail_beyond_contraction():
    problem, z, theta, _, _ = case(1.3)
    found = ascent_condition(problem, z, theta, gradient=ti.NeumannPhantom(steps=4, damping=1.0))
    assert found.series_left == pytest.approx(1.3**4, rel=1e-6)
    assert found.cosine == -1.0


def test_fewer_parameters_than_states():
    scale = torch.tensor([0.5], dtype=F64, requires_grad=True)
    problem = ti.FixedPoint(lambda z, s: s * torch.tanh(z) + 1)
    z = ti.solve(problem, torch.zeros(1, N, dtype=F64), scale).value
    found = ascent_condition(problem, z, scale, gradient=ti.Implicit(linear_solver=ti.Dense()))
    assert found.sigma_min == 0
    assert math.isinf(found.condition)
    assert not found.holds


def test_the_exact_gradient_satisfies_it():
    problem, z, theta, _, _ = case(0.9)
    found = ascent_condition(problem, z, theta, gradient=ti.Implicit(linear_solver=ti.Dense()))
    assert found.left < 1e-12
    assert found.holds
    assert found.series_holds
    assert found.cosine == pytest.approx(1)


def test_refuses_large_states():
    problem, z, theta, _, _ = case(0.9)
    with pytest.raises(ValueError, match="more than the limit of 5"):
        ascent_condition(problem, z, theta, gradient=ti.OneStep(), limit=5)
