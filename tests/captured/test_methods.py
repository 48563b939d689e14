"""Every method that has a compiled form, against the eager loop."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, Anderson, Broyden, FixedPoint, GradientDescent, Implicit, Minimum, NewtonKrylov, Root
from torchimplicit.captured import Capture, compilations
from torchimplicit.errors import CaptureWarning, ConvergenceWarning
from torchimplicit.solution import Status

DIM = 6


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


@pytest.fixture
def pulled(monkeypatch):
    """What the compiled backward passes have given; ``None`` for one that the eager path had to take."""
    given, pull = [], Capture.pull

    def noted(*args):
        given.append(pull(*args))
        return given[-1]

    monkeypatch.setattr(Capture, "pull", noted)
    return given


def tensors(batch=4, scale=0.8, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    w = scale * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
    return w.requires_grad_(requires_grad), x.requires_grad_(requires_grad)


def stated(kind, w):
    if kind == "map":
        return FixedPoint(lambda z, x: torch.tanh(z @ w.T + x))
    if kind == "root":
        return Root(lambda z, x: 3 * (z - torch.tanh(z @ w.T + x)))
    return Minimum(lambda z, x: torch.cosh(z @ w.T).sum(-1) + 0.5 * (z**2).sum(-1) - (z * x).sum(-1))


def both(kind, solver, linear_solver=None, batch=4):
    w, x = tensors(batch)
    found = []
    for compile in (False, True):
        solution = ti.solve(
            stated(kind, w),
            torch.zeros_like(x),
            x,
            solver=solver,
            gradient=Implicit(linear_solver=linear_solver),
            compile=compile,
        )
        u = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        found.append((solution, torch.autograd.grad(solution.value, (w, x), u)))
    return found


QUICK = [
    ("map", Broyden(rtol=1e-11), None),
    ("root", Broyden(rtol=1e-11), None),
    ("energy", GradientDescent(step_size=0.2, momentum=0.5, rtol=1e-9), ti.MINRES()),
    ("energy", LBFGS(rtol=1e-10), None),
    ("root", NewtonKrylov(rtol=1e-11), None),
]
THOROUGH = [
    ("map", Broyden(memory=5, rtol=1e-11), ti.GMRES()),
    ("map", Anderson(rtol=1e-11, damping=0.7), ti.BiCGStab()),
    ("map", Anderson(rtol=1e-11), ti.Dense()),
    ("root", Anderson(rtol=1e-11, damping=0.3, max_steps=300), ti.BiCGStab()),
    ("root", Broyden(rtol=1e-11), ti.GMRES()),
    ("energy", GradientDescent(step_size=0.2, momentum=0.5), None),
    ("energy", GradientDescent(step_size=0.2, momentum=0.5), ti.CG()),
    ("energy", Broyden(), ti.Dense()),
    ("energy", LBFGS(memory=3, rtol=1e-10), ti.CG()),
    ("energy", NewtonKrylov(), None),
    ("energy", NewtonKrylov(linear_solver=ti.MINRES()), None),
    ("map", NewtonKrylov(rtol=1e-11), ti.Dense()),
    ("root", NewtonKrylov(rtol=1e-11, linear_solver=ti.GMRES()), None),
]


def agree(kind, solver, linear_solver, rounded=0):
    (one, grads), (two, compiled) = both(kind, solver, linear_solver)
    torch.testing.assert_close(two.value, one.value, rtol=1e-9, atol=1e-9)
    assert torch.equal(two.steps, one.steps)
    assert torch.equal(two.status, one.status)
    assert two.converged.all()
    # the eager Newton's method evaluates once more where it finds that nothing is left to do
    assert one.evaluations - 1 <= two.evaluations <= one.evaluations + rounded
    torch.testing.assert_close(two.residual, one.residual, rtol=0.1, atol=1e-13)
    assert two.adjoint.converged.all()
    for a, b in zip(compiled, grads, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize(("kind", "solver", "linear_solver"), QUICK)
@pytest.mark.usefixtures("interpreted")
def test_what_is_compiled_gives_what_the_eager_loop_gives(kind, solver, linear_solver):
    agree(kind, solver, linear_solver)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "solver", "linear_solver"), THOROUGH)
@pytest.mark.usefixtures("interpreted")
def test_so_do_other_methods(kind, solver, linear_solver):
    agree(kind, solver, linear_solver)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "solver", "linear_solver"), QUICK)
def test_so_it_does_when_the_compiler_has_been_at_it(kind, solver, linear_solver):
    # of the last step, which leads to nothing but rounding, more or fewer halves may be tried
    agree(kind, solver, linear_solver, rounded=solver.halvings if isinstance(solver, NewtonKrylov) else 0)


@pytest.mark.usefixtures("interpreted")
def test_gmres_takes_the_place_of_a_series_that_is_slow():
    w, x = tensors(scale=0.99, requires_grad=True)
    found = ti.solve(
        FixedPoint(lambda z, x: torch.tanh(z @ w.T + 0.1 * x)),
        torch.zeros_like(x),
        x,
        solver=Anderson(),
        compile=True,
    )
    u = torch.ones_like(x)
    (got,) = torch.autograd.grad(found.value, x, u)
    z = found.value.detach()
    slope = 1 - z**2
    rows = [torch.linalg.solve(torch.eye(DIM) - (s[:, None] * w.detach()).T, one) for s, one in zip(slope, u)]
    expected = 0.1 * slope * torch.stack(rows)
    assert (got - expected).norm() <= 1e-7 * expected.norm()
    assert found.adjoint.evaluations < 60  # the series alone would take hundreds


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [200, 3])
def test_compiled_gmres_takes_the_steps_of_the_eager_one(pulled, dtype, steps):
    """Solved or not; on a rotation, where residuals do not fall in every other step, too."""
    w, x = (t.to(dtype).detach() for t in tensors(scale=1.5))
    turn = torch.zeros(DIM, DIM, dtype=dtype)
    turn[0::2, 1::2], turn[1::2, 0::2] = torch.eye(DIM // 2, dtype=dtype), -torch.eye(DIM // 2, dtype=dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    gradient = Implicit(linear_solver=ti.GMRES(rtol=rtol, max_steps=steps))
    for matrix in (w, 30 * turn):
        found = []
        for compile in (False, True):
            start = x.clone().requires_grad_()
            problem = FixedPoint(lambda z, x, matrix=matrix: torch.sin(z @ matrix.T) * x)
            solved = ti.solve(
                problem, torch.zeros_like(x), start, solver=Anderson(), gradient=gradient, compile=compile
            )
            for _ in range(2):  # the second pass goes to GMRES straight away
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    (grad,) = torch.autograd.grad(solved.value, start, torch.ones_like(x), retain_graph=True)
            found.append((grad, solved.adjoint))
        (grad, eager), (got, compiled) = found
        assert pulled[-1] is not None
        assert torch.equal(compiled.status, eager.status)
        assert (compiled.steps - eager.steps).abs().max() <= (0 if dtype == torch.float64 else 1)
        assert (got - grad).norm() <= 30 * rtol * grad.norm()


@pytest.mark.usefixtures("interpreted")
def test_a_saddle_is_told():
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    problem = Minimum(lambda z, x: (0.5 * a * z**2 - z * x).sum(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = ti.solve(problem, torch.zeros_like(x), x, solver=GradientDescent(atol=1e-9), compile=True)
    with pytest.warns(ConvergenceWarning, match="negative"):
        found.value.sum().backward()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("solver", [None, pytest.param(NewtonKrylov(), marks=pytest.mark.long)])
def test_energies_with_hills_lead_down(solver):
    def energy(z, x):
        return ((z**2 - 1) ** 2).sum(-1) / 4 + 0.1 * (z * x).sum(-1)

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    start = 0.3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = ti.solve(Minimum(energy), start, x, solver=solver, compile=True)
    assert found.converged.all()
    z = found.value.detach()
    assert (z * (z**2 - 1) + 0.1 * x.detach()).abs().max() < 1e-9
    assert (3 * z**2 > 1).all()
    (got,) = torch.autograd.grad(found.value.sum(), x)
    torch.testing.assert_close(got, -0.1 / (3 * z**2 - 1))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (GradientDescent(step_size=0.2, momentum=0.5, rtol=1e-10), Implicit()),
        (GradientDescent(step_size=0.2, momentum=0.5, rtol=1e-10), Implicit(linear_solver=ti.MINRES())),
        pytest.param(LBFGS(rtol=1e-10), Implicit(), marks=pytest.mark.long),
        pytest.param(LBFGS(rtol=1e-10), ti.OneStep(), marks=pytest.mark.long),
    ],
)
def test_a_plane_is_kept(solver, gradient, pulled):
    w, x = tensors()
    total = torch.tensor([1.0, 2.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 2, DIM, dtype=torch.float64).requires_grad_()
    found, before = [], compilations()
    for compile in (False, True):
        problem = Minimum(stated("energy", w).energy, constraint=ti.LinearEquality(weight, total))
        start = total.detach()[:, None] / weight.detach().sum() * torch.ones_like(x)
        with warnings.catch_warnings():
            # of an estimate, the backward pass is not compiled
            warnings.simplefilter("error" if isinstance(gradient, Implicit) else "ignore", CaptureWarning)
            solution = ti.solve(problem, start, x, solver=solver, gradient=gradient, compile=compile)
        assert solution.converged.all()
        torch.testing.assert_close((solution.value * weight.detach()).sum(1), total)
        u = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
        normal = weight.detach() / weight.detach().norm()
        u = u - (u * normal).sum(1, keepdim=True) * normal  # within the plane
        for v in (u, 2 * solution.value.detach()):
            found.append((solution, torch.autograd.grad(solution.value, (w, x, total, weight), v, retain_graph=True)))
    assert compilations() == before + 1
    if isinstance(gradient, Implicit):
        assert len(pulled) == 2
        assert None not in pulled
    for (one, grads), (two, compiled) in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(two.value, one.value, rtol=1e-9, atol=1e-9)
        assert torch.equal(two.steps, one.steps)
        for a, b in zip(compiled, grads, strict=True):
            assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["root", pytest.param("energy", marks=pytest.mark.long)])
def test_samples_that_run_away_alone_are_named(kind):
    def root(z, x):
        return torch.where(x > 5, torch.log(z - 10), z**3 - x)

    def energy(z, x):
        return torch.where(x[:, 0] > 5, torch.log(z[:, 0] - 10), ((z - x) ** 2).sum(-1))

    x = torch.tensor([[1.0], [9.0], [2.0]], dtype=torch.float64)
    problem, solver = (Root(root), NewtonKrylov()) if kind == "root" else (Minimum(energy), LBFGS())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = ti.solve(problem, torch.ones_like(x), x, solver=solver, compile=True, throw=False)
    assert found.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    with pytest.raises(ti.SolveError):
        ti.solve(problem, torch.ones_like(x), x, solver=solver, compile=True)


@pytest.mark.usefixtures("interpreted")
def test_a_mode_that_has_changed_since_is_an_error():
    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(DIM, DIM, dtype=torch.float64)

        def forward(self, z, x):
            return (0.3 if self.training else 0.2) * torch.tanh(self.inner(z) + x)

    cell, (_, x) = Cell(), tensors()
    found = ti.solve(FixedPoint(cell), torch.zeros_like(x), x, compile=True)
    assert (found.status == Status.CONVERGED).all()
    cell.eval()
    with pytest.raises(RuntimeError, match="changed since"):
        torch.autograd.grad(found.value.sum(), x, create_graph=True)


@pytest.mark.usefixtures("interpreted")
def test_a_loose_tolerance_is_no_reason_to_solve_again(pulled):
    w, x = tensors()
    loose = Implicit(linear_solver=ti.Neumann(rtol=1e-2))
    solver = ti.FixedPointIteration(rtol=1e-2)
    found = ti.solve(stated("map", w), torch.zeros_like(x), x, solver=solver, gradient=loose, compile=True)
    found.value.sum().backward()
    assert pulled[0] is not None
    assert found.adjoint.residual.max() <= 2e-2
