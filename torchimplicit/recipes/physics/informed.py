"""Table: physics-informed equilibrium models and plain networks on four equations with three optimizers, at equal time
and at equal iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchimplicit.recipes.physics.equations import EQUATIONS, EquationName
from torchimplicit.recipes.physics.solve_equation import OPTIMIZERS, PhysicsConfig
from torchimplicit.recipes.physics.statement import MEASURES
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import COLOURS, axes, legend_beside
from torchimplicit.recipes.runtime.settings import positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchimplicit.recipes.runtime.optimize import Array
    from torchimplicit.recipes.runtime.run import Run

OptimizerName = Literal["least-squares", "l-bfgs", "adam"]


@dataclass(frozen=True, kw_only=True)
class PhysicsInformedConfig:
    """Equilibrium models with 5 and 20 states, unconstrained and bounded, compared with plain networks."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=3, together=15))

    equations: tuple[EquationName, ...] = ("van-der-pol", "four-tanks", "burgers", "helmholtz")
    """Equations to solve."""

    optimizers: tuple[OptimizerName, ...] = ("least-squares", "l-bfgs", "adam")
    """Optimizers to compare; least-squares is Gauss–Newton."""

    ordinary_seconds: float = 3.0
    """CPU time of a run on an ordinary differential equation, in seconds."""

    partial_seconds: float = 7.0
    """CPU time of a run on a partial differential equation, in seconds."""

    ordinary_points: int = 50
    """Collocation points for an ordinary differential equation."""

    partial_points: int = 400
    """Collocation points for a partial differential equation."""

    equal_iterations: int = 40
    """Gauss–Newton iterations after which all models are also compared."""

    def __post_init__(self) -> None:
        positive(self, "ordinary_seconds", "partial_seconds", "ordinary_points", "partial_points", "equal_iterations")


ENDLESS = 10**9
"""Number of iterations that no run reaches: runs end by their time."""

THESIS_POINTS, THESIS_RATE, THESIS_SECONDS = 100_000, 1e-3, 3600.0
"""Settings of ``--scale paper``: collocation points and learning rate of the thesis, and seconds per run."""


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        label: label to display.
        states: number of states of the equilibrium; ``None`` for a network.
        bound: bound of the equilibrium's coupling.
        width, depth: width and depth of the network's hidden layers.
    """

    label: str
    states: int | None = None
    width: int = 20
    depth: int = 2
    bound: float | None = None


MODELS = {
    "equilibrium-5": Model("equilibrium, 5 states", states=5),
    "equilibrium-5-bound-1": Model("equilibrium, 5 states, bound 1", states=5, bound=1.0),
    "network-5": Model("network, 2 × 5", width=5),
    "equilibrium-20": Model("equilibrium, 20 states", states=20),
    "equilibrium-20-bound-2": Model("equilibrium, 20 states, bound 2", states=20, bound=2.0),
    "equilibrium-20-bound-1": Model("equilibrium, 20 states, bound 1", states=20, bound=1.0),
    "network-20": Model("network, 2 × 20", width=20),
    "network-thesis": Model("network, 4 × 20", width=20, depth=4),
}
"""The models. A network with two hidden layers has as many weights as the equilibrium of its width, and one more bias
vector; the last is the plain network of the thesis."""

MEASURE = {"van-der-pol": "iae", "four-tanks": "relative_l2", "burgers": "relative_l2", "helmholtz": "relative_l2"}
"""Error measure of an equation. The thesis reports the integral of the absolute error (IAE)."""

NOTES = {
    "iae": "Integral of the absolute error, summed over the components,",
    "relative_l2": "L2 norm of the error on the evaluation grid, divided by that of the reference solution,",
}
"""Definitions of the measures."""

AIMS = {5: 1e-2, 20: 1e-3}
"""Published IAE on the Van der Pol oscillator, by number of states."""


@dataclass(frozen=True)
class Row:
    """A model with an optimizer on an equation."""

    equation: EquationName
    model: str
    optimizer: OptimizerName

    @property
    def label(self) -> str:
        """The row's label."""
        return f"{MODELS[self.model].label}; {OPTIMIZERS[self.optimizer]}"


