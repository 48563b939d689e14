"""Joint inference and input optimization against closed forms and long nested optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

BATCH, STATE, INPUT = 4, 6, 3
REGULARIZATION = 0.1
DAMPING = (0.8, 0.6, 1.0)


class Linear(NamedTuple):
    """A linear map and a quadratic loss, whose optimum has a closed form."""

    w: Tensor
    u: Tensor
    target: Tensor

    @staticmethod
    def make() -> Linear:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return Linear(
            (0.2 * normal(STATE, STATE)).requires_grad_(), normal(STATE, INPUT).requires_grad_(), normal(BATCH, STATE)
        )

    def f(self, z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return z @ self.w.mT + x @ self.u.mT

    def loss(self, z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (z - target).square().sum(1) + 0.5 * REGULARIZATION * x.square().sum(1)

    @property
    def gain(self) -> Tensor:
        """dz/dx at the equilibrium."""
        return torch.linalg.solve(torch.eye(STATE, dtype=torch.float64) - self.w, self.u)

    def optimum(self) -> Tensor:
        gain = self.gain
        hessian = gain.mT @ gain + REGULARIZATION * torch.eye(INPUT, dtype=torch.float64)
        return torch.linalg.solve(hessian, gain.mT @ self.target.mT).mT

    def projected_descent(self, project: Callable[[Tensor], Tensor], steps: int = 4000) -> Tensor:
        """The constrained optimum by long projected gradient descent on the exact cost."""
        with torch.no_grad():
            gain = self.gain
            hessian = gain.mT @ gain + REGULARIZATION * torch.eye(INPUT, dtype=torch.float64)
            size = 1 / torch.linalg.eigvalsh(hessian)[-1]
            x = torch.zeros(BATCH, INPUT, dtype=torch.float64)
            for _ in range(steps):
                x = project(x - size * (x @ hessian - self.target @ gain))
        return x

    def problem(self, **options: Any) -> ti.JointInference:
        return ti.JointInference(self.f, self.loss, **{"step_size": 0.02, "damping": DAMPING, **options})

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(BATCH, STATE, dtype=torch.float64), torch.zeros(BATCH, INPUT, dtype=torch.float64)

    def solve(self, problem: ti.JointInference | None = None, **options: Any) -> ti.Solution:
        options = {"solver": ti.Anderson(memory=20, rtol=1e-11, max_steps=1000), **options}
        return ti.solve(problem or self.problem(), self.start(), self.target, **options)


@pytest.fixture
def linear() -> Linear:
    return Linear.make()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).detach())


@pytest.mark.parametrize(
    "solver",
    [
        ti.Anderson(memory=20, rtol=1e-9, max_steps=1000),
        ti.Broyden(memory=60, rtol=1e-9, max_steps=200),
        ti.NewtonKrylov(rtol=1e-9),
        ti.FixedPointIteration(rtol=1e-9, max_steps=8000),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_optimum_and_adjoint(linear: Linear, solver: Any) -> None:
    solution = linear.solve(linear.problem(step_size=0.01), solver=solver)
    state = solution.value
    assert bool(solution.converged.all())
    assert isinstance(state, ti.JointState)
    assert relative(state.x, linear.optimum()) < 1e-5
    z = state.x @ linear.gain.mT
    assert relative(state.z, z) < 1e-6
    slope = z - linear.target
    adjoint = torch.linalg.solve(torch.eye(STATE, dtype=torch.float64) - linear.w.mT, slope.mT).mT
    assert relative(state.mu, adjoint) < 1e-5


def test_exact_gradient_of_another_loss(linear: Linear) -> None:
    inputs = (linear.w, linear.u)
    expected = torch.autograd.grad(linear.optimum().pow(3).sum(), inputs)
    found = torch.autograd.grad(linear.solve(gradient=ti.Implicit()).value.x.pow(3).sum(), inputs)
    for got, right in zip(found, expected, strict=True):
        assert relative(got, right) < 1e-6


def test_envelope_is_exact_for_the_inner_loss(linear: Linear) -> None:
    inputs = (linear.w, linear.u)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    x = linear.optimum()
    expected = torch.autograd.grad((weights * linear.loss(x @ linear.gain.mT, x, linear.target)).sum(), inputs)
    for gradient in (ti.Envelope(), ti.FixedInput(), ti.Implicit()):
        solution = linear.solve(gradient=gradient)
        value = solution.value
        outer = (weights * linear.loss(value.z, value.x, linear.target)).sum()
        found = torch.autograd.grad(outer, inputs)
        for got, right in zip(found, expected, strict=True):
            assert relative(got, right) < 1e-7, gradient
        if isinstance(gradient, ti.Envelope):
            assert solution.adjoint is not None
            assert solution.adjoint.evaluations == 0


def test_envelope_refuses_another_loss(linear: Linear) -> None:
    value = linear.solve(gradient=ti.Envelope()).value
    with pytest.raises(ValueError, match="outer loss is the inner one"):
        value.x.square().sum().backward()


def test_fixed_input_leaves_out_the_input(linear: Linear) -> None:
    """It is the derivative at constant x, so it differs from the exact one where the outer loss is another."""
    value = linear.solve(gradient=ti.FixedInput()).value
    (found,) = torch.autograd.grad(value.z.pow(3).sum(), linear.u, retain_graph=True)
    x = linear.optimum().detach()
    (at_constant,) = torch.autograd.grad((x @ linear.gain.mT).pow(3).sum(), linear.u)
    (exact,) = torch.autograd.grad((linear.optimum() @ linear.gain.mT).pow(3).sum(), linear.u)
    assert relative(found, at_constant) < 1e-7
    assert relative(found, exact) > 1e-2
    value = linear.solve(gradient=ti.FixedInput()).value
    with pytest.raises(ti.UnsupportedDerivativeError, match="mu"):
        value.mu.sum().backward()


@pytest.mark.parametrize(
    "estimator", [ti.UnrolledPhantom(steps=400, damping=0.5), ti.NeumannPhantom(steps=400, damping=0.5)]
)
def test_phantom_tends_to_the_exact_gradient(linear: Linear, estimator: Any) -> None:
    (expected,) = torch.autograd.grad(linear.optimum().pow(3).sum(), linear.u)
    value = linear.solve(linear.problem(step_size=0.02, damping=(1.0, 1.0, 1.0)), gradient=estimator).value
    (found,) = torch.autograd.grad(value.x.pow(3).sum(), linear.u)
    assert relative(found, expected) < 0.05


def test_second_derivative(linear: Linear) -> None:
    def outer(u: Tensor, exact: bool) -> Tensor:
        moved = linear._replace(u=u)
        return (moved.optimum() if exact else moved.solve().value.x).pow(3).sum()

    direction = torch.ones_like(linear.u)

    def product(exact: bool) -> Tensor:
        u = linear.u.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(outer(u, exact), u, create_graph=True)
        (second,) = torch.autograd.grad((slope * direction).sum(), u)
        return second

    assert relative(product(exact=False), product(exact=True)) < 1e-6


@pytest.mark.parametrize(
    ("constraint", "project"),
    [
        (ti.L2Ball(0.2), lambda x: x * (0.2 / x.norm(dim=1, keepdim=True)).clamp(max=1)),
        (ti.Box(-0.1, 0.3), lambda x: x.clamp(-0.1, 0.3)),
        (
            ti.L2Ball(torch.tensor([0.1, 0.2, 0.3, 5.0]), torch.full((INPUT,), 0.05)),
            lambda x: (
                0.05
                + (x - 0.05)
                * (
                    torch.tensor([0.1, 0.2, 0.3, 5.0], dtype=x.dtype)[:, None] / (x - 0.05).norm(dim=1, keepdim=True)
                ).clamp(max=1)
            ),
        ),
    ],
    ids=["ball", "box", "balls"],
)
def test_constrained_optimum(linear: Linear, constraint: Any, project: Any) -> None:
    solution = linear.solve(
        linear.problem(constraint=constraint),
        solver=ti.Anderson(memory=20, rtol=1e-10, max_steps=3000, keep_trajectory=True),
    )
    assert relative(solution.value.x, linear.projected_descent(project)) < 1e-5
    for state in solution.trajectory:
        assert relative(state.x, project(state.x)) < 1e-7 or float(state.x.norm()) == 0


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.Envelope()], ids=["implicit", "envelope"])
@pytest.mark.parametrize("kind", ["ball", "box"])
def test_gradient_in_the_set(linear: Linear, kind: str, gradient: Any) -> None:
    """The derivative of the least loss in the radius, the centre and the bounds, to finite differences."""
    kinds = {"ball": lambda a, b: ti.L2Ball(a, b), "box": lambda a, b: ti.Box(b - a, b + a)}

    def least(a: Tensor, b: Tensor, gradient: Any = None) -> Tensor:
        size = a if kind == "ball" else a[:, None].expand(BATCH, INPUT)
        value = linear.solve(linear.problem(constraint=kinds[kind](size, b)), gradient=gradient).value
        return linear.loss(value.z, value.x, linear.target).sum()

    a = torch.full((BATCH,), 0.2, dtype=torch.float64, requires_grad=True)
    b = torch.full((BATCH, INPUT), 0.03, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(least(a, b, gradient), (a, b))
    step = 1e-5
    for name, got in zip("ab", found, strict=True):
        moved = {"a": a.detach().clone(), "b": b.detach().clone()}
        direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            up = least(**{**moved, name: moved[name] + step * direction})
            down = least(**{**moved, name: moved[name] - step * direction})
        assert float((got * direction).sum()) == pytest.approx(float((up - down) / (2 * step)), rel=1e-4)


def test_each_sample_on_its_own(linear: Linear) -> None:
    whole = linear.solve().value.x
    for i in range(BATCH):
        alone = ti.solve(
            linear.problem(),
            tuple(t[i : i + 1] for t in linear.start()),
            linear.target[i : i + 1],
            solver=ti.Anderson(memory=20, rtol=1e-11, max_steps=1000),
        )
        assert relative(alone.value.x[0], whole[i]) < 1e-7


def test_rowwise_stops_samples(linear: Linear) -> None:
    solver = ti.Anderson(memory=20, rtol=1e-9, max_steps=1000)
    z0, x0 = linear.start()
    near = linear.optimum().detach().clone()
    x0[1:] = near[1:]
    z0[1:] = near[1:] @ linear.gain.detach().mT
    dense = ti.solve(linear.problem(), (z0, x0), linear.target, solver=solver)
    rows = ti.solve(linear.problem(rowwise=True), (z0, x0), linear.target, solver=solver)
    assert relative(rows.value.x, dense.value.x) < 1e-7
    assert rows.evaluations < dense.evaluations


def test_not_batched_and_trees(linear: Linear) -> None:
    def f(z: Any, x: Any, target: Tensor) -> Any:
        image = linear.f(torch.cat((z["a"], z["b"][:, 0]))[None], x[0][None], target)[0]
        return {"a": image[:2], "b": image[2:, None]}

    def loss(z: Any, x: Any, target: Tensor) -> Tensor:
        return linear.loss(torch.cat((z["a"], z["b"][:, 0]))[None], x[0][None], target)[0]

    problem = ti.JointInference(f, loss, linear.problem().step_size, batched=False, damping=DAMPING)
    start = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(STATE - 2, 1, dtype=torch.float64)}
    solution = ti.solve(
        problem,
        (start, (torch.zeros(INPUT, dtype=torch.float64),)),
        linear.target[:1],
        solver=ti.Anderson(memory=20, rtol=1e-11, max_steps=1000),
    )
    assert solution.status.ndim == 0
    assert relative(solution.value.x[0], linear.optimum()[0]) < 1e-6


def test_under_transforms(linear: Linear) -> None:
    u = linear.u.detach()

    def outer(u: Tensor) -> Tensor:
        return linear._replace(u=u).solve().value.x.pow(3).sum()

    expected = torch.func.grad(lambda u: linear._replace(u=u).optimum().pow(3).sum())(u)
    assert relative(torch.func.grad(outer)(u), expected) < 1e-6
    batch = torch.stack((u, 1.1 * u))
    found = torch.func.vmap(torch.func.grad(outer))(batch)
    assert relative(found[0], expected) < 1e-6
    _, tangent = torch.func.jvp(outer, (u,), (torch.ones_like(u),))
    assert float(tangent) == pytest.approx(float(expected.sum()), rel=1e-6)


def test_an_evaluation_calls_the_map_and_the_loss_once(linear: Linear) -> None:
    calls = {"f": 0, "loss": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            calls[name] += 1
            return function(*args)

        return call

    problem = ti.JointInference(
        counted("f", linear.f), counted("loss", linear.loss), step_size=0.02, damping=DAMPING, rowwise=False
    )
    with torch.no_grad():
        solution = linear.solve(problem)
    assert bool(solution.converged.all())
    assert calls == {"f": solution.evaluations, "loss": solution.evaluations}


def test_map_that_ignores_what_it_is_given(linear: Linear) -> None:
    """Nothing to differentiate in the map: the state is what it is, and the input that of the loss alone."""
    fixed = torch.ones(BATCH, STATE, dtype=torch.float64)

    def loss(z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return (x - z[:, :INPUT]).square().sum(1)

    problem = ti.JointInference(lambda z, x, target: fixed, loss, step_size=0.3)
    state = linear.solve(problem).value
    assert relative(state.z, fixed) < 1e-9
    assert relative(state.x, fixed[:, :INPUT]) < 1e-9


def test_schedule_and_normalized_steps(linear: Linear) -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.02 if step < 20 else 0.01

    solution = linear.solve(linear.problem(step_size=schedule))
    assert relative(solution.value.x, linear.optimum()) < 1e-5
    assert asked[:3] == [0, 0, 1] or asked[:2] == [0, 1]
    ball = linear.problem(step_size=0.02, constraint=ti.L2Ball(0.1), normalized=True)
    value = linear.solve(ball, solver=ti.FixedPointIteration(rtol=1e-9, max_steps=5000)).value
    right = linear.projected_descent(lambda x: x * (0.1 / x.norm(dim=1, keepdim=True)).clamp(max=1))
    assert relative(value.x, right) < 1e-5


def test_acceleration_does_not_climb() -> None:
    """The residual vanishes at a maximum of the cost as well; Anderson alone goes there."""

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.sin(z) + x

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return torch.cos(3 * z).sum(1) + 0.02 * x.square().sum(1)

    generator = torch.Generator().manual_seed(0)
    x0 = 0.4 * torch.rand(200, 1, generator=generator, dtype=torch.float64)  # above is a maximum, at 0
    problem = ti.JointInference(f, loss, 0.05, damping=DAMPING)
    start = (torch.zeros_like(x0), x0)
    first = ti.resolve(problem, ti.JointState(*(torch.zeros_like(x0),) * 2, x0)).loss
    solution = ti.solve(problem, start, solver=ti.Anderson(max_steps=300), throw=False)
    reached = ti.resolve(problem, solution.value).loss
    assert float((reached < first + 1e-6).double().mean()) > 0.97
    assert float(reached.median()) < -0.7  # the two nearest minima are at -0.99 and -0.80


def test_state_that_lags_is_not_taken_for_the_best() -> None:
    """Its loss may be far below that of the equilibrium, to first order even below zero."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, u, head = draw(24, 24), 2 * draw(6, 24), draw(24, 16) / 4
    w = 0.6 * w / torch.linalg.matrix_norm(w, 2)
    truth, zero = draw(20, 6), torch.zeros(20, 24, dtype=torch.float64)
    target = ti.solve(ti.FixedPoint(lambda z: torch.tanh(z @ w + truth @ u)), zero).value @ head

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return 10 * (z @ head - target).square().mean(1) + 0.01 * x.square().mean(1)

    problem = ti.JointInference(lambda z, x: torch.tanh(z @ w + x @ u), loss, 0.03)
    start = (zero, torch.zeros_like(truth))
    solution = ti.solve(problem, start, solver=ti.Anderson(memory=20, max_steps=40), throw=False)
    reached = ti.resolve(problem, solution.value).loss
    assert float(reached.mean()) < 0.1 * float(ti.resolve(problem, ti.JointState(zero, *start)).loss.mean())


