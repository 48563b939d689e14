"""The one rule by which samples are solved, against dense references in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, Anderson, Broyden, FixedPoint, GradientDescent, Minimum, NewtonKrylov, Root

F64, F32 = torch.float64, torch.float32


def zakharov(z):
    a = (0.5 * torch.arange(1, z.shape[-1] + 1).to(z) * z).sum(-1)
    return z.square().sum(-1) + a**2 + a**4


def himmelblau(z):
    return (z[..., 0] ** 2 + z[..., 1] - 11) ** 2 + (z[..., 0] + z[..., 1] ** 2 - 7) ** 2


def variably_dimensioned(z):
    s = (torch.arange(1, z.shape[-1] + 1).to(z) * (z - 1)).sum(-1)
    return (z - 1).square().sum(-1) + s**2 + s**4


FAR = {
    "zakharov": (zakharov, [600.0, 700.0, 200.0, 100.0, 90.0, 1e4]),
    "himmelblau": (himmelblau, [92.0, 0.001]),
    "variably dimensioned": (variably_dimensioned, [1 - k / 10 for k in range(1, 11)]),
}


@pytest.mark.parametrize("solver", [LBFGS(), NewtonKrylov(max_steps=200)], ids=["lbfgs", "newton"])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", FAR)
def test_a_minimum_far_from_a_steep_start(name, dtype, solver):
    energy, z0 = FAR[name]
    z0 = torch.tensor(z0, dtype=dtype)
    solution = ti.solve(Minimum(energy, batched=False), z0, solver=solver)
    assert solution.converged
    z = solution.value.double()
    slope = torch.func.grad(energy)(z)
    hessian = torch.func.hessian(energy)(z)
    # Newton's step from there is short against the state, or against the start where the minimum is at zero
    left = torch.linalg.solve(hessian, slope).norm()
    assert left <= 100 * torch.finfo(dtype).eps ** (2 / 3) * max(z.norm(), 1e-3 * z0.norm())
    assert energy(z) <= 1e-4 * (1 if dtype == F32 else 1e-8)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("start", [1000.0, 100.0, -30.0])
def test_a_root_far_from_a_steep_start(start, dtype):
    x = torch.tensor(1e-3, dtype=dtype, requires_grad=True)
    z0 = torch.tensor(start, dtype=dtype)
    solution = ti.solve(Root(lambda z, x: z**5 + z - x, batched=False), z0, x, solver=NewtonKrylov(max_steps=100))
    assert solution.converged
    assert abs(solution.value.item() - 1e-3) <= 1e-3 * 1e-4
    (slope,) = torch.autograd.grad(solution.value, x)
    assert slope.item() == pytest.approx(1.0, rel=1e-4)


def test_an_exponential_from_afar():
    solution = ti.solve(Root(lambda z: torch.exp(z) - 1, batched=False), torch.tensor(10.0))
    assert solution.converged
    assert abs(solution.value.item()) <= 1e-6


@pytest.mark.parametrize("solver", [NewtonKrylov(max_steps=200), Broyden(max_steps=300), Anderson(max_steps=300)])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_no_large_equation_hides_a_small_one(scale, solver):
    """Brown's almost linear function: the last equation is of size 1e27 where the others are of size 10."""

    def f(z):
        return torch.cat((z[:-1] + z.sum() - 41, (z.prod() - 1)[None]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        solution = ti.solve(
            Root(f, batched=False), torch.full((40,), 0.5 * scale, dtype=F64), solver=solver, throw=False
        )
    if solution.converged:
        assert f(solution.value).norm() <= 1e-6


@pytest.mark.parametrize(("dtype", "units"), [(F64, (1.0, 1e-8, 1e-17, 1e12)), (F32, (1.0, 1e-4, 1e-8, 1e6))])
@pytest.mark.parametrize("solver", [LBFGS(), NewtonKrylov(), "root", "broyden"])
def test_solutions_of_every_size(dtype, units, solver):
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=g)).Q
    hessian = basis @ torch.diag(torch.linspace(0.3, 3.0, 6, dtype=F64)) @ basis.T
    b = torch.randn(4, 6, dtype=F64, generator=g)
    exact, h = torch.linalg.solve(hessian, b.T).T, hessian.to(dtype)
    steps = []
    for unit in units:
        v = (unit * b).to(dtype)
        if isinstance(solver, str):
            problem = Root(lambda z, v=v: z @ h - v)
            found = ti.solve(problem, torch.zeros_like(v), solver=None if solver == "root" else Broyden())
        else:
            problem = Minimum(lambda z, v=v: (0.5 * (z @ h) * z - v * z).sum(1))
            found = ti.solve(problem, torch.zeros_like(v), solver=solver)
        assert found.converged.all(), found.summary()
        assert (found.value.double() / unit - exact).norm() <= 100 * torch.finfo(dtype).eps ** (2 / 3) * exact.norm()
        steps.append(found.steps)
    assert all((other - steps[0]).abs().max() <= 1 for other in steps)