def equations(config: PhysicsInformedConfig) -> tuple[EquationName, ...]:
    """The equations; with ``--scale paper`` only the thesis's."""
    return config.equations if config.plan.scale == "cpu" else ("van-der-pol",)


def optimizers(config: PhysicsInformedConfig) -> tuple[OptimizerName, ...]:
    """The optimizers; with ``--scale paper`` only the thesis's."""
    return config.optimizers if config.plan.scale == "cpu" else ("adam",)


def ordinary(equation: EquationName) -> bool:
    """Return whether the equation has one coordinate."""
    return len(EQUATIONS[equation].inputs) == 1


def settings_of(
    config: PhysicsInformedConfig, equation: EquationName, model: str, optimizer: OptimizerName, seed: int
) -> PhysicsConfig:
    """The settings of a run."""
    chosen, paper = MODELS[model], config.plan.scale == "paper"
    seconds = config.ordinary_seconds if ordinary(equation) else config.partial_seconds
    points = config.ordinary_points if ordinary(equation) else config.partial_points
    return PhysicsConfig(
        equation=equation,
        model="network" if chosen.states is None else "equilibrium",
        states=chosen.states or 20,
        bound=chosen.bound,
        width=chosen.width,
        depth=chosen.depth,
        points=THESIS_POINTS if paper else points,
        optimizer=optimizer,
        iterations=ENDLESS,
        seconds=THESIS_SECONDS if paper else seconds,
        learning_rate=THESIS_RATE if paper else 1e-2,
        error_at=(config.equal_iterations,) if optimizer == "least-squares" else (),
        seed=seed,
        page=False,
    )


def rows(config: PhysicsInformedConfig, equation: EquationName) -> list[Row]:
    """The rows of an equation, optimizer by optimizer. Bounded models are run with Gauss–Newton only, the recommended
    optimizer."""
    return [
        Row(equation, name, optimizer)
        for optimizer in optimizers(config)
        for name, model in MODELS.items()
        if optimizer == "least-squares" or model.bound is None
    ]


def jobs(config: PhysicsInformedConfig) -> list[Job]:
    """All jobs: ordinary equations first, as they are short; then seeds outermost and models innermost, so that a slow
    phase of the machine affects all models."""
    return [
        Job(
            f"{equation}-{row.model}-{row.optimizer}-{seed}",
            f"physics-{equation}",
            settings_of(config, equation, row.model, row.optimizer, seed),
            {"row": row, "equation": equation, "seed": seed},
        )
        for short in (True, False)
        for seed in config.plan.all_seeds
        for equation in equations(config)
        if ordinary(equation) == short
        for row in rows(config, equation)
    ]


def figures(config: PhysicsInformedConfig, run: Run) -> dict[str, Any] | None:
    """Figures of a finished run."""
    one = table.read("results.json")(config, run)
    if one is None or one["state"] != "complete":
        return None
    names = {"residuals": "residual_evaluations", "jacobians": "jacobian_evaluations"}
    kept = ("loss", "validation", "parameters", "iterations", "seconds", "residuals", "jacobians", "rejected")
    figures_of = {names.get(name, name): one[name] for name in (*kept, "unconverged")}
    same: dict[str, Any] = next((look for look in one["looks"] if look["iteration"] == config.equal_iterations), {})
    return {**one["errors"], **figures_of, "equal": {name: same.get(name) for name in MEASURES}}


def errors(runs: Runs, row: Row) -> list[float]:
    """The errors of all seeds, in the equation's measure."""
    return runs.of(row, MEASURE[row.equation])


def held_out(runs: Runs, row: Row) -> float:
    """Median over the seeds of the loss at held-out points; infinite if equilibria were not found."""
    losses = [line["validation"] for line in runs.where(row=row)]
    return median(math.inf if loss is None else loss for loss in losses)


def middle(runs: Runs, path: str) -> Callable[[Row], float]:
    """The median of a figure over a row's seeds."""
    return lambda row: median(runs.of(row, path))


def pace(runs: Runs, row: Row) -> float:
    """Milliseconds per iteration."""
    return 1000 * median(line["seconds"] / max(1, line["iterations"]) for line in runs.where(row=row))


