"""Solves an equation, built-in or your own, by a physics-informed equilibrium model or a plain network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from torchimplicit.models.physics_informed import EquilibriumField, Field, NetworkField
from torchimplicit.recipes.physics.equation_file import given
from torchimplicit.recipes.physics.least_squares import LeastSquares, Solved
from torchimplicit.recipes.physics.statement import MEASURES, Equation
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.optimize import Array, Budget, Checkpointer, Clock, Enough
from torchimplicit.recipes.runtime.optimize import run as optimize
from torchimplicit.recipes.runtime.run import Environment, Run, quietly, threads
from torchimplicit.recipes.runtime.settings import OptimizerName, from_plain, not_negative, positive
from torchimplicit.recipes.runtime.table import Column, Table

if TYPE_CHECKING:
    from rich.console import Console

# -- settings ----------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[OptimizerName, str] = {"least-squares": "Gauss–Newton", "l-bfgs": "L-BFGS", "adam": "Adam"}
"""Labels of the optimizers."""


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Solve a differential equation with an equilibrium model or a plain network, from the equation alone."""

    equation: str = "van-der-pol"
    """van-der-pol, four-tanks, burgers, helmholtz or slowness; or a Python file that defines 'equation'."""

    model: Literal["equilibrium", "network", "own"] = "equilibrium"
    """equilibrium: z = tanh(Ax + Bz + b) with a linear head. network: a tanh perceptron. own: the result of 'field' in
    the Python file."""

    states: int = 20
    """Size of the equilibrium's state."""

    bound: float | None = None
    """Upper bound on the Frobenius norm of B. Default: none. 1 makes the map a contraction, and the model nearly a
    single layer."""

    width: int = 20
    """Width of the network's hidden layers."""

    depth: int = 2
    """Number of the network's hidden layers."""

    points: int = 50
    """Number of collocation points."""

    optimizer: OptimizerName = "least-squares"
    """Optimizer: trust-region Gauss–Newton with exact Jacobians, L-BFGS (both from SciPy), or Adam with cosine
    decay."""

    iterations: int = 100
    """Largest number of optimizer iterations."""

    seconds: float | None = None
    """Stop the optimizer after this much CPU time, in seconds. Measuring errors is not counted."""

    learning_rate: float = 1e-2
    """Peak learning rate of Adam."""

    error_every: int = 5
    """Iterations between two measurements of the error on the grid. With --seconds they are spread over the time."""

    error_at: tuple[int, ...] = ()
    """Further iterations after which the error is measured."""

    page: bool = True
    """Write figures and an HTML page at the end."""

    seed: int = 0
    """Random seed of the initial weights and the collocation points."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "states", "width", "depth", "points", "iterations", "learning_rate", "error_every", "seconds")
        positive(self, "bound")
        if any(number < 1 for number in self.error_at):
            raise UserError("--error-at takes numbers of iterations, from 1 on")
        if not self.equation.endswith(".py"):
            given(self.equation)
        not_negative(self, "seed", "threads")
        if self.points < 2:
            raise UserError(f"--points must be at least 2, and it is {self.points}")
        if self.bound is not None and self.model != "equilibrium":
            raise UserError(f"--bound is of the equilibrium, and --model is {self.model}")


def van_der_pol() -> PhysicsConfig:
    """The oscillator of Pacheco's thesis, seconds on one core."""
    return PhysicsConfig(equation="van-der-pol")


def four_tanks() -> PhysicsConfig:
    """The four-tank process, seconds on one core."""
    return PhysicsConfig(equation="four-tanks")


def burgers() -> PhysicsConfig:
    """Burgers' equation, with second derivatives in space: half a minute on one core."""
    return PhysicsConfig(equation="burgers", points=300)


def helmholtz() -> PhysicsConfig:
    """Helmholtz' equation on the square: half a minute on one core."""
    return PhysicsConfig(equation="helmholtz", points=300)


def slowness() -> PhysicsConfig:
    """Helmholtz' equation inverted: a medium's squared slowness from two waves in it, half a minute on one core."""
    return PhysicsConfig(equation="slowness", points=400)


def own() -> PhysicsConfig:
    """Your own equation, ``--equation FILE``."""
    return PhysicsConfig(equation=OWN, points=300)


OWN = "equation.py"
"""The file that is used if none is named."""


