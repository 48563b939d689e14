"""Trains a field, and shows what came out; see :class:`torchimplicit.recipes.runtime.run.Runner`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models.physics_informed import EquilibriumField, Field, NetworkField
from torchimplicit.recipes.physics.config import PhysicsConfig
from torchimplicit.recipes.physics.equations import EQUATIONS, Equation
from torchimplicit.recipes.physics.history import History, Look, Results
from torchimplicit.recipes.physics.least_squares import LeastSquares
from torchimplicit.recipes.physics.report import write_report
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.optimize import Array, Budget, Enough, Keeper
from torchimplicit.recipes.runtime.optimize import run as optimize
from torchimplicit.recipes.runtime.run import Environment, Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Column, Table


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

    def look(loss: float, measured: bool) -> None:
        errors = equation.errors(values(made, equation)) if measured else {}
        found = errors.get("relative_l2", math.nan), errors.get("iae", math.nan)
        if history.looks and history.looks[-1].iteration == history.iterations:
            history.looks.pop()
        history.looks.append(Look(history.iterations, history.seconds, loss, *found))

    limits = Budget(iterations=config.iterations, seconds=config.seconds, measure_every=config.error_every)
    keeper = Keeper(limits, problem, history, look, run, console)
    budget = f"{config.iterations} iterations" if config.seconds is None else f"{config.seconds:g} seconds"
    console.print(
        f"{equation.title}: {len(problem.weights)} weights, {config.points} collocation points, {budget} of "
        f"{config.optimizer}; Ctrl-C stops and keeps what is done.",
        highlight=False,
    )
    with _threads(config.threads), warnings.catch_warnings(), keeper:
        warnings.simplefilter("ignore", ConvergenceWarning)  # the share that is not converged is recorded
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
            write_report(results, equation, made, run)
    console.print(_table(results).rich_rows())
    return not keeper.interrupted


def evaluate(config: PhysicsConfig, run: Run, console: Console) -> None:
    """Measure the errors of the last weights again, and draw the page again if there is to be one."""
    equation, made = EQUATIONS[config.equation], field(config)
    if not run.checkpoint.is_file():
        raise UserError(f"{run.checkpoint} does not exist: nothing was trained yet; 'resume' the run first")
    history = _resumed(made, run)
    problem = LeastSquares(made, equation.conditions(config.points, config.seed))
    with _threads(config.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = _results(config, equation, problem, history, "complete")
        if config.page:
            write_report(results, equation, made, run)
    run.write_json("evaluation.json", {"errors": results.errors})
    console.print(_table(results).rich_rows())


def values(made: Field, equation: Equation) -> Array:
    """The field on the equation's grid."""
    with torch.no_grad():
        return np.asarray(made(torch.as_tensor(equation.grid())).numpy())


def restored(config: PhysicsConfig, run: Run) -> Field:
    """The field with the weights that a run has reached."""
    made = field(config)
    _resumed(made, run)
    return made


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads, and those of SciPy's linear algebra."""
    with threads(count), threadpool_limits(count or None):
        yield


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
        loss=history.looks[-1].loss if history.looks else math.nan,
        iterations=history.iterations,
        seconds=history.seconds,
        residuals=history.residuals,
        jacobians=history.jacobians,
        rejected=history.rejected,
        unconverged=0.0 if found is None else 1 - float(found.converged.double().mean()),
        looks=history.looks,
        environment=Environment.of(torch.device("cpu")),
        config=config,
    )


def _table(results: Results) -> Table:
    columns = [Column("Model"), Column("Weights"), *(Column(name) for name in results.errors)]
    columns += [Column("Loss"), Column("Iterations"), Column("Seconds")]
    row = [results.config.model, str(results.parameters), *(f"{error:.2e}" for error in results.errors.values())]
    row += [f"{results.loss:.2e}", str(results.iterations), f"{results.seconds:.1f}"]
    return Table(columns, [row])