def there(config: PhysicsInformedConfig, runs: Runs, equation: EquationName) -> list[Row]:
    """The rows of an equation that have runs."""
    return [row for row in rows(config, equation) if runs.where(row=row)]


def sheets(config: PhysicsInformedConfig, runs: Runs) -> Iterator[TitledTable]:
    """A table per equation."""
    for equation in equations(config):
        if there(config, runs, equation):
            yield sheet(config, runs, equation)


def sheet(config: PhysicsInformedConfig, runs: Runs, equation: EquationName) -> TitledTable:
    """The errors on one equation; below them, those of a constant."""
    measure = MEASURE[equation]
    also = runs.where(equation=equation).column("iae")
    other = "relative_l2" if measure == "iae" else "iae" if also else None
    still = constant(equation)
    constants = {MEASURES[measure]: still[measure], **({MEASURES[other]: still[other]} if other else {})}

    def cell(title: str, of: Callable[[Row], str], unit: str = "", note: str = "") -> Cell[Row | None]:
        last = "constant (the start, or zero)" if title == "Model and optimizer" else table.NONE
        if title in constants:
            last = f"{constants[title]:.1e}"
        return Cell(title, lambda row: last if row is None else of(row), unit, note)

    cells = [
        cell("Model and optimizer", lambda row: row.label),
        cell("Weights", lambda row: str(runs.of(row, "parameters")[0]), "", "Number of trained weights."),
        cell(MEASURES[measure], lambda row: f"{median(errors(runs, row)):.1e}", "",
             f"{NOTES[measure]} at the end of training, median over the seeds."),
        cell("Least–largest", lambda row: f"{min(errors(runs, row)):.1e} – {max(errors(runs, row)):.1e}", "",
             "Smallest and largest of these errors over the seeds."),
        *([cell(MEASURES[other], lambda row: f"{median(runs.of(row, other)):.1e}", "",
                f"{NOTES[other]} at the end of training, median over the seeds.")] if other else []),
        cell(f"After {config.equal_iterations} iterations", lambda row: _equal(runs, row), "",
             f"{MEASURES[measure]} after {config.equal_iterations} iterations of Gauss–Newton, median over the seeds."),
        cell("Loss", lambda row: f"{middle(runs, 'loss')(row):.1e}", "",
             "Training loss at the end, median over the seeds."),
        cell("Held-out loss", lambda row: f"{held_out(runs, row):.1e}", "",
             "Loss at collocation points that were not trained on, median over the seeds."),
        cell("Iterations", lambda row: f"{middle(runs, 'iterations')(row):.0f}", "",
             "Iterations of the optimizer, median over the seeds."),
        cell("Iteration time", lambda row: f"{pace(runs, row):.1f}", "ms",
             "CPU time of an iteration, median over the seeds."),
        cell("Training time", lambda row: f"{middle(runs, 'seconds')(row):.1f}", "s",
             "CPU time of the training, median over the seeds; below the budget where the optimizer ended by itself."),
        cell("Not found", lambda row: f"{max(runs.of(row, 'unconverged')):.1%}", "",
             "Points of the evaluation grid at which no equilibrium was found after training, the largest share of any "
             "seed."),
        cell("Seeds", lambda row: str(len(runs.where(row=row))), "", "Number of finished runs."),
    ]  # fmt: skip
    return table.sheet(EQUATIONS[equation].title, [*there(config, runs, equation), None], cells)


def _equal(runs: Runs, row: Row) -> str:
    values = runs.of(row, f"equal.{MEASURE[row.equation]}")
    return f"{median(values):.1e}" if values else table.NONE


def constant(equation: EquationName) -> dict[str, float]:
    """The errors of a constant: the initial value of an initial value problem, otherwise zero."""
    stated = EQUATIONS[equation]
    grid = stated.points()
    right = stated.reference(grid)
    assert right is not None
    return stated.errors(np.tile(right[:1] if ordinary(equation) else np.zeros((1, right.shape[1])), (len(grid), 1)))