# -- What is measured while a field is trained, and what comes out -----------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The state of a training at one iteration.

    Attributes:
        iteration: iterations done.
        seconds: CPU seconds, spent in the optimizer until then.
        loss: half the weighted mean squares of the residuals.
        relative_l2, iae: errors on the grid, see :meth:`Equation.errors`; NaN where they were not measured.
    """

    iteration: int
    seconds: float
    loss: float
    relative_l2: float
    iae: float


@dataclass
class History(Clock):
    """All measurements so far; saved in the checkpoint.

    Attributes:
        looks: in their order.
        digest: digest of the equation's file; empty for a known equation.
    """

    looks: list[Measurement] = dataclasses.field(default_factory=list)
    digest: str = ""


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        parameters: number of parameters of the model.
        reference: the trusted solution; empty where there is none.
        errors: on the grid, at the end; empty without a trusted solution.
        unknown: the equation's parameters that were found.
        loss: at the end.
        validation: the same loss with the equation asked for at other points, as many.
        iterations, seconds, residuals, jacobians, rejected: see :class:`History`.
        unconverged: share of the grid's points whose equilibrium was not found; zero for a network.
    """

    state: str
    parameters: int
    reference: str
    errors: dict[str, float]
    unknown: dict[str, float]
    loss: float
    validation: float
    iterations: int
    seconds: float
    residuals: int
    jacobians: int
    rejected: int
    unconverged: float
    looks: list[Measurement]
    environment: Environment
    config: PhysicsConfig


# -- Trains a field, and shows what came out; see :class:`torchimplicit.recipes.runtime.run.Runner` --------------------


def check(config: PhysicsConfig) -> None:
    """Check that the equation's file can be read and its model made."""
    field(config)


def field(config: PhysicsConfig) -> Field:
    """The model with its initial weights, in double precision."""
    stated = given(config.equation)
    equation = stated.equation
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        torch.set_default_dtype(torch.float64)
        try:
            box, outputs = (equation.low, equation.high), len(equation.outputs)
            if config.model == "equilibrium":
                return EquilibriumField(*box, outputs=outputs, states=config.states, bound=config.bound)
            if config.model == "network":
                return NetworkField(*box, outputs=outputs, width=config.width, depth=config.depth)
            if stated.field is None:
                raise UserError(f"--model own takes the model that {config.equation} defines as 'field(equation)'")
            model = stated.field(equation)
            if not isinstance(model, Field):
                raise UserError(
                    f"'field' of {config.equation} must return a Field, and it gives a {type(model).__name__}"
                )
            return model.double()
        finally:
            torch.set_default_dtype(before)


def problem_of(config: PhysicsConfig) -> LeastSquares:
    """The residuals, with the initial weights."""
    equation = given(config.equation).equation
    return LeastSquares(Solved(field(config), equation.unknown), equation.stated(config.points, config.seed))


def train(config: PhysicsConfig, run: Run, console: Console) -> bool:
    """Train from the last checkpoint, and write ``results.json``, ``figures/`` and ``index.html``."""
    stated, problem = given(config.equation), problem_of(config)
    equation, model = stated.equation, problem.model.field
    history = _resumed(problem.model, stated.digest, run)

    def look(loss: float, measured: bool) -> None:
        errors = equation.errors(values(model, equation)) if measured else {}
        error = errors.get("relative_l2", math.nan), errors.get("iae", math.nan)
        if history.looks and history.looks[-1].iteration == history.iterations:
            history.looks.pop()
        history.looks.append(Measurement(history.iterations, history.seconds, loss, *error))

    limits = Budget(
        iterations=config.iterations,
        seconds=config.seconds,
        measure_every=config.error_every,
        measure_at=config.error_at,
    )
    keeper = Checkpointer(limits, problem, history, look, run, console)
    budget = f"{config.iterations} iterations" if config.seconds is None else f"{config.seconds:g} seconds"
    sought = f", {', '.join(equation.unknown)} unknown" if equation.unknown else ""
    console.print(
        f"{equation.title}: {len(problem.weights)} weights{sought}, {config.points} collocation points, {budget} of "
        f"{config.optimizer}; Ctrl-C stops and keeps what is done.",
        highlight=False,
    )
    with _threads(config.threads), quietly(), keeper:
        if keeper.spent < 1:
            try:
                optimize(problem, config.optimizer, config.learning_rate, keeper.spent, keeper.step)
            except Enough:
                pass
            except KeyboardInterrupt:
                keeper.interrupted = True
            keeper.finish()
        results = _results(config, equation, problem, history, "interrupted" if keeper.interrupted else "complete")
        run.write_json("results.json", results)
        if config.page:
            _write_report(results, equation, model, run)
    _say(results, console)
    return not keeper.interrupted


