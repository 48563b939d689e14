"""Numbers whose squares underflow or overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit.solution import Status

F64 = torch.float64


def data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = 0.5 * torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64)).Q
    return w.to(dtype), torch.randn(4, 3, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 1e-26), (torch.float32, 1e20), (F64, 1e-200), (F64, 1e160)]
)
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("fixed_point", None),
        ("fixed_point", ti.FixedPointIteration()),
        ("fixed_point", ti.Broyden()),
        ("root", None),
        ("root", ti.Broyden()),
        ("root", ti.NewtonKrylov()),
        ("minimum", None),
        ("minimum", ti.LBFGS()),
        ("minimum", ti.NewtonCG()),
        ("minimum", ti.NewtonKrylov()),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_small_and_large_as_a_whole(kind: str, solver: Any, dtype: torch.dtype, unit: float) -> None:
    w, x = data(dtype)
    x.requires_grad_()
    reference = x.detach().to(F64).requires_grad_()
    z = torch.zeros(4, 3, dtype=F64)
    problem: Any
    if kind == "minimum":
        problem = ti.Minimum(
            lambda z, x: unit * (0.5 * (z / unit) ** 2 + 0.25 * (z / unit) ** 4 - z / unit * x).sum(dim=1)
        )
        for _ in range(60):
            z = z - (z + z**3 - reference) / (1 + 3 * z**2)
    else:
        kinds = {"fixed_point": ti.FixedPoint, "root": ti.Root}
        image = lambda z, x: unit * torch.tanh(z / unit @ w.T + x)  # noqa: E731
        f = image if kind == "fixed_point" else lambda z, x: (z - image(z, x)) / unit
        problem = kinds[kind](f)
        for _ in range(200):
            z = torch.tanh(z @ w.to(F64).T + reference)
    cotangent = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    (expected,) = torch.autograd.grad(z, reference, cotangent)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for start in (0.3, 0.0):
        if start == 0 and unit > 1:  # the first norm is infinite: said so
            continue
        solution = ti.solve(problem, torch.full((4, 3), start * unit, dtype=dtype), x, solver=solver)
        assert solution.converged.all(), solution.summary()
        torch.testing.assert_close(solution.value.detach().to(F64) / unit, z.detach(), rtol=tolerance, atol=tolerance)
        (got,) = torch.autograd.grad(solution.value, x, (cotangent / unit).to(dtype))
        torch.testing.assert_close(got.to(F64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 1e-26), (torch.float32, 1e20), (F64, 1e-200), (F64, 1e160)]
)
def test_on_a_plane(dtype: torch.dtype, unit: float) -> None:
    w, x = data(dtype)
    x.requires_grad_()
    problem = ti.Minimum(
        lambda z, x: unit * (0.5 * (z / unit) ** 2 + 0.1 * (z / unit @ w) ** 2 - z / unit * x).sum(dim=1),
        ti.LinearEquality(torch.ones(3, dtype=dtype), unit),
    )
    here = x.detach().to(F64).requires_grad_()
    inverse = torch.linalg.inv(torch.eye(3, dtype=F64) + 0.2 * w.to(F64) @ w.to(F64).T)
    free, along = here @ inverse, inverse.sum(dim=1)
    expected = free - (free.sum(dim=1, keepdim=True) - 1) / along.sum() * along
    cotangent = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    (slope,) = torch.autograd.grad(expected, here, cotangent)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    solution = ti.solve(problem, torch.full((4, 3), 0.3 * unit, dtype=dtype), x)
    assert solution.converged.all(), solution.summary()
    torch.testing.assert_close(
        solution.value.detach().to(F64) / unit, expected.detach(), rtol=tolerance, atol=tolerance
    )
    (got,) = torch.autograd.grad(solution.value, x, (cotangent / unit).to(dtype))
    torch.testing.assert_close(got.to(F64), slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "state", "residual"),
    [
        (torch.float32, 1e-26, 1.0),
        (torch.float32, 1e20, 1.0),
        (torch.float32, 1.0, 1e-26),
        (torch.float32, 1.0, 1e-12),
        (F64, 1e-200, 1.0),
        (F64, 1e160, 1.0),
        (F64, 1.0, 1e-200),
    ],
)
def test_least_squares(dtype: torch.dtype, state: float, residual: float) -> None:
    w, x = data(dtype)
    problem = ti.LeastSquares(lambda z, x: residual * torch.cat((z / state - x, z / state @ w), dim=1))
    solution = ti.solve(problem, torch.full((4, 3), 0.3 * state, dtype=dtype), x)
    assert solution.converged.all(), solution.summary()
    expected = x.to(F64) @ torch.linalg.inv(torch.eye(3, dtype=F64) + w.to(F64) @ w.to(F64).T)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(solution.value.to(F64) / state, expected, rtol=tolerance, atol=tolerance)


FALLING = {
    "exponential": lambda z: torch.exp(-z).sum(dim=1),
    "logistic": lambda z: torch.nn.functional.softplus(-z).sum(dim=1),
    "algebraic": lambda z: (1 / (1 + z * z)).sum(dim=1),
}


@pytest.mark.parametrize("which", FALLING)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "solver",
    [None, ti.LBFGS(), ti.NewtonCG(), ti.NewtonKrylov()],
    ids=lambda s: "default" if s is None else type(s).__name__,
)
def test_an_energy_without_a_minimum_is_not_solved(which: str, dtype: torch.dtype, solver: Any) -> None:
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(
            ti.Minimum(FALLING[which]), torch.full((2, 2), 0.5, dtype=dtype), solver=solver, throw=False
        )
    assert not solution.converged.any(), solution.summary()


def test_compiled_and_eager_say_the_same_of_it() -> None:
    start = torch.full((2, 2), 0.5)
    solver = ti.GradientDescent(step_size=10.0, rtol=1e-4)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(ti.Minimum(FALLING["exponential"]), start, solver=solver)
    assert solution.status.tolist() == [Status.BREAKDOWN] * 2


def test_a_solution_at_zero_is_solved() -> None:
    for dtype in (torch.float32, F64):
        x = torch.full((2, 1), 0.5, dtype=dtype)
        found = ti.solve(ti.FixedPoint(lambda z, x: z * x), torch.full((2, 3), 1e-15, dtype=dtype), x)
        assert found.converged.all()
        assert ti.solve(ti.FixedPoint(lambda z, x: z * x), torch.zeros(2, 3, dtype=dtype), x).converged.all()


def test_a_row_at_rest_that_the_others_move_goes_on() -> None:
    # the first row alone moves at first, and moves the second, whose residual was zero, as its terms were
    def f(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(z + z.flip(0)) + x

    x = torch.tensor([[1.0], [0.0]], dtype=F64, requires_grad=True)
    reference = x.detach().requires_grad_()
    z = torch.zeros(2, 1, dtype=F64)
    for _ in range(300):
        z = f(z, reference)
    for start in (torch.zeros(2, 1, dtype=F64), {"a": torch.zeros(2, 1, dtype=F64)}):
        tree = isinstance(start, dict)
        g = (lambda z, x: {"a": f(z["a"], x)}) if tree else f
        for solver in (ti.Anderson(), ti.FixedPointIteration(), ti.Broyden(), ti.NewtonKrylov()):
            solution = ti.solve(ti.FixedPoint(g), start, x, solver=solver)
            value = solution.value["a"] if tree else solution.value
            assert solution.converged.all(), (solver, solution.summary())
            torch.testing.assert_close(value, z, rtol=1e-9, atol=1e-9)
            got, expected = (
                torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v, t in ((value, x), (z, reference))
            )
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [ti.Anderson(), ti.FixedPointIteration(max_steps=300)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("unit", [1e8, 1e-8])
def test_a_leaf_that_appears_late_has_its_own_unit(solver: Any, unit: float) -> None:
    def f(z: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = z["a"], z["b"] / unit
        return {"a": 0.5 * torch.tanh(a) + x, "b": unit * (0.3 * torch.tanh(b) + torch.sin(a))}

    x = torch.tensor([[1e-4], [0.7]], dtype=F64)
    plain = {"a": torch.zeros(2, 1, dtype=F64), "b": torch.zeros(2, 1, dtype=F64)}
    expected = plain
    for _ in range(300):
        expected = f(expected, x)
    solution = ti.solve(ti.FixedPoint(f), plain, x, solver=solver)
    assert solution.converged.all(), solution.summary()
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("unit", [2.0**-27, 2.0**-13, 2.0**13, 2.0**27])  # no other would round alike
@pytest.mark.parametrize("kind", ["root", "minimum"])
def test_anderson_takes_the_same_steps_in_any_unit(kind: str, unit: float) -> None:
    w, x = data(F64)

    def steps(state: float, residual: float) -> list[int]:
        def energy(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return residual * (0.5 * (z / state) ** 2 + torch.cos(z / state @ w) - z / state * x).sum(dim=1)

        def f(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return residual * (z / state - torch.tanh(z / state @ w.T + x))

        problem: Any = ti.Root(f) if kind == "root" else ti.Minimum(energy)
        solution = ti.solve(problem, torch.full((4, 3), 0.1 * state, dtype=F64), x, solver=ti.Anderson())
        assert solution.converged.all(), solution.summary()
        return solution.steps.tolist()  # type: ignore[no-any-return]

    plain = steps(1.0, 1.0)
    for other in (steps(unit, 1.0), steps(1.0, unit)):
        assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) <= 1


@pytest.mark.parametrize("units", [(1e-26, 1e-26), (1e-20, 1e-26), (1e-13, 1e-13), (1e13, 1e13)])
@pytest.mark.parametrize("kind", ["least squares", "ball", "box", "simplex", "half-spaces", "prox"])
def test_extreme_minima_and_their_gradients_are_those_of_plain_units(kind: str, units: tuple[float, float]) -> None:
    """Of least squares, whose squares underflow twice, and on sets, in single precision."""
    generator = torch.Generator().manual_seed(0)
    matrix, b = torch.randn(5, 3, generator=generator), torch.randn(2, 5, generator=generator)

    def found(state: float, size: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = b.clone().requires_grad_()

        def residuals(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            y = z / state
            return y @ matrix.T + 0.1 * torch.tanh(y).sum(dim=1, keepdim=True) - x

        sets: dict[str, Any] = {
            "ball": lambda: ti.L2Ball(0.3 * state),
            "box": lambda: ti.Box(-0.2 * state, 0.1 * state),
            "simplex": lambda: ti.Simplex(0.5 * state),
            "half-spaces": lambda: ti.LinearInequalities(matrix[:2], torch.tensor([0.1, 0.2]) * state),
            "prox": lambda: ti.Projection(lambda z: z.clamp(-0.2 * state, 0.1 * state)),
        }
        if kind == "least squares":
            problem: Any = ti.LeastSquares(lambda z, x: size * residuals(z, x))
        else:
            problem = ti.Minimum(lambda z, x: 0.5 * size * residuals(z, x).square().sum(dim=1), sets[kind]())
        solution = ti.solve(problem, torch.zeros(2, 3), x)
        assert solution.converged.all(), solution.summary()
        value = solution.value / state
        (slope,) = torch.autograd.grad(value.pow(3).sum(), x)
        assert solution.adjoint is not None
        assert solution.adjoint.converged.all(), solution.adjoint
        return value.detach(), slope

    for got, expected in zip(found(*units), found(1.0, 1.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("units", [(1e-26, 1.0), (1e20, 1.0), (1.0, 1e-26), (1e-26, 1e-26)])
def test_an_extreme_joint_problem_is_right_or_said(units: tuple[float, float]) -> None:
    w, t = 0.5 * torch.eye(3), torch.tensor([[0.5, -0.3, 0.2]])
    state, size = units
    problem = ti.JointInference(
        lambda z, x: state * torch.tanh(z / state @ w + x),
        lambda z, x: size * ((z / state - t).square().sum(dim=1) + 0.1 * x.square().sum(dim=1)),
        0.1 / size,
    )
    solution = ti.solve(problem, (torch.zeros(1, 3), torch.zeros(1, 3)), solver=ti.Anderson(), throw=False)
    plain = ti.JointInference(
        lambda z, x: torch.tanh(z @ w + x),
        lambda z, x: (z - t).square().sum(dim=1) + 0.1 * x.square().sum(dim=1),
        0.1,
    )
    right = ti.solve(plain, (torch.zeros(1, 3), torch.zeros(1, 3)), solver=ti.Anderson()).value.x
    error = (solution.value.x - right).norm() / right.norm()
    assert not solution.converged.all() or error < 1e-3, (error, solution.summary())


@pytest.mark.parametrize("units", [(1e-20, 1.0, 1e15), (1e-26, 1.0, 1.0), (1.0, 1e21, 1.0), (1e-12, 1.0, 1e12)])
@pytest.mark.parametrize("kind", ["fixed point", "root", "minimum", "box", "plane", "least squares"])
def test_samples_of_unlike_magnitudes_are_solved_or_not_said_to_be(kind: str, units: tuple[float, ...]) -> None:
    """In one batch in single precision, where no common unit keeps the squares of all in range."""
    w, x = data(torch.float32)
    x = x[:3]

    def problem(state: torch.Tensor, size: torch.Tensor) -> Any:
        def image(z: torch.Tensor) -> torch.Tensor:
            return state * torch.tanh(z / state @ w.to(z.dtype).T + x.to(z.dtype))

        def energy(z: torch.Tensor) -> torch.Tensor:
            return (size * (0.5 * (z / state) ** 2 + 0.25 * (z / state) ** 4 - z / state * x.to(z.dtype))).sum(dim=1)

        return {
            "fixed point": lambda: ti.FixedPoint(image),
            "root": lambda: ti.Root(lambda z: (z - image(z)) / state * size),
            "minimum": lambda: ti.Minimum(energy),
            "box": lambda: ti.Minimum(energy, ti.Box(-0.4 * state.expand(3, 3), 0.4 * state.expand(3, 3))),
            "plane": lambda: ti.Minimum(energy, ti.LinearEquality(torch.ones(3, dtype=state.dtype), state[:, 0])),
            "least squares": lambda: ti.LeastSquares(
                lambda z: size * torch.cat(((z - image(z)) / state, 0.3 * z / state), dim=1)
            ),
        }[kind]()

    one = torch.ones(3, 1, dtype=F64)
    right = ti.solve(problem(one, one), torch.full((3, 3), 0.1, dtype=F64)).value
    other = torch.tensor(units)[:, None]
    for state, size in ((other, torch.ones(3, 1)), (torch.ones(3, 1), other)):
        for solver in (None, ti.NewtonKrylov(), ti.Anderson()):
            solution = ti.solve(problem(state, size), 0.1 * state.expand(3, 3), solver=solver, throw=False)
            found = (solution.value / state).to(F64)[solution.converged]
            torch.testing.assert_close(found, right[solution.converged], rtol=5e-3, atol=5e-3)
