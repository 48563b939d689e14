"""Table: parameters of differential equations estimated from noisy values of their solutions, with error bars over
seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.physics.equation_file import given
from torchimplicit.recipes.physics.equations import INVERSE
from torchimplicit.recipes.physics.solve_equation import PhysicsConfig
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import COLOURS, axes
from torchimplicit.recipes.runtime.settings import positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

ModelName = Literal["equilibrium", "network"]


@dataclass(frozen=True, kw_only=True)
class PhysicsInverseConfig:
    """Parameters of differential equations estimated from noisy values, by equilibrium models and plain networks."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=5, together=20))

    equations: tuple[str, ...] = tuple(INVERSE)
    """Equations with unknown parameters: built-in names, or Python files of your own."""

    models: tuple[ModelName, ...] = ("equilibrium", "network")
    """Models to compare."""

    iterations: int = 40
    """Gauss–Newton iterations."""

    ordinary_points: int = 50
    """Collocation points for an ordinary differential equation."""

    partial_points: int = 300
    """Collocation points for a partial differential equation."""

    bound: float | None = None
    """Upper bound on the Frobenius norm of the equilibrium's coupling matrix. Default: none."""

    def __post_init__(self) -> None:
        positive(self, "iterations", "ordinary_points", "partial_points", "bound")


@dataclass(frozen=True)
class Row:
    """A model on an equation."""

    equation: str
    model: ModelName


def rows(config: PhysicsInverseConfig) -> list[Row]:
    """The rows, equation by equation."""
    return [Row(equation, model) for equation in config.equations for model in config.models]


def settings_of(config: PhysicsInverseConfig, row: Row, seed: int) -> PhysicsConfig:
    """The settings of a run."""
    ordinary = len(given(row.equation).equation.inputs) == 1
    return PhysicsConfig(
        equation=row.equation,
        model=row.model,
        bound=config.bound if row.model == "equilibrium" else None,
        points=config.ordinary_points if ordinary else config.partial_points,
        iterations=config.iterations,
        error_every=config.iterations,
        seed=seed,
        page=False,
    )


def jobs(config: PhysicsInverseConfig) -> list[Job]:
    """All jobs, with seeds outermost."""
    return [
        Job(
            f"{place}-{row.model}-{seed}",
            "physics-equation",
            settings_of(config, row, seed),
            {"row": row, "seed": seed},
        )
        for seed in config.plan.all_seeds
        for place, row in ((config.equations.index(row.equation), row) for row in rows(config))
    ]


def figures(config: PhysicsInverseConfig, run: Run) -> dict[str, Any] | None:
    """The estimates of a finished run, and the true values if the equation gives them."""
    one = table.read("results.json")(config, run)
    if one is None or one["state"] != "complete":
        return None
    stated = given(one["config"]["equation"]).equation
    kept = ("unknown", "errors", "loss", "validation", "unconverged", "seconds")
    return {**{name: one[name] for name in kept}, "title": stated.title, "true": dict(stated.true)}


def there(config: PhysicsInverseConfig, runs: Runs) -> list[Row]:
    """The rows that have runs."""
    return [row for row in rows(config) if runs.where(row=row)]


def noise(row: Row) -> str:
    """The noise of a built-in equation's values, in percent."""
    return f"{100 * INVERSE[row.equation][1]:.0f} %" if row.equation in INVERSE else table.NONE


def sheets(config: PhysicsInverseConfig, runs: Runs) -> Iterator[TitledTable]:
    """One table, with a row for every parameter of an equation."""
    unknowns = [(row, name) for row in there(config, runs) for name in runs.of(row, "unknown")[0]]
    if not unknowns:
        return

    def of(pair: tuple[Row, str]) -> list[float]:
        return runs.of(pair[0], f"unknown.{pair[1]}")

    def true(pair: tuple[Row, str]) -> float | None:
        known = runs.of(pair[0], f"true.{pair[1]}")
        return known[0] if known else None

    def bias(pair: tuple[Row, str]) -> str:
        right, each = true(pair), of(pair)
        if right is None:
            return table.NONE
        return f"{fmean(each) - right:+.1e}"

    def error(pair: tuple[Row, str]) -> str:
        values = runs.of(pair[0], "errors.relative_l2")
        return f"{median(values):.1e}" if values else table.NONE

    yield table.sheet("Estimated parameters", unknowns, [
        Cell("Equation", lambda pair: runs.of(pair[0], "title")[0]),
        Cell("Model", lambda pair: pair[0].model),
        Cell("Noise", lambda pair: noise(pair[0]), "",
             "Standard deviation of the noise in the given values, relative to the values' own."),
        Cell("Parameter", lambda pair: pair[1]),
        Cell("True", lambda pair: table.NONE if true(pair) is None else f"{true(pair):.5g}", "",
             "Value of the parameter with which the given values were made."),
        Cell("Found", lambda pair: f"{fmean(of(pair)):.5g}", "", "Estimate of the parameter, mean over the seeds."),
        Cell("Deviation", lambda pair: f"{stdev(of(pair)):.1e}" if len(of(pair)) > 1 else table.NONE, "",
             "Standard deviation of the estimate over the seeds, which differ in initial weights, points and noise."),
        Cell("Bias", bias, "", "Mean of the estimates less the true value."),
        Cell("Relative error (L2)", error, "",
             "L2 norm of the solution's error, divided by that of the reference solution; median over the seeds."),
        Cell("Held-out loss", lambda pair: f"{median(runs.of(pair[0], 'validation') or [float('nan')]):.1e}", "",
             "Loss at collocation points that were not trained on, median over the seeds."),
        Cell("Seeds", lambda pair: str(len(of(pair))), "", "Number of finished runs."),
    ])  # fmt: skip