def best(runs: Runs, some: list[Row], kind: str, states: int) -> Row | None:
    """The row of a kind and size with the least held-out loss. The error must not be used to select."""
    trained = [
        row
        for row in some
        if row.model == f"network-{states}" or (kind == "equilibrium" and row.model.startswith(f"equilibrium-{states}"))
    ]
    trained = [row for row in trained if row.model.startswith(kind)]
    return min(trained, key=lambda row: held_out(runs, row)) if trained else None


def claims(config: PhysicsInformedConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether the targets are met, then whether the equilibrium is more accurate than the network of its size."""
    for states, aim in AIMS.items():
        for row in there(config, runs, "van-der-pol"):
            if row.model == f"equilibrium-{states}":
                seconds = settings_of(config, row.equation, row.model, row.optimizer, 0).seconds
                medians = errors(runs, row)
                yield Claim(
                    f"Van der Pol oscillator: the equilibrium with {states} states reaches an IAE of at most {aim:g} "
                    f"by {OPTIMIZERS[row.optimizer]} in {seconds:g} s with every seed",
                    f"the largest of {len(medians)} seeds is {max(medians):.1e}, the median {median(medians):.1e}",
                    max(medians) <= aim,
                )
    for equation in equations(config):
        rows = there(config, runs, equation)
        title = EQUATIONS[equation].title
        for states in AIMS:
            pair = [best(runs, rows, kind, states) for kind in ("equilibrium", "network")]
            yield from _compared(
                f"{title}: in equal time, the equilibrium with {states} states is at least as accurate as the network "
                "of its size, each with the bound and optimizer of the least held-out loss",
                runs,
                pair,
                MEASURE[equation],
            )
            newton = [row for row in rows if row.optimizer == "least-squares"]
            pair = [best(runs, newton, kind, states) for kind in ("equilibrium", "network")]
            yield from _compared(
                f"{title}: after {config.equal_iterations} Gauss–Newton iterations, the equilibrium with {states} "
                "states is at least as accurate as the network of its size, each with the bound of the least held-out "
                "loss",
                runs,
                pair,
                f"equal.{MEASURE[equation]}",
            )
        free, bounded = (Row(equation, f"equilibrium-20{name}", "least-squares") for name in ("", "-bound-1"))
        if free in rows and bounded in rows:
            yield from _compared(
                f"{title}: in equal time, the equilibrium with 20 states is at least as accurate without a bound as "
                "with bound 1",
                runs,
                [free, bounded],
                MEASURE[equation],
            )
    free_runs = [line for line in runs if MODELS[line["row"].model].states and MODELS[line["row"].model].bound is None]
    if free_runs:
        worst = max(line["unconverged"] for line in free_runs)
        yield Claim(
            "Without a bound, an equilibrium is found at every point of the evaluation grid after every training",
            f"the largest share of points without one is {worst:.1%} in {len(free_runs)} runs",
            worst == 0,
        )


def _compared(statement: str, runs: Runs, pair: list[Row | None], path: str) -> Iterator[Claim]:
    rows = [row for row in pair if row is not None]
    errors_of = [runs.of(row, path) for row in rows]
    if len(rows) == 2 and all(errors_of):
        medians = [median(each) for each in errors_of]
        texts = [f"{e:.1e} ({row.label})" for e, row in zip(medians, rows, strict=True)]
        yield Claim(statement, f"median errors {' against '.join(texts)}", medians[0] <= medians[1])


def protocol(config: PhysicsInformedConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    parts = []
    for equation in equations(config):
        chosen = settings_of(config, equation, "equilibrium-5", optimizers(config)[0], 0)
        parts.append(f"{EQUATIONS[equation].title}: {chosen.seconds:g} s and {chosen.points} points")
    rate = settings_of(config, equations(config)[0], "equilibrium-5", "adam", 0).learning_rate
    ways = {
        "least-squares": "Gauss–Newton is SciPy's trust region (trf) with exact Jacobians",
        "l-bfgs": "L-BFGS is SciPy's with 30 pairs",
        "adam": f"Adam's learning rate is {rate:g}, with a cosine over the time",
    }
    return (
        "On each equation, every model and optimizer gets the same CPU time on one core and the same collocation "
        f"points, all of them in every iteration ({'; '.join(parts)}). Every row has {config.plan.seeds} seeds, in "
        f"double precision. {'; '.join(ways[name] for name in optimizers(config))}. Errors are measured against "
        "reference solutions that no model has seen: SciPy's DOP853 to 1e-12 for the ordinary equations, the Cole–Hopf "
        "transform for Burgers' equation and a closed form for Helmholtz' equation."
    )


def notes(config: PhysicsInformedConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    paces = []
    for equation in equations(config):
        title, ranked = EQUATIONS[equation].title, sorted(there(config, runs, equation), key=middle(runs, "loss"))
        sentences = []
        for kind in ("equilibrium", "network"):
            of_kind = [row for row in ranked if (MODELS[row.model].states is None) == (kind == "network")]
            for row in of_kind[:1]:
                sentences.append(
                    f"the {kind} with the least training loss ({row.label}) has a median error of "
                    f"{median(errors(runs, row)):.1e}"
                )
        if sentences:
            yield f"{title}: {', '.join(sentences)}."
        one, other = (Row(equation, f"{kind}-20", "least-squares") for kind in ("equilibrium", "network"))
        if one in ranked and other in ranked:
            paces.append(f"{title} {pace(runs, one):.0f} against {pace(runs, other):.0f} ms")
    if paces:
        yield (
            "Time of a Gauss–Newton iteration with 20 states, the equilibrium against the network of its size: "
            f"{', '.join(paces)}. In an iteration, an equilibrium model solves for its equilibrium and one linear "
            "system for each derivative and each gradient; a network solves nothing."
        )
    rejected = sum(runs.column("rejected"))
    yield (
        "A bound limits the Frobenius norm of the coupling matrix B. With bound 1 the map contracts for all weights "
        "that an optimizer may try, and the model is nearly a single layer. Without a bound, an equilibrium is "
        "followed from one step of the weights to the next and to nearby points, and a step that loses one is "
        f"rejected; this happened {rejected} times over all runs. The thesis penalizes the Jacobian instead."
    )
    yield (
        "The published comparison is of the Van der Pol oscillator alone, by Adam: plain networks can reach the lower "
        "error, as they do here, and the equilibrium is called competitive. There is no published table to compare "
        "with."
    )
    yield (
        "Times are CPU times on one core and do not include the measurement of errors. Every run counts, with its last "
        "weights; nothing is selected by the error."
    )
    yield (
        "The loss is that of the thesis without its Jacobian penalty: the mean square of the initial or boundary "
        "residual (ten times that for Helmholtz' equation) plus a tenth of the mean square of the equation's residual. "
        "There are fewer points than in the thesis and they stay the same, since Gauss–Newton needs one vector of "
        "residuals. Adam's learning rate is higher than in the thesis and follows a cosine."
    )
    order = [row for equation in equations(config) for row in rows(config, equation)]
    asked = sorted(jobs(config), key=lambda job: (order.index(job.key["row"]), job.key["seed"]))
    yield from table.left_out(asked, runs, "not done or diverged, and left out")


def drawings(config: PhysicsInformedConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Solution and error, and the error against time, for each equation."""
    from torchimplicit.recipes.physics.solve_equation import restored, values

    optimizer, seed = optimizers(config)[0], config.plan.first_seed
    for equation in equations(config):
        if not there(config, runs, equation):
            continue
        title = EQUATIONS[equation].title
        shown: dict[str, Array] = {}
        for line in runs.where(equation=equation, seed=seed):
            if line["row"].optimizer == optimizer:
                settings = settings_of(config, equation, line["row"].model, optimizer, seed)
                shown[line["row"].model] = values(restored(settings, folders[line.name]), EQUATIONS[equation])
        if shown:
            caption = f"{title}: solution and error of models trained by {OPTIMIZERS[optimizer]} with seed {seed}."
            figure = (_lines if ordinary(equation) else _maps)(equation, shown)
            yield CaptionedFigure(f"{equation}-solution", figure, caption)
        caption = (
            f"{title}: error of every run against CPU time. Lines of plain networks are dashed, those of bounded "
            "equilibria dotted."
        )
        yield CaptionedFigure(
            f"{equation}-seconds", against_seconds(runs.where(equation=equation), folders, equation), caption
        )


def against_seconds(runs: Runs, folders: Mapping[str, Run], equation: EquationName) -> Figure:
    """The error during the runs, a panel per optimizer, a line per run."""
    shown = [optimizer for optimizer in OPTIMIZERS if any(line["row"].optimizer == optimizer for line in runs)]
    figure, panels = axes(len(shown), width=5.4, height=3.7)
    for panel, optimizer in zip(panels, shown, strict=True):
        named: set[str] = set()
        for line in (line for line in runs if line["row"].optimizer == optimizer):
            model = line["row"].model
            looks = folders[line.name].read_json("results.json")["looks"]
            seconds, values = ([look[name] for look in looks] for name in ("seconds", MEASURE[equation]))
            label = None if model in named else MODELS[model].label
            panel.plot(seconds, values, linewidth=1.1, label=label, **_look(model))
            named.add(model)
        panel.set(title=OPTIMIZERS[optimizer], xscale="log", yscale="log", xlabel="CPU seconds")
    low = min(panel.get_ylim()[0] for panel in panels)
    high = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(low, high)
    panels[0].set_ylabel(MEASURES[MEASURE[equation]])
    legend_beside(panels[-1])
    return figure


def _lines(name: EquationName, predictions: dict[str, Array]) -> Figure:
    from torchimplicit.recipes.physics.pictures import lines

    equation = EQUATIONS[name]
    grid = equation.points()
    right = equation.reference(grid)
    assert right is not None
    shown = "equilibrium-5" if "equilibrium-5" in predictions else next(iter(predictions))
    figure, (left, other) = axes(2, width=5.4)
    lines(left, equation, predictions[shown])
    left.set_title(f"{MODELS[shown].label} (lines), reference (dots)")
    for model, prediction in predictions.items():
        gap = np.maximum(np.abs(prediction - right).max(1), 1e-17)
        other.plot(grid[:, 0], gap, linewidth=1.2, label=MODELS[model].label, **_look(model))
    other.set(xlabel=next(iter(equation.inputs)), yscale="log", title="largest absolute error of a component")
    legend_beside(other)
    return figure


def _maps(name: EquationName, predictions: dict[str, Array]) -> Figure:
    from torchimplicit.recipes.physics.pictures import colours

    equation = EQUATIONS[name]
    right = equation.reference(equation.points())
    assert right is not None
    chosen: list[str] = [
        model for model in ("equilibrium-20", "equilibrium-20-bound-1", "network-20") if model in predictions
    ]
    chosen = chosen or list(predictions)[:2]
    gaps = {model: np.log10(np.maximum(np.abs(predictions[model] - right)[:, 0], 1e-12)) for model in chosen}
    low = min(float(np.quantile(gap, 0.05)) for gap in gaps.values())
    high = max(float(gap.max()) for gap in gaps.values())
    figure, (first, *others) = axes(1 + len(gaps), width=4.4, height=3.6)
    title = f"{MODELS[chosen[0]].label}: solution"
    colours(first, equation, predictions[chosen[0]][:, 0], title, cmap="RdBu_r")
    for plot, (model, gap) in zip(others, gaps.items(), strict=True):
        title = f"{MODELS[model].label}: log₁₀ of the error"
        colours(plot, equation, gap, title, cmap="viridis", vmin=low, vmax=high)
    return figure


def _look(model: str) -> dict[str, Any]:
    """The model's style: networks are dashed, bounded equilibria dotted."""
    return {
        "color": COLOURS[list(MODELS).index(model)],
        "linestyle": "--" if not MODELS[model].states else ":" if MODELS[model].bound else "-",
    }


TABLE = table.published(
    globals(),
    title="Physics-informed equilibrium models beside plain networks",
    source="Pacheco and Camponogara 2024 (arXiv 2406.03472): the Van der Pol oscillator. Raissi et al. 2019: plain "
    "networks. The other equations are further tests.",
)
