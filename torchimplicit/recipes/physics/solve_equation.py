"""An equation solved by a physics-informed equilibrium model, or by a plain network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchimplicit.models.physics_informed import EquilibriumField, Field, NetworkField
from torchimplicit.recipes.physics.equations import EQUATIONS, Condition, Equation, EquationName
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.optimize import Array, Budget, Checkpointer, Clock, Enough
from torchimplicit.recipes.runtime.optimize import run as optimize
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run, quietly, threads
from torchimplicit.recipes.runtime.settings import OptimizerName, from_plain, not_negative, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Solve a differential equation by an equilibrium model, or by a plain network, from the equation alone."""

    equation: EquationName = "van-der-pol"
    """Which equation."""

    model: Literal["equilibrium", "network"] = "equilibrium"
    """z = tanh(Ax + Bz + b) with a linear head, or a perceptron with tanh."""

    states: int = 20
    """The size of the equilibrium's state."""

    width: int = 20
    """The width of the network's hidden layers."""

    depth: int = 2
    """How many hidden layers the network has."""

    points: int = 50
    """Collocation points at which the equation is asked for."""

    optimizer: OptimizerName = "least-squares"
    """A trust-region Gauss–Newton method with exact Jacobians, L-BFGS (both SciPy's), or Adam with a cosine."""

    iterations: int = 100
    """The most iterations of the optimizer."""

    seconds: float | None = None
    """Stop the optimizer after so much of the processor's time, measuring errors not counted."""

    learning_rate: float = 1e-2
    """Adam's peak learning rate."""

    error_every: int = 5
    """Iterations between two measurements of the error on the grid; with --seconds, they are spread over the time."""

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """The seed of the initial weights and the collocation points."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "states", "width", "depth", "points", "iterations", "learning_rate", "error_every", "seconds")
        not_negative(self, "seed", "threads")
        if self.points < 2:
            raise UserError(f"--points must be at least 2, and it is {self.points}")


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


# -- What is measured while a field is trained, and what comes out -----------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The state of a training.

    Attributes:
        iteration: iterations done.
        seconds: of the processor's time, spent in the optimizer until then.
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
    """A training so far; it travels in the checkpoint.

    Attributes:
        looks: in their order.
    """

    looks: list[Measurement] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        parameters: of the model.
        reference: the trusted solution.
        errors: on the grid, at the end.
        loss: at the end.
        iterations, seconds, residuals, jacobians, rejected: see :class:`History`.
        unconverged: share of the grid's points whose equilibrium was not found; zero for a network.
    """

    state: str
    parameters: int
    reference: str
    errors: dict[str, float]
    loss: float
    iterations: int
    seconds: float
    residuals: int
    jacobians: int
    rejected: int
    unconverged: float
    looks: list[Measurement]
    environment: Environment
    config: PhysicsConfig


# -- The residuals of an equation as one vector, with its exact Jacobian in the weights --------------------------------