def claims(config: PhysicsInverseConfig, runs: Runs) -> Iterator[Claim]:
    """The estimates agree with the true values within the error bars, for both models."""
    for row in there(config, runs):
        for name in runs.of(row, "unknown")[0]:
            known, each = runs.of(row, f"true.{name}"), runs.of(row, f"unknown.{name}")
            if known and len(each) > 1:
                off, bar = fmean(each) - known[0], stdev(each) / len(each) ** 0.5
                exact = noise(row) == "0 %"
                yield Claim(
                    f"{runs.of(row, 'title')[0]}, {row.model}, {noise(row)} noise: "
                    + ("the estimate of every seed" if exact else "the mean estimate")
                    + f" is within {'1 %' if exact else 'three standard errors'} of the true {name}",
                    f"{fmean(each):.5g} ± {bar:.1e} (mean and standard error), the true value is {known[0]:.5g}",
                    max(abs(one - known[0]) for one in each) <= 0.01 * abs(known[0]) if exact else abs(off) <= 3 * bar,
                )


def protocol(config: PhysicsInverseConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    return (
        f"Weights and parameters are fitted together by {config.iterations} iterations of Gauss–Newton, to the "
        f"equation at {config.ordinary_points} collocation points (ordinary) or {config.partial_points} (partial) and "
        f"to noisy values of its solution. There are {config.plan.seeds} seeds, each with its own initial weights, "
        "points and noise; everything is in double precision. The oscillator has 30 values of the first component and "
        "no initial condition. Burgers' equation has 100 scattered values beside its initial and boundary conditions, "
        "and the logarithm of the viscosity is estimated. The equilibrium has 20 states and "
        f"{'no bound' if config.bound is None else f'the bound {config.bound:g}'}; the network has two hidden layers "
        "of width 20."
    )


def notes(config: PhysicsInverseConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "The standard deviation over the seeds is the error bar of one estimate. It covers noise, collocation points "
        "and initial weights, and not an error in the equation."
    )
    lost = max(runs.column("unconverged"), default=0.0)
    yield (
        f"At most {lost:.1%} of the points of the evaluation grid are without an equilibrium after training, over all "
        "runs."
    )
    yield from table.left_out(jobs(config), runs, "not done or diverged, and left out")


def drawings(config: PhysicsInverseConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Every seed's estimate and the true value, a panel per equation."""
    names: dict[str, list[Row]] = {}
    for row in there(config, runs):
        names.setdefault(runs.of(row, "title")[0], []).append(row)
    if not names:
        return
    figure, panels = axes(len(names), width=4.6, height=3.6)
    for panel, (title, rows_of) in zip(panels, names.items(), strict=True):
        parameter = next(iter(runs.of(rows_of[0], "unknown")[0]))
        for place, row in enumerate(rows_of):
            each = runs.of(row, f"unknown.{parameter}")
            colour = COLOURS[config.models.index(row.model)]
            spread = stdev(each) if len(each) > 1 else 0.0
            panel.plot([place] * len(each), each, "o", color=colour, markersize=3, alpha=0.5)
            panel.errorbar([place + 0.15], [fmean(each)], [spread], color=colour, marker="s", markersize=4, capsize=3)
        if known := runs.of(rows_of[0], f"true.{parameter}"):
            panel.axhline(known[0], color="black", linewidth=1, linestyle=":")
        panel.set(title=title, ylabel=parameter)
        panel.set_xticks(range(len(rows_of)), [f"{row.model}\n{noise(row)}" for row in rows_of], fontsize=7)
    yield CaptionedFigure(
        "parameters",
        figure,
        "Estimated parameter of every seed (dots), mean and standard deviation over the seeds (squares), and the true "
        "value (dotted line), by model and noise.",
    )


TABLE = table.published(
    globals(),
    title="Parameters of differential equations from noisy values",
    source="An inverse problem as in Raissi et al. 2019, for equilibrium models and plain networks. Nothing is "
    "published for equilibrium models.",
)
