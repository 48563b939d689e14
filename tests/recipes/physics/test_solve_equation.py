"""Physics-informed recipes: equations, exact Jacobians, training, resume, faults."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.linear import Dense
from torchimplicit.recipes.physics import solve_equation as runner
from torchimplicit.recipes.physics.equations import EQUATIONS, slowness
from torchimplicit.recipes.physics.solve_equation import PhysicsConfig, problem_of
from torchimplicit.recipes.runtime import optimize as keeper
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.solvers import NewtonKrylov

SMALL = PhysicsConfig(states=4, width=4, points=9, iterations=4, error_every=2, page=False)


def differences(equation, x, order, h=1e-3):
    """The derivative of the trusted solution, by central differences of the fourth order."""
    if not order:
        return equation.reference(x)
    step = np.zeros(x.shape[1])
    step[order[0]] = h
    shares = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    return sum(share * differences(equation, x + k * step, order[1:], h) for k, share in shares.items()) / h


@pytest.mark.parametrize("name", [*EQUATIONS, "slowness"])
def test_the_trusted_solution_satisfies_the_equation(name):
    equation = EQUATIONS[name] if name in EQUATIONS else slowness(noise=0.0)
    low, high = np.array(equation.low), np.array(equation.high)
    for condition in equation.stated(40, seed=0):
        x = condition.points.numpy()
        if condition.orders:  # differences need room
            x = low + (high - low) * (0.02 + 0.96 * (x - low) / (high - low))
            condition.points = torch.as_tensor(x)
        fields = {order: torch.as_tensor(differences(equation, x, order)) for order in ((), *condition.orders)}
        residual = condition(lambda output, order, fields=fields: fields[order][:, output], {})
        scale = max(1.0, *(float(field.abs().max()) for field in fields.values()))
        assert float(residual.abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("model", ["equilibrium", "network"])
@pytest.mark.parametrize("name", [*EQUATIONS, "slowness"])
def test_the_jacobian_is_that_of_the_residuals(name, model):
    config = replace(SMALL, equation=name, model=model)
    problem = problem_of(config)
    start = problem.weights
    jacobian = problem.jacobian(start)
    vector = np.random.default_rng(0).standard_normal(len(start))
    h = 1e-5
    numeric = (problem.residuals(start + h * vector) - problem.residuals(start - h * vector)) / (2 * h)
    np.testing.assert_allclose(jacobian @ vector, numeric, rtol=1e-5, atol=1e-6 * np.abs(numeric).max())
    loss, gradient = problem.loss_and_gradient(start)
    residuals = problem.residuals(start)
    assert loss == pytest.approx(0.5 * residuals @ residuals)
    np.testing.assert_allclose(gradient, jacobian.T @ residuals, rtol=1e-6, atol=1e-9)


def test_a_medium_is_found_from_the_waves_in_it():
    problem = problem_of(PhysicsConfig(equation="slowness", points=200, iterations=20))

    def step(weights, loss):
        taken.append(loss)
        if len(taken) == 20:
            raise StopIteration  # which ends SciPy's loop
        return 0.0

    taken: list[float] = []
    keeper.run(problem, "least-squares", 1e-2, 0.0, step)
    grid = slowness().points()
    *waves, medium = slowness().reference(grid).T
    with torch.no_grad():
        values = problem.model.field(torch.as_tensor(grid)).numpy().T
    for wave, value in zip(waves, values[:2], strict=True):
        assert np.linalg.norm(value - wave) < 0.02 * np.linalg.norm(wave)
    assert np.linalg.norm(values[2] - medium) < 0.6 * np.linalg.norm(medium - 1)


@pytest.mark.parametrize("optimizer", ["least-squares", "l-bfgs", "adam"])
def test_training_lowers_the_loss_and_leaves_a_page(tmp_path, optimizer):
    config = replace(SMALL, optimizer=optimizer, page=optimizer == "adam")
    run = started(tmp_path / "run", config)
    assert runner.train(config, run, Console(quiet=True))
    results = run.read_json("results.json")
    losses = [look["loss"] for look in results["looks"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert set(results["errors"]) == {"relative_l2", "iae"}
    assert (run.path / "index.html").is_file() == config.page
    if config.page:
        assert "<svg" in (run.path / "index.html").read_text(encoding="utf-8")
    runner.evaluate(config, run, Console(quiet=True))
    assert run.read_json("evaluation.json")["errors"] == pytest.approx(results["errors"])


def test_two_dimensions_are_drawn_as_maps(tmp_path):
    config = replace(SMALL, equation="helmholtz", model="network", iterations=1, page=True)
    run = started(tmp_path / "run", config)
    assert runner.train(config, run, Console(quiet=True))
    assert (run.path / "figures" / "solution.png").is_file()


def test_a_resumed_run_goes_on_from_its_weights(tmp_path):
    run = started(tmp_path / "run", SMALL)
    assert runner.train(SMALL, run, Console(quiet=True))
    longer = replace(SMALL, iterations=6)
    assert runner.train(longer, run, Console(quiet=True))
    looks = run.read_json("results.json")["looks"]
    assert [look["iteration"] for look in looks] == [1, 2, 3, 4, 5, 6]
    assert looks[-1]["loss"] < looks[3]["loss"]
    with pytest.raises(UserError, match="does not fit"):
        runner.train(replace(longer, states=5, iterations=8), run, Console(quiet=True))


@pytest.mark.parametrize("optimizer", ["least-squares", "l-bfgs", "adam"])
def test_a_budget_of_time_is_kept_and_errors_are_measured_along_it(tmp_path, monkeypatch, optimizer):
    clock = iter(range(10**6))
    monkeypatch.setattr(keeper.time, "process_time", lambda: float(next(clock)))  # an iteration takes a second
    config = replace(SMALL, optimizer=optimizer, iterations=1000, seconds=30.0)
    run = started(tmp_path / "run", config)
    assert runner.train(config, run, Console(quiet=True))
    results = run.read_json("results.json")
    assert results["seconds"] == results["iterations"] == 30
    looks = results["looks"]
    assert looks[0]["iteration"] == 1
    assert looks[-1]["iteration"] == 30
    assert len(looks) < 15
    assert all(look["iae"] is not None for look in looks)
    assert looks[-1]["loss"] == results["loss"] < looks[0]["loss"]
    made = runner.restored(config, run)
    assert EQUATIONS["van-der-pol"].errors(runner.values(made, EQUATIONS["van-der-pol"])) == pytest.approx(
        results["errors"]
    )


def test_what_is_kept_is_what_the_optimizer_accepted(tmp_path, monkeypatch):
    def stops_early(problem, name, learning_rate, spent, step):
        weights = problem.weights
        step(weights, 1.0)
        problem.set_weights(weights + 5)  # a trial that is not accepted

    monkeypatch.setattr(runner, "optimize", stops_early)
    run = started(tmp_path / "run", SMALL)
    assert runner.train(SMALL, run, Console(quiet=True))
    kept = torch.cat([p.detach().reshape(-1) for p in runner.restored(SMALL, run).parameters()])
    np.testing.assert_allclose(kept, problem_of(SMALL).weights)


def test_equilibria_that_are_not_found_are_rejected():
    problem = problem_of(replace(SMALL, points=7))
    problem.model.field._settle.solver = NewtonKrylov(linear_solver=Dense(), rtol=1e-12, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        residuals = problem.residuals(problem.weights)
    assert problem.rejected == 1
    assert residuals.shape == (16,)
    assert np.isinf(residuals).all()


def test_the_bound_is_a_setting():
    assert PhysicsConfig().bound is None
    assert runner.field(replace(SMALL, bound=2.0)).bound == 2.0
    with pytest.raises(UserError, match="--bound must be positive"):
        replace(SMALL, bound=0.0)
    with pytest.raises(UserError, match="--bound is of the equilibrium"):
        replace(SMALL, bound=1.0, model="network")


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(UserError, match="nothing was trained"):
        runner.evaluate(SMALL, started(tmp_path / "run", SMALL), Console(quiet=True))


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--points must be at least 2"):
        PhysicsConfig(points=1)
    with pytest.raises(UserError, match="--iterations must be positive"):
        PhysicsConfig(iterations=0)
    with pytest.raises(UserError, match=r"takes one of van-der-pol, .*, or a Python file"):
        PhysicsConfig(equation="burger")


def started(path, config) -> Run:
    run = create("physics-van-der-pol", RunOptions(output=path))
    run.describe("physics-van-der-pol", config)
    return run