def evaluate(config: PhysicsConfig, run: Run, console: Console) -> None:
    """Measure the errors of the last weights again, and redraw the page if there is one."""
    stated, problem = given(config.equation), problem_of(config)
    if not run.checkpoint.is_file():
        raise UserError(f"{run.checkpoint} does not exist: nothing was trained yet; 'resume' the run first")
    history = _resumed(problem.model, stated.digest, run)
    with _threads(config.threads), quietly():
        results = _results(config, stated.equation, problem, history, "complete")
        if config.page:
            _write_report(results, stated.equation, problem.model.field, run)
    run.write_json("evaluation.json", {"errors": results.errors, "unknown": results.unknown})
    _say(results, console)


def _write_report(results: Results, equation: Equation, model: Field, run: Run) -> None:
    from torchimplicit.recipes.physics.pictures import write_report

    write_report(results, equation, values(model, equation), run)


def values(model: Field, equation: Equation) -> Array:
    """The field on the equation's grid."""
    with torch.no_grad():
        return np.asarray(model(torch.as_tensor(equation.points())).numpy())


def restored(config: PhysicsConfig, run: Run) -> Field:
    """The field with the weights that a run has reached."""
    problem = problem_of(config)
    _resumed(problem.model, given(config.equation).digest, run)
    return problem.model.field


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads, and those of SciPy's linear algebra."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threads(count), threadpool_limits(count or None):
        yield


def _resumed(model: Solved, digest: str, run: Run) -> History:
    """Restore a checkpoint; its weights are set in the model."""
    if not run.checkpoint.is_file():
        return History(digest=digest)
    from torchimplicit.recipes.runtime.fitting import read_checkpoint

    read = read_checkpoint(run.checkpoint)
    try:
        history = from_plain(History, read["history"])
        model.load_state_dict(read["weights"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{run.checkpoint} does not fit this run's settings ({reason}); train again") from None
    if history.digest != digest:
        raise UserError(f"the equation's file has changed since {run} was trained: train again, or put it back")
    return history


def _results(config: PhysicsConfig, equation: Equation, problem: LeastSquares, history: History, state: str) -> Results:
    model = problem.model.field
    errors = equation.errors(values(model, equation))
    converged = model.converged
    held_out = LeastSquares(problem.model, equation.stated(config.points, config.seed, held_out=True))
    return Results(
        state=state,
        parameters=sum(p.numel() for p in model.parameters()),
        reference="" if equation.trusted is None else equation.source,
        errors=errors,
        unknown=problem.model.found(),
        loss=history.looks[-1].loss if history.looks else math.nan,
        validation=0.5 * float(np.square(held_out.residuals(problem.weights)).sum()),
        iterations=history.iterations,
        seconds=history.seconds,
        residuals=history.residuals,
        jacobians=history.jacobians,
        rejected=history.rejected,
        unconverged=0.0 if converged is None else 1 - float(converged.double().mean()),
        looks=history.looks,
        environment=Environment.of(torch.device("cpu")),
        config=config,
    )


def _say(results: Results, console: Console) -> None:
    unknown = {name: f"{value:.6g}" for name, value in results.unknown.items()}
    errors = {MEASURES[name]: value for name, value in results.errors.items()}
    figures = {**errors, "Loss": results.loss, "Held-out loss": results.validation}
    names = ["Model", "Weights", *unknown, *figures, "Iterations", "Seconds"]
    numbers = [f"{value:.2e}" for value in figures.values()]
    row = [results.config.model, str(results.parameters), *unknown.values(), *numbers, str(results.iterations)]
    console.print(Table([Column(name) for name in names], [[*row, f"{results.seconds:.1f}"]]).rich())
    if results.unconverged:
        console.print(
            f"At {results.unconverged:.1%} of the points on which it was evaluated no equilibrium was found: there the "
            "values mean nothing; train longer, from another --seed, or with a --bound.",
            highlight=False,
        )