@pytest.mark.parametrize("solver", [None, Broyden()])
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
def test_the_unit_of_a_root(unit, solver):
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None].expand(5, 3) * torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def solve(unit):
        return ti.solve(Root(lambda z: unit * (z + z**3 + 0.3 * z.roll(1, 1) - x)), torch.ones_like(x), solver=solver)

    one, other = solve(1.0), solve(unit)
    assert one.converged.all()
    assert torch.equal(one.status, other.status)
    assert (one.steps - other.steps).abs().max() <= 1
    torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [LBFGS(), NewtonKrylov(), Broyden(), Anderson(damping=0.05), GradientDescent()])
@pytest.mark.parametrize("seed", range(4))
def test_a_start_at_the_solution_takes_no_step(seed, solver):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(10, 3, dtype=F64, generator=g), 100 * torch.randn(10, dtype=F64, generator=g)

    def ridge(z):
        return 0.5 * (a @ z - b).square().mean() + 2.5 * z.square().sum()

    exact = torch.linalg.solve(a.T @ a + 50 * torch.eye(3, dtype=F64), a.T @ b)
    problems = [Minimum(ridge, batched=False)]
    if not isinstance(solver, LBFGS | GradientDescent):
        problems.append(Root(torch.func.grad(ridge), batched=False))
    for problem in problems:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution = ti.solve(problem, exact, solver=solver)
        assert solution.converged
        assert solution.steps == 0
        assert torch.equal(solution.value, exact)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_free_minimum_on_the_plane(dtype):
    c = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=dtype)

    def energy(z):
        return (z - c).square().sum() + (z - c).pow(4).sum() + 0.3 * (z - c)[0] * (z - c)[1]

    problem = Minimum(energy, constraint=ti.LinearEquality(torch.ones(10, dtype=dtype), c.sum()), batched=False)
    for solver in (LBFGS(), NewtonKrylov()):
        solution = ti.solve(problem, torch.zeros(10, dtype=dtype), solver=solver)
        assert solution.converged
        assert (solution.value - c).abs().max() <= 10 * torch.finfo(dtype).eps ** (2 / 3)


def test_small_and_large_leaves():
    def f(z, x):
        return 1e6 + 0 * z[0] + 0 * x, 0.9 * z[1] + x

    x = torch.full((1, 1), 0.3)
    for solver in (Anderson(), Broyden(), NewtonKrylov(), ti.FixedPointIteration(max_steps=500)):
        solution = ti.solve(FixedPoint(f), (torch.full((1, 1), 1e6), torch.zeros(1, 1)), x, solver=solver)
        assert solution.converged.all()
        assert solution.value[1].item() == pytest.approx(3.0, rel=1e-3)


def test_a_multiplier_of_zero():
    """A root with a leaf that vanishes at the solution, where nothing but the rounding of the other is left of it."""

    def f(s):
        z, multiplier = s
        return torch.tanh(z) + z - 1 + multiplier, z.sum(1, keepdim=True) - 4 * root

    root = ti.solve(Root(lambda z: torch.tanh(z) + z - 1), torch.zeros(1, 1, dtype=F64)).value
    start = (torch.zeros(2, 4, dtype=F64), torch.ones(2, 1, dtype=F64))
    solution = ti.solve(Root(f), start)
    assert solution.converged.all(), solution.summary()
    assert solution.value[1].abs().max() <= 1e-12


@pytest.mark.parametrize("solver", [NewtonKrylov(), Broyden(), Anderson()])
def test_a_solution_at_zero(solver):
    z0 = torch.tensor([[3.0, -2.0]], dtype=F64)
    solution = ti.solve(Root(lambda z: torch.atan(z) + 0.1 * z), z0, solver=solver)
    assert solution.converged.all(), solution.summary()
    assert solution.value.abs().max() <= 1e-10