def test_resolve(linear: Linear) -> None:
    rough = linear.solve(solver=ti.Anderson(max_steps=5), throw=False)
    exact = ti.resolve(linear.problem(), rough.value, linear.target, solver=ti.Anderson(rtol=1e-12))
    z = rough.value.x @ linear.gain.mT
    assert relative(exact.solution.value, z) < 1e-10
    assert relative(exact.loss, linear.loss(z, rough.value.x, linear.target)) < 1e-9
    with pytest.raises(TypeError, match="JointInference"):
        ti.resolve(ti.FixedPoint(lambda z: z), rough.value)  # type: ignore[arg-type]


class TestBadInput:
    """Each with a sentence that says what to do."""

    def test_step_that_diverges(self, linear: Linear) -> None:
        with pytest.raises(ti.SolveError, match="lower step_size"):
            linear.solve(linear.problem(step_size=10.0), solver=ti.FixedPointIteration())
        with pytest.warns(ti.ConvergenceWarning):
            solution = linear.solve(linear.problem(step_size=10.0), solver=ti.FixedPointIteration(), throw=False)
        assert bool((solution.status == ti.Status.NONFINITE).all())
        assert bool(solution.value.x.isfinite().all())

    def test_input_that_runs_off(self) -> None:
        problem = ti.JointInference(lambda z, x: 0.5 * z + x, lambda z, x: z.sum(1), 0.1)
        start = (torch.zeros(2, 1, dtype=torch.float64),) * 2
        with pytest.warns(ti.ConvergenceWarning, match="unbounded below"):
            solution = ti.solve(problem, start, solver=ti.FixedPointIteration(max_steps=50))
        assert not bool(solution.converged.any())

    def test_start_outside(self, linear: Linear) -> None:
        z0, x0 = linear.start()
        with pytest.warns(UserWarning, match="1 of 4 samples, and was projected"):
            solution = ti.solve(
                linear.problem(constraint=ti.L2Ball(0.2)), (z0, torch.cat((x0[:1] + 9, x0[1:]))), linear.target
            )
        assert float(solution.value.x.norm(dim=1).max()) <= 0.2 * (1 + 1e-12)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": lambda z, x, t: (z - t).square().sum()}, "one value per sample"),
            ({"loss": lambda z, x, t: 3.0}, "must return a tensor"),
            ({"f": lambda z, x, t: z[:, :2]}, "result of f"),
            ({"step_size": torch.ones(7)}, "one per sample"),
            ({"constraint": ti.Box(torch.zeros(2), 1.0)}, "lower bound"),
        ],
    )
    def test_said_when_solved(self, linear: Linear, options: dict[str, Any], message: str) -> None:
        given = {"f": linear.f, "loss": linear.loss, "step_size": 0.1, **options}
        with pytest.raises((ValueError, TypeError), match=message):
            ti.solve(ti.JointInference(**given), linear.start(), linear.target)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"step_size": 0.0}, "positive"),
            ({"step_size": "small"}, "step_size"),
            ({"damping": (1.0, 1.0)}, "three numbers"),
            ({"damping": (0.0, 1.0, 1.0)}, "three numbers"),
            ({"constraint": 3}, "L2Ball"),
            ({"loss": None}, "loss"),
        ],
    )
    def test_said_when_stated(self, options: dict[str, Any], message: str) -> None:
        given = {"f": lambda z, x: z, "loss": lambda z, x: z.sum(1), "step_size": 0.1, **options}
        with pytest.raises((ValueError, TypeError), match=message):
            ti.JointInference(**given)

    def test_sets(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            ti.L2Ball(-1.0)
        with pytest.raises(ValueError, match="exceed"):
            ti.Box(1.0, 0.0)

    def test_pair(self, linear: Linear) -> None:
        with pytest.raises(ValueError, match="pair"):
            ti.solve(linear.problem(), linear.start()[0], linear.target)

    def test_estimators_of_other_problems(self) -> None:
        with pytest.raises(ValueError, match="JointInference"):
            ti.solve(ti.FixedPoint(lambda z: 0.5 * z), torch.ones(1, 1), gradient=ti.Envelope())

    def test_regularizer(self, linear: Linear) -> None:
        value = linear.solve().value
        with pytest.raises(TypeError, match=r"FixedPoint\(f\)"):
            ti.regularizers.jacobian_frobenius(linear.problem(), value, linear.target)
        size = ti.regularizers.jacobian_frobenius(ti.FixedPoint(linear.f), value.z, value.x, linear.target, samples=4)
        assert float(size.detach()) > 0


def test_a_ball_and_a_box_together() -> None:
    linear = Linear.make()
    ball, box = ti.L2Ball(1.0, torch.full((INPUT,), 0.1).double()), ti.Box(-0.3, 0.6)
    problem = ti.JointInference(linear.f, linear.loss, 0.1, (ball, box), damping=DAMPING)
    start = torch.zeros(BATCH, STATE).double(), torch.zeros(BATCH, INPUT).double()
    found = ti.solve(problem, start, linear.target, solver=ti.Anderson(rtol=1e-10, max_steps=500)).value.x
    exact = ti.Minimum(
        lambda x, target: (
            0.5 * (x @ linear.gain.detach().mT - target).square().sum(1) + 0.5 * REGULARIZATION * x.square().sum(1)
        ),
        constraint=(ball, box),
    )
    right = ti.solve(exact, start[1], linear.target, solver=ti.ProjectedNewton(rtol=1e-10, max_steps=200)).value
    torch.testing.assert_close(found.detach(), right, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="leave no state in the ball"):
        ti.solve(
            ti.JointInference(linear.f, linear.loss, 0.1, (ti.L2Ball(0.1), ti.Box(1.0, 2.0))), start, linear.target
        )
    with pytest.raises(TypeError, match="the pair of both"):
        ti.JointInference(linear.f, linear.loss, 0.1, (box, box))


def test_steps_by_the_sign_of_the_gradient_settle_at_a_corner() -> None:
    linear = Linear.make()
    slope = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    problem = ti.JointInference(
        linear.f, lambda z, x, y: (x * slope).sum(1), 0.05, ti.Box(-0.3, 0.6), damping=DAMPING, normalized="sign"
    )
    start = torch.zeros(BATCH, STATE).double(), torch.zeros(BATCH, INPUT).double()
    found = ti.solve(problem, start, linear.target, solver=ti.FixedPointIteration(max_steps=400)).value.x
    torch.testing.assert_close(found[0].detach(), torch.tensor([-0.3, 0.6, -0.3], dtype=torch.float64))
    with pytest.raises(ValueError, match="normalized"):
        ti.JointInference(linear.f, linear.loss, 0.1, normalized="signs")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"constraint": lambda unit: ti.L2Ball(0.3 * unit)},
        {"constraint": lambda unit: ti.Box(-0.1 * unit, 0.3 * unit), "damping": DAMPING},
        {"constraint": lambda unit: ti.L2Ball(0.3 * unit), "normalized": True},
        {"step_size": lambda size: lambda step: size if step < 10 else 0.7 * size},
    ],
    ids=["free", "ball", "box", "normalized", "schedule"],
)
@pytest.mark.parametrize(
    "units", [(2**-40, 1, 1), (2**40, 1, 1), (1, 2**40, 1), (1, 1, 2**-40), (2**20, 2**-20, 2**-13)]
)
def test_the_units_of_state_input_and_loss_change_nothing(linear: Linear, units: Any, options: Any) -> None:
    found = []
    for of_z, of_x, of_loss in ((1, 1, 1), units):

        def f(z: Tensor, x: Tensor, target: Tensor, of_z: float = of_z, of_x: float = of_x) -> Tensor:
            return of_z * torch.tanh(linear.f(z / of_z, x / of_x, target))

        def loss(z: Tensor, x: Tensor, target: Tensor, of: Any = (of_z, of_x, of_loss)) -> Tensor:
            return of[2] * linear.loss(z / of[0], x / of[1], target)

        given = dict(options)
        size = 0.02 * (of_x if "normalized" in options else of_x**2 / of_loss)
        given["step_size"] = options.get("step_size", float)(size)
        if "constraint" in options:
            given["constraint"] = options["constraint"](of_x)
        problem = ti.JointInference(f, loss, **given)
        solution = ti.solve(problem, linear.start(), linear.target, solver=ti.Anderson(max_steps=200))
        z, mu, x = solution.value
        state = torch.cat((z / of_z, mu * (of_z / of_loss), x / of_x), dim=1)
        (slope,) = torch.autograd.grad(state.pow(3).sum(), linear.w)
        found.append((solution, state.detach(), slope))
    (one, *first), (two, *second) = found
    assert one.converged.all()
    assert torch.equal(one.steps, two.steps)
    for a, b in zip(first, second, strict=True):
        assert relative(b, a) < 1e-8


