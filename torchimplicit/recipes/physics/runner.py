"""Trains a field, and shows what came out; see :class:`torchimplicit.recipes.recipe.Runner`."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models.physics_informed import EquilibriumField, Field, NetworkField
from torchimplicit.recipes.environment import Environment
from torchimplicit.recipes.errors import DivergedError, UserError
from torchimplicit.recipes.fitting import read_checkpoint
from torchimplicit.recipes.machine import threads
from torchimplicit.recipes.physics.config import PhysicsConfig
from torchimplicit.recipes.physics.equations import EQUATIONS, Equation
from torchimplicit.recipes.physics.history import History, Look, Results
from torchimplicit.recipes.physics.least_squares import Array, LeastSquares
from torchimplicit.recipes.physics.optimizers import run as optimize
from torchimplicit.recipes.physics.report import write_report
from torchimplicit.recipes.plain import from_plain, to_plain
from torchimplicit.recipes.progress import NOTED_EVERY
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Column, Table


class _Enough(Exception):
    """The iterations are done."""


def check(config: PhysicsConfig) -> None:
    """Everything runs on a CPU."""


def field(config: PhysicsConfig) -> Field:
    """The model with its initial weights, in double precision."""
    equation = EQUATIONS[config.equation]
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        torch.set_default_dtype(torch.float64)
        try:
            if config.model == "equilibrium":
                return EquilibriumField(
                    equation.low, equation.high, outputs=len(equation.outputs), states=config.states
                )
            return NetworkField(
                equation.low, equation.high, outputs=len(equation.outputs), width=config.width, depth=config.depth
            )
        finally:
            torch.set_default_dtype(before)


def train(config: PhysicsConfig, run: Run, console: Console) -> bool:
    """Train from the last iteration that was kept, and write ``results.json``, ``figures/`` and ``index.html``."""
    equation, made = EQUATIONS[config.equation], field(config)
    problem = LeastSquares(made, equation.conditions(config.points, config.seed))
    history = _resumed(made, run)
    keeper = _Keeper(config, equation, problem, history, run, console)
    console.print(
        f"{equation.title}: {len(problem.weights)} weights, {config.points} collocation points, {config.iterations} "
        f"iterations of {config.optimizer}; Ctrl-C stops and keeps what is done.",
        highlight=False,
    )
    with threads(config.threads), warnings.catch_warnings(), keeper:
        warnings.simplefilter("ignore", ConvergenceWarning)  # the share that is not converged is recorded
        if history.iterations < config.iterations:
            try:
                optimize(problem, config, history.iterations, keeper.step)
            except _Enough:
                pass
            except KeyboardInterrupt:
                keeper.interrupted = True
        results = _results(config, equation, problem, history, "interrupted" if keeper.interrupted else "complete")
        run.write_json("results.json", results)
        write_report(results, equation, made, run)
    console.print(_table(results).rich_rows())
    return not keeper.interrupted


def evaluate(config: PhysicsConfig, run: Run, console: Console) -> None:
    """Measure the errors of the last weights again, and draw the page again."""
    equation, made = EQUATIONS[config.equation], field(config)
    if not run.checkpoint.is_file():
        raise UserError(f"{run.checkpoint} does not exist: nothing was trained yet; 'resume' the run first")
    history = _resumed(made, run)
    problem = LeastSquares(made, equation.conditions(config.points, config.seed))
    with threads(config.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = _results(config, equation, problem, history, "complete")
        write_report(results, equation, made, run)
    run.write_json("evaluation.json", {"errors": results.errors})
    console.print(_table(results).rich_rows())


class _Keeper:
    """Looks at the training after every iteration: the history, the checkpoint, the bar."""

    def __init__(
        self,
        config: PhysicsConfig,
        equation: Equation,
        problem: LeastSquares,
        history: History,
        run: Run,
        console: Console,
    ):
        self.config, self.equation, self.problem = config, equation, problem
        self.history, self.run, self.console = history, run, console
        self.interrupted = False
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("Training", total=config.iterations, completed=history.iterations)
        self._clock = self._noted = time.perf_counter()

    def __enter__(self) -> _Keeper:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def step(self, weights: Array, loss: float) -> None:
        """After an iteration."""
        seconds = self.history.seconds + time.perf_counter() - self._clock
        iteration = self.history.iterations + 1
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at iteration {iteration}")
        last = iteration >= self.config.iterations
        errors: dict[str, float] = {}
        if last or iteration % self.config.error_every == 0:
            self.problem.set_weights(weights)
            errors = self.equation.errors(values(self.problem.field, self.equation))
        nan = math.nan
        look = Look(iteration, seconds, loss, errors.get("relative_l2", nan), errors.get("iae", nan))
        self.history.looks.append(look)
        self._bar.update(self._task, completed=iteration, description=f"Training, loss {loss:.2e}")
        if last or time.perf_counter() - self._noted > NOTED_EVERY:
            self._noted = time.perf_counter()
            self.problem.set_weights(weights)
            torch.save(
                {"weights": self.problem.field.state_dict(), "history": to_plain(self.history)}, self.run.checkpoint
            )
            total = self.config.iterations
            self.run.write_json("progress.json", {"done": iteration, "total": total, "status": f"loss {loss:.2e}"})
        if last:
            raise _Enough
        self._clock = time.perf_counter()


def values(made: Field, equation: Equation) -> Array:
    """The field on the equation's grid."""
    with torch.no_grad():
        return np.asarray(made(torch.as_tensor(equation.grid())).numpy())


def _resumed(made: Field, run: Run) -> History:
    """What the checkpoint knows; its weights go into the field."""
    if not run.checkpoint.is_file():
        return History()
    read = read_checkpoint(run.checkpoint)
    try:
        made.load_state_dict(read["weights"])
        return from_plain(History, read["history"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{run.checkpoint} does not fit this run's settings ({reason}); train again") from None


def _results(config: PhysicsConfig, equation: Equation, problem: LeastSquares, history: History, state: str) -> Results:
    made = problem.field
    errors = equation.errors(values(made, equation))
    found = made.last if isinstance(made, EquilibriumField) else None
    return Results(
        state=state,
        parameters=sum(p.numel() for p in made.parameters()),
        reference=equation.source,
        errors=errors,
        residuals=problem.evaluations,
        jacobians=problem.jacobians,
        unconverged=0.0 if found is None else 1 - float(found.converged.double().mean()),
        looks=history.looks,
        environment=Environment.of(torch.device("cpu")),
        config=config,
    )


def _table(results: Results) -> Table:
    last = results.looks[-1] if results.looks else None
    columns = [Column("Model"), Column("Weights"), *(Column(name) for name in results.errors)]
    columns += [Column("Loss"), Column("Iterations"), Column("Seconds")]
    row = [results.config.model, str(results.parameters), *(f"{error:.2e}" for error in results.errors.values())]
    row += ["–"] * 3 if last is None else [f"{last.loss:.2e}", str(last.iteration), f"{last.seconds:.1f}"]
    return Table(columns, [row])
