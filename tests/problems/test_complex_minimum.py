"""A complex minimum is its real view's, with every solver and estimator, to the last digit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(3, 3, dtype=torch.complex128, generator=GENERATOR)
MATRIX = MATRIX @ MATRIX.mH / 3 + torch.eye(3)
GIVEN = torch.randn(2, 3, dtype=torch.complex128, generator=GENERATOR)


def energy(z: Tensor, x: Tensor) -> Tensor:
    return (0.5 * z.conj() * (z @ MATRIX.T) - z.conj() * x).real.sum(1) + 0.1 * z.abs().square().square().sum(1)


def of_view(z: Tensor, x: Tensor) -> Tensor:
    return energy(torch.view_as_complex(z), torch.view_as_complex(x))


def outcome(energy, given: Tensor, solver, gradient) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)  # for estimators that draw
    x = given.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        solution = ti.solve(ti.Minimum(energy), torch.zeros_like(given), x, solver=solver, gradient=gradient)
    value = solution.value if given.is_complex() else torch.view_as_complex(solution.value)
    (slope,) = torch.autograd.grad((value.real.sin() + value.imag.cos() * value.real).sum(), x)
    return value.detach(), slope if given.is_complex() else torch.view_as_complex(slope), solution.status


DESCENT = ti.GradientDescent(step_size=0.2, max_steps=300)
SOLVERS = [
    ti.LBFGS(),
    ti.NewtonKrylov(),
    ti.NewtonKrylov(linear_solver=ti.MINRES()),
    ti.NewtonCG(),
    ti.Anderson(),
    ti.Broyden(),
    ti.FixedPointIteration(damping=0.2, max_steps=300),
    DESCENT,
]
GRADIENTS = [
    ti.Implicit(),
    ti.Implicit(linear_solver=ti.CG()),
    ti.Implicit(linear_solver=ti.GMRES()),
    ti.EquilibriumPropagation(),
    ti.DampedImplicit(),
    ti.UnrolledPhantom(steps=20, damping=0.2),
    ti.NeumannPhantom(steps=20, damping=0.2),
    ti.OneStep(),
    ti.UnbiasedNeumann(),
    ti.AdaptivePhantom(),
]


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        *((solver, None) for solver in (None, *SOLVERS)),
        *((None, gradient) for gradient in GRADIENTS),
        (ti.Broyden(), ti.SharedInverse()),
        (DESCENT, ti.Unrolled()),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_complex_minimum_is_that_of_its_real_view(solver, gradient):
    for one, other in zip(
        outcome(energy, GIVEN, solver, gradient),
        outcome(of_view, torch.view_as_real(GIVEN), solver, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