def test_claims_hold_by_the_documented_rule():
    """Roots and minima of many shapes: where CONVERGED, the residual is small against what the Jacobian makes of the
    state, by the matrix itself."""
    rtol = torch.finfo(F64).eps ** (2 / 3)
    claims = 0
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(5, 5, generator=g, dtype=F64)
        x = 10 ** (4 * torch.rand(3, 1, generator=g, dtype=F64) - 2) * torch.randn(3, 5, generator=g, dtype=F64)

        def f(z, w=w, x=x):
            return z + torch.tanh(z @ w) - x

        def energy(z, w=w, x=x):
            return (0.5 * z * z + 0.3 * torch.sin(z @ w) - x * z).sum(-1)

        cases = [(Root(f), f, s) for s in (NewtonKrylov(), Broyden(max_steps=200), Anderson(max_steps=200))]
        cases += [(Minimum(energy), torch.func.grad(lambda z: energy(z).sum()), s) for s in (LBFGS(), NewtonKrylov())]
        for problem, residual, solver in cases:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                solution = ti.solve(problem, torch.zeros_like(x), solver=solver, throw=False)
            z = solution.value
            r = residual(z)
            for i in solution.converged.nonzero().flatten().tolist():
                claims += 1
                matrix = torch.func.jacrev(residual)(z)[i, :, i]
                terms = torch.linalg.matrix_norm(matrix, 2) * z[i].norm()
                assert r[i].norm() <= 1.01 * rtol * terms
    assert claims > 100


def test_tolerances_of_leaves_are_checked():
    with pytest.raises(ValueError, match=r"Anderson\.rtol is .*finite number of at least zero"):
        Anderson(rtol={"a": -1.0})
    with pytest.raises(TypeError, match=r"Anderson\.atol must be a number, not str"):
        Anderson(atol=(1.0, "2"))
    with pytest.raises(ValueError, match="holds no number"):
        Anderson(rtol=())
    problem = Minimum(lambda z: z.square().sum(1), metric=ti.Metric(2 * torch.eye(2)))
    with pytest.raises(ValueError, match="coordinates that mix its leaves"):
        ti.solve(problem, torch.ones(1, 2), solver=LBFGS(rtol=(1e-3,)))


def test_an_absolute_tolerance_for_each_leaf():
    def f(z):
        return 0.5 * z[0] + 1, 0.5 * z[1] + 1

    start = (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 1, dtype=F64))
    both = ti.solve(FixedPoint(f), start, solver=ti.FixedPointIteration(rtol=0.0, atol=(1e-1, 1e-9)))
    assert both.converged.all()
    assert (both.value[1] - 2).abs().max() <= 2.1e-9
    assert both.steps.max() == math.ceil(math.log2(1e9))


@pytest.mark.parametrize("solver", [ti.FixedPointIteration(), Anderson(), Broyden(), NewtonKrylov()])
def test_a_vector_of_features_as_long_as_the_batch(solver):
    s = torch.tensor([0.9, 0.3, 0.2, 0.1], dtype=F64)
    x = torch.zeros(4, 4, dtype=F64)
    x[3] = torch.tensor([1.0, -0.7, 0.4, 0.9])
    problem = FixedPoint(lambda z, x, s: torch.tanh(z * s + x), rowwise=True)
    with pytest.raises(ValueError, match=r"shapes .*\(4,\) taken to carry the batch.*rowwise=True"):
        ti.solve(problem, torch.zeros_like(x), x, s, solver=solver)
    per_sample = FixedPoint(lambda z, x, s: torch.tanh(z * s[:, None] + x), rowwise=True)
    assert ti.solve(per_sample, torch.zeros_like(x), x, s, solver=solver).converged.all()


def test_a_residual_without_terms_is_unknown():
    # what the absolute tolerance lets pass has no relative residual where the map's value is zero
    nought = ti.solve(FixedPoint(lambda z: 0 * z), torch.ones(2, 3, dtype=F64), solver=Anderson(atol=2.0))
    assert nought.converged.all()
    assert nought.residual.isnan().all()
    assert "residual unknown" in nought.summary()
    # of leaves, the largest that is known
    both = ti.solve(
        FixedPoint(lambda z: (0 * z[0], 0.5 * z[1] + 1)),
        (torch.ones(2, 3, dtype=F64), torch.ones(2, 1, dtype=F64)),
        solver=Anderson(rtol=0.0, atol=2.0),
    )
    torch.testing.assert_close(both.residual, torch.full((2,), 0.5 / 1.5, dtype=F64))
    # and none where nothing is left
    assert (ti.solve(FixedPoint(lambda z: 0 * z), torch.zeros(2, 3, dtype=F64)).residual == 0).all()