@pytest.mark.parametrize("constraint", [None, "box"])
@pytest.mark.parametrize(
    "solver",
    [ti.Anderson(max_steps=300), ti.Broyden(max_steps=300), ti.NewtonKrylov(), None],
    ids=lambda s: "default" if s is None else type(s).__name__,
)
def test_the_units_of_the_parts_change_nothing(solver, constraint):
    weight = 0.5 * torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    target = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]], dtype=torch.float64)

    def found(of_z=1.0, of_x=1.0, of_loss=1.0):
        problem = ti.JointInference(
            lambda z, x, shift: of_z * torch.tanh(z / of_z @ weight + x / of_x + shift),
            lambda z, x, shift: of_loss * ((z / of_z - target).square().sum(1) + 0.1 * (x / of_x).square().sum(1)),
            0.1 * of_x**2 / of_loss,
            constraint=None if constraint is None else ti.Box(-0.2 * of_x, 0.2 * of_x),
        )
        shift = torch.full((2, 3), 0.2, dtype=torch.float64, requires_grad=True)
        start = torch.full((2, 3), 0.1, dtype=torch.float64)
        solution = ti.solve(problem, (start * of_z, start * of_x), shift, solver=solver)
        assert solution.converged.all(), solution.summary()
        (slope,) = torch.autograd.grad((solution.value.x / of_x).sum(), shift)
        return solution.steps, solution.value.x.detach() / of_x, slope

    plain = found()
    for unit in (1e-30, 1e-12, 1e12, 1e30):
        for units in ((unit, 1.0, 1.0), (1.0, unit, 1.0), (1.0, 1.0, unit)):
            steps, x, slope = found(*units)
            assert (steps - plain[0]).abs().max() <= 1, units
            torch.testing.assert_close(x, plain[1], rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(slope, plain[2], rtol=1e-7, atol=1e-8)
