"""An estimate beside the exact gradient, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.diagnostics import compare_gradients, probe_gradient

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def case() -> tuple[ti.FixedPoint, Tensor, Tensor, Tensor]:
    """A problem that captures its weight, its solution, its argument, the weight."""
    w = (0.5 * normal(5, 5) / 2).requires_grad_()
    x = normal(3, 5, seed=1).requires_grad_()
    problem = ti.FixedPoint(lambda z, x: torch.tanh(z @ w.T + x))
    z = ti.solve(problem, torch.zeros(3, 5, dtype=F64), x, solver=ti.Anderson(rtol=1e-14)).value.detach()
    return problem, z, x, w


def blocks(problem: ti.FixedPoint, z: Tensor, x: Tensor) -> list[Tensor]:
    """The Jacobian of each sample."""
    return [
        torch.func.jacrev(lambda z, i=i: problem.f(z[None], x[i : i + 1])[0])(z[i]) for i in range(len(z))
    ]  # fmt: skip


def test_the_adjoint_vector_is_the_matrix_times_the_cotangent():
    problem, z, x, w = case()
    u = normal(3, 5, seed=2)
    eye = torch.eye(5, dtype=F64)
    for gradient, matrix in (
        (ti.OneStep(), lambda j: eye),
        (ti.NeumannPhantom(steps=2, damping=0.5), lambda j: 0.5 * (eye + 0.5 * j + 0.5 * eye)),
        (ti.UnrolledPhantom(steps=2, damping=0.5), lambda j: 0.5 * (eye + 0.5 * j + 0.5 * eye)),
        (ti.Implicit(linear_solver=ti.Dense()), lambda j: torch.linalg.inv(eye - j)),
    ):
        found = probe_gradient(problem, z, x, gradient=gradient, cotangent=u)
        for i, j in enumerate(blocks(problem, z, x)):
            g = matrix(j).T @ u[i]
            torch.testing.assert_close(found.adjoint[i], g, rtol=1e-8, atol=1e-10)
            residual = (u[i] - (eye - j).T @ g).norm() / u[i].norm()
            torch.testing.assert_close(found.adjoint_residual[i], residual, rtol=1e-6, atol=1e-9)
    assert len(found.gradients) == 2
    assert found.gradients[0].shape == x.shape
    assert found.gradients[1].shape == w.shape


def test_the_comparison_is_that_of_two_training_steps():
    problem, z, x, w = case()
    u = normal(3, 5, seed=2)
    found = compare_gradients(problem, z, x, gradient=ti.OneStep(), cotangent=u, wrt=(w,))
    one, exact = (
        torch.autograd.grad(
            ti.solve(problem, torch.zeros_like(z), x, solver=ti.Anderson(rtol=1e-14), gradient=g).value, w, u
        )[0]
        for g in (ti.OneStep(), ti.Implicit(linear_solver=ti.Dense()))
    )
    assert found.cosine == pytest.approx(float((one * exact).sum() / one.norm() / exact.norm()), rel=1e-6)
    assert found.norm_ratio == pytest.approx(float(one.norm() / exact.norm()), rel=1e-6)
    assert found.relative_error == pytest.approx(float((one - exact).norm() / exact.norm()), rel=1e-6)
    assert found.ascent
    assert found.exact_residual < 1e-10
    assert w.grad is None
    assert x.grad is None


def test_the_cotangent_may_be_a_loss():
    problem, z, x, _ = case()
    a = compare_gradients(problem, z, x, gradient=ti.OneStep(), cotangent=lambda z: z.sin().sum())
    b = compare_gradients(problem, z, x, gradient=ti.OneStep(), cotangent=z.cos())
    assert a.cosine == pytest.approx(b.cosine, rel=1e-12)


def test_a_small_relative_error_bounds_the_cosine():
    problem, z, x, _ = case()
    for steps in (1, 2, 4, 8):
        gradient = ti.NeumannPhantom(steps=steps, damping=0.7)
        found = compare_gradients(problem, z, x, gradient=gradient, cotangent=normal(3, 5, seed=steps))
        assert found.relative_error < 1
        assert found.cosine >= (1 - found.relative_error**2) ** 0.5


def test_a_root_and_a_minimum():
    problem, z, x, w = case()
    u = normal(3, 5, seed=2)
    root = ti.Root(lambda z, x: z - problem.f(z, x))
    of_root, of_map = (probe_gradient(p, z, x, gradient=ti.OneStep(), cotangent=u) for p in (root, problem))
    torch.testing.assert_close(of_root.adjoint, of_map.adjoint)
    torch.testing.assert_close(of_root.adjoint_residual, of_map.adjoint_residual)
    m = torch.eye(5, dtype=F64) + w.detach() @ w.detach().T
    p = ti.Minimum(lambda z, x: 0.5 * ((z @ m) * z).sum(1) - (z * x).sum(1))
    at = torch.linalg.solve(m, x.detach().T).T
    exact = probe_gradient(p, at, x, gradient=ti.Implicit(linear_solver=ti.Dense()), cotangent=u)
    torch.testing.assert_close(exact.adjoint, torch.linalg.solve(m, u.T).T)
    assert float(exact.adjoint_residual.max()) < 1e-12
    eqprop = compare_gradients(p, at, x, gradient=ti.EquilibriumPropagation(nudge=1e-3), cotangent=u)
    assert eqprop.cosine > 1 - 1e-6
    assert eqprop.norm_ratio == pytest.approx(1, abs=1e-3)


def test_trees_and_modules():
    cell = nn.Linear(4, 4).double()
    with torch.no_grad():
        cell.weight.mul_(0.5 / torch.linalg.matrix_norm(cell.weight, 2))

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        out = torch.tanh(cell(torch.cat([z["a"], z["b"]], dim=1)))
        return {"a": out[:, :1], "b": out[:, 1:]}

    problem = ti.FixedPoint(f)
    z0 = {"a": torch.zeros(2, 1, dtype=F64), "b": torch.zeros(2, 3, dtype=F64)}
    z = ti.solve(problem, z0).value
    u = {"a": normal(2, 1), "b": normal(2, 3)}
    found = compare_gradients(problem, z, gradient=ti.AdaptivePhantom(tolerance=1e-3), cotangent=u)
    assert found.cosine > 1 - 1e-5
    assert found.adjoint_residual <= 1e-3


def test_refuses():
    problem, z, x, _ = case()
    for gradient in (ti.SharedInverse(), ti.Unrolled(), ti.Reversible()):
        with pytest.raises(ValueError, match="needs the steps of the solver"):
            compare_gradients(problem, z, x, gradient=gradient, cotangent=z)
    with pytest.raises(ValueError, match="nothing to differentiate with respect to"):
        compare_gradients(ti.FixedPoint(torch.cos), z, gradient=ti.OneStep(), cotangent=z)