class LeastSquares:
    """Half the sum of squares of weighted residuals: the loss ``sum_c weight_c mean(residual_c²)``, halved.

    All points are evaluated together, with all the derivatives that any condition asks for. The Jacobian's rows are
    gradients of single points: every point gets weights of its own, and one backward pass for each term of a residual
    gives the rows of all points.

    Attributes:
        evaluations, jacobians: how many there were.
        rejected: evaluations whose equilibria were not all found; their residuals are infinite.
    """

    def __init__(self, field: Field, conditions: Sequence[Condition]):
        self.field = field
        self.conditions = conditions
        self.parameters = dict(field.named_parameters())
        self.evaluations = self.jacobians = self.rejected = 0
        self.points = torch.cat([condition.points for condition in conditions])
        self.orders = tuple(dict.fromkeys(order for condition in conditions for order in condition.orders))

    @property
    def model(self) -> Field:
        """See :class:`~torchimplicit.recipes.runtime.optimize.Objective`."""
        return self.field

    @property
    def weights(self) -> Array:
        """The field's weights as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()]).numpy().copy()

    def set_weights(self, vector: Array) -> None:
        """Put a vector into the field."""
        with torch.no_grad():
            for p, part in zip(self.parameters.values(), self._parts(torch.as_tensor(vector)), strict=True):
                p.copy_(part)

    def residuals(self, vector: Array) -> Array:
        """All residuals, each times the root of its weight over their number."""
        self.evaluations += 1
        self.set_weights(vector)
        with torch.no_grad():
            found = torch.cat([residual.reshape(-1) for residual in self._residuals(None)]).numpy()
        if self.field.trusted:
            return found
        self.rejected += 1
        return np.full_like(found, np.inf)

    def jacobian(self, vector: Array) -> Array:
        """``[residuals, weights]``."""
        self.jacobians += 1
        whole = torch.as_tensor(vector)
        count = len(self.points)
        own = [part.expand(count, *part.shape).clone().requires_grad_() for part in self._parts(whole)]
        residuals = self._residuals(dict(zip(self.parameters, own, strict=True)))
        width = max(residual.shape[1] for residual in residuals)
        rows = []
        for term in range(width):
            total = torch.stack([r[:, term].sum() for r in residuals if r.shape[1] > term]).sum()
            grads = torch.autograd.grad(total, own, retain_graph=term + 1 < width)
            rows.append(torch.cat([g.reshape(count, -1) for g in grads], dim=1))
        blocks, start = [], 0
        for residual in residuals:
            number, terms = residual.shape
            blocks += [torch.stack([row[start : start + number] for row in rows[:terms]], dim=1).flatten(0, 1)]
            start += number
        return torch.cat(blocks).numpy()

    def loss(self) -> Tensor:
        """The loss at the field's present weights, for autograd."""
        self.evaluations += 1
        return 0.5 * torch.stack([residual.square().sum() for residual in self._residuals(None)]).sum()

    def loss_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Both, at some weights."""
        self.set_weights(vector)
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.parameters.values()))
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in grads]).numpy()

    def _residuals(self, weights: dict[str, Tensor] | None) -> list[Tensor]:
        """``[points, terms]`` of each condition."""
        fields = self.field.derivatives(self.points, self.orders, weights)
        found, start = [], 0
        for condition in self.conditions:
            there = slice(start, start + len(condition.points))
            residual = condition.residual(condition.points, {order: values[there] for order, values in fields.items()})
            found.append(residual * (condition.weight / len(residual)) ** 0.5)
            start = there.stop
        return found

    def _parts(self, whole: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters.values()]
        return [part.reshape(p.shape) for part, p in zip(whole.split(sizes), self.parameters.values(), strict=True)]


# -- The pictures of a solved equation, and its page -------------------------------------------------------------------


CAPTIONS = {
    "solution": "What was found (lines, or the field on the left), and the trusted solution (dots, or on the right).",
    "error": "The absolute error.",
    "training": "The loss and the relative error in the mean square, against iterations and against seconds.",
}


def figures(results: Results, equation: Equation, made: Field) -> dict[str, Figure]:
    """By the names of :data:`CAPTIONS`."""
    found, right = values(made, equation), equation.reference(equation.grid())
    gap = np.abs(found - right)
    with styled():
        if len(equation.inputs) == 1:
            drawn = {"solution": axes(), "error": axes()}
            solution, error = (plot for _, (plot,) in drawn.values())
            lines(solution, equation, found)
            for index, name in enumerate(equation.outputs):
                error.plot(equation.grid()[:, 0], np.maximum(gap[:, index], 1e-17), color=COLOURS[index], label=name)
            error.set(xlabel=equation.inputs[0], ylabel="absolute error", yscale="log")
            error.legend()
        else:
            both: dict[str, Any] = {"found": found[:, 0], "trusted": right[:, 0]}
            drawn = {"solution": axes(2, width=4.6, height=3.8), "error": axes(width=4.6, height=3.8)}
            for plot, (name, one) in zip(drawn["solution"][1], both.items(), strict=True):
                colours(plot, equation, one, name, cmap="RdBu_r")
            colours(drawn["error"][1][0], equation, gap[:, 0], "absolute error", cmap="viridis")
        return {**{name: figure for name, (figure, _) in drawn.items()}, "training": training(results)}


def training(results: Results) -> Figure:
    """The loss and the error along a training."""
    drawn, (by_iteration, by_time) = axes(2, width=5.2)
    looks, colour = results.looks, COLOURS[0]
    measured = [look for look in looks if np.isfinite(look.relative_l2)]
    by_iteration.plot([x.iteration for x in looks], [x.loss for x in looks], color=colour, linewidth=1, alpha=0.6)
    for plot, place in ((by_iteration, "iteration"), (by_time, "seconds")):
        x, error = [getattr(look, place) for look in measured], [look.relative_l2 for look in measured]
        plot.plot(x, error, color=colour, marker="o", markersize=3, label=results.config.model)
    by_iteration.set(xlabel="iteration", ylabel="relative error (dots), loss (thin)", yscale="log")
    by_time.set(xlabel="seconds", ylabel="relative error", yscale="log")
    by_iteration.legend()
    return drawn


def lines(plot: Axes, equation: Equation, found: Array) -> None:
    """A function of one coordinate on the equation's grid as lines, and the trusted one as dots."""
    grid = equation.grid()
    right, some = equation.reference(grid), slice(None, None, max(1, len(grid) // 25))
    for index, name in enumerate(equation.outputs):
        plot.plot(grid[:, 0], found[:, index], color=COLOURS[index], label=name)
        plot.plot(grid[some, 0], right[some, index], "o", color=COLOURS[index], markersize=3.5)
    plot.set(xlabel=equation.inputs[0])
    plot.legend()


def colours(plot: Axes, equation: Equation, found: Array, title: str, **look: Any) -> None:
    """A function of two coordinates on the equation's grid, ``[points]``, as a map with its scale."""
    first, second = (np.unique(equation.grid()[:, i]) for i in (0, 1))
    image = plot.pcolormesh(first, second, found.reshape(len(first), len(second)).T, rasterized=True, **look)
    plot.figure.colorbar(image, ax=plot)
    plot.set(xlabel=equation.inputs[0], ylabel=equation.inputs[1], title=title)
    plot.grid(False)


def write_report(results: Results, equation: Equation, made: Field, run: Run) -> None:
    """``figures/*.png`` and ``index.html``, which holds its pictures itself."""
    drawn = figures(results, equation, made)
    with styled():
        pictures = saved([CaptionedFigure(name, one, CAPTIONS[name]) for name, one in drawn.items()], run)
    said = ", ".join(f"{name} {value:.2e}" for name, value in results.errors.items())
    lead = (
        f"{results.config.model.capitalize()} of {results.parameters} weights, after {results.iterations} iterations "
        f"of {results.config.optimizer}: {said}, against {results.reference}."
    )
    run.write_text("index.html", document(equation.title, [lead], [Section(pictures=pictures)]))


# -- Trains a field, and shows what came out; see :class:`torchimplicit.recipes.runtime.run.Runner` --------------------


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
            box, outputs = (equation.low, equation.high), len(equation.outputs)
            if config.model == "equilibrium":
                return EquilibriumField(*box, outputs=outputs, states=config.states)
            return NetworkField(*box, outputs=outputs, width=config.width, depth=config.depth)
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
        history.looks.append(Measurement(history.iterations, history.seconds, loss, *found))

    limits = Budget(iterations=config.iterations, seconds=config.seconds, measure_every=config.error_every)
    keeper = Checkpointer(limits, problem, history, look, run, console)
    budget = f"{config.iterations} iterations" if config.seconds is None else f"{config.seconds:g} seconds"
    console.print(
        f"{equation.title}: {len(problem.weights)} weights, {config.points} collocation points, {budget} of "
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
    with _threads(config.threads), quietly():
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
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threads(count), threadpool_limits(count or None):
        yield


def _resumed(made: Field, run: Run) -> History:
    """What the checkpoint knows; its weights go into the field."""
    if not run.checkpoint.is_file():
        return History()
    from torchimplicit.recipes.runtime.fitting import read_checkpoint

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
    names = ["Model", "Weights", *results.errors, "Loss", "Iterations", "Seconds"]
    errors = [f"{error:.2e}" for error in (*results.errors.values(), results.loss)]
    row = [results.config.model, str(results.parameters), *errors, str(results.iterations), f"{results.seconds:.1f}"]
    return Table([Column(name) for name in names], [row])
