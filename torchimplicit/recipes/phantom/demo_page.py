"""The page of the gradient estimators on digits: figures and explanations for newcomers."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from torchimplicit.recipes.phantom.demo import (
    ESTIMATORS,
    DigitsConfig,
    EstimatorName,
    EstimatorResult,
    Results,
    summary_table,
)
from torchimplicit.recipes.runtime.page import Section, canvas, document, saved, style, styled
from torchimplicit.recipes.runtime.table import CaptionedFigure, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchimplicit.recipes.runtime.run import Run

GREY: dict[str, Any] = {"color": "#6b7280", "linewidth": 0.9, "linestyle": "--"}


def look(name: EstimatorName) -> dict[str, Any]:
    """The style of an estimator: colour, line and marker each identify it on their own."""
    return style(list(ESTIMATORS).index(name))


# -- The pictures of a run, and how to read each -----------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        title: what it shows.
        reading: how a newcomer reads it.
        draw: into axes.
        numbers, of: what its figures in this run are, and those of an estimator; ``None`` where it has none.
    """

    title: str
    reading: str
    draw: Callable[[Axes, Results], None]
    numbers: str
    of: Callable[[EstimatorResult, Results], str | None]

    def now(self, results: Results) -> str:
        """A sentence with its figures in this run."""
        pictures = {one.label: self.of(one, results) for one in results.estimators.values()}
        return f"{self.numbers} " + "; ".join(f"{name} {text}" for name, text in pictures.items() if text is not None)


def loss_against_time(axes: Axes, results: Results) -> None:
    """Every step's loss, faint, and its running mean."""
    for name, result in results.estimators.items():
        seconds = list(accumulate(step.seconds for step in result.track.steps))
        loss, plain = [step.loss for step in result.track.steps], {**look(name), "marker": ""}
        axes.plot(seconds, loss, **{**plain, "linestyle": "-"}, linewidth=0.6, alpha=0.25)
        axes.plot(seconds, smoothed(loss), **plain, label=result.label)
    axes.set(xlabel="time in training steps (s)", ylabel="training loss (nats)", yscale="log")
    axes.set_xlim(left=0)


def residual_against_iteration(axes: Axes, results: Results) -> None:
    """Median over samples for both solvers, with the band from the 10 % to the 90 % quantile for the first."""
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, str] = {}
    for name, result in results.estimators.items():
        colour = look(name)["color"]
        for profile in result.profiles:
            iterations = range(len(profile.median))
            line = lines.setdefault(profile.solver, ":" if lines else "-")
            if line == "-":
                axes.fill_between(iterations, profile.low, profile.high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(iterations, profile.median, color=colour, linestyle=line)
        axes.plot([], [], color=colour, label=result.label)
    for solver, line in lines.items():
        axes.plot([], [], color="#4b5563", linestyle=line, label=solver)
    level = results.config.tolerance
    axes.axhline(level, **GREY)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 3), "textcoords": "offset points"}
    axes.annotate("tolerance", (1, level), **place, ha="right", color=GREY["color"], fontsize=8)
    axes.set(xlabel="solver iteration", ylabel="relative residual ‖f(z) − z‖ / ‖f(z)‖", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)


def along(of: str, figure: str, label: str, scale: float = 1.0, one: bool = True) -> Callable[[Axes, Results], None]:
    """A plot of a figure of audits or validations against steps, with an optional reference line at one."""

    def draw(axes: Axes, results: Results) -> None:
        for name, result in results.estimators.items():
            track = getattr(result.track, of)
            values = [scale * getattr(each, figure) for each in track]
            axes.plot([each.step for each in track], values, **look(name), label=result.label)
        if one:
            axes.axhline(1, **GREY)
        axes.set(xlabel="training step", ylabel=label)
        if figure == "spectral_radius":
            axes.set_ylim(bottom=0)

    return draw


def reached(result: EstimatorResult, results: Results) -> str:
    """Iterations after which the median sample reaches the tolerance, for every solver."""
    texts = []
    for profile in result.profiles:
        hits = [i for i, value in enumerate(profile.median) if value <= results.config.tolerance]
        texts.append(f"{hits[0] if hits else f'more than {len(profile.median) - 1}'} ({profile.solver})")
    return " and ".join(texts)


def ends(result: EstimatorResult, results: Results) -> str | None:
    """Spectral radius at the first and the last audit."""
    audits = result.track.audits
    return f"{audits[0].spectral_radius:.2f} to {audits[-1].spectral_radius:.2f}" if audits else None


PICTURES = {
    "loss-against-time": Picture(
        "Training loss against time",
        "Lower is better, and further left is faster. The faint line is the loss of every batch, the strong line its "
        "running mean. All classifiers take the same number of steps, so a curve that ends earlier has cheaper steps. "
        "Where two curves coincide, the estimate reduces the loss as much per second as the exact gradient.",
        loss_against_time,
        "In this run, loss over the last epoch and time spent:",
        lambda r, _: f"{r.summary.training_loss:.3f} after {r.summary.training_seconds:.1f} s",
    ),
    "residual-against-iteration": Picture(
        "Solver residual against iteration",
        "Distance of the state from an equilibrium, on validation images, after training. On the logarithmic scale "
        "every line should fall straight; the steeper, the fewer evaluations. The solid line is Anderson acceleration, "
        "with a band from the 10 % to the 90 % quantile of the images; the dotted one applies the cell repeatedly. "
        "Their distance is the gain of the solver. A line that levels off far above the tolerance would mean that no "
        "equilibrium was found. (Training stops each image at the dashed tolerance; here the solve continues to 1e-6.)",
        residual_against_iteration,
        "In this run, iterations until the median sample is within the tolerance:",
        reached,
    ),
    "cosine-against-step": Picture(
        "Cosine to the exact gradient against training step",
        "At regular steps, outside the measured time, the exact gradient is computed for the same batch and weights "
        "to a much tighter tolerance. A cosine of 1 means that the estimate has the same direction, 0 that it is "
        "orthogonal and useless. A phantom gradient keeps only the first terms of a series, so its cosine drops when "
        "the spectral radius of J (next picture) approaches 1 and the omitted terms matter. Training can succeed with "
        "a cosine well below 1, as long as it is positive.",
        along("audits", "cosine", "cosine to the exact gradient"),
        "In this run, median and least cosine:",
        lambda r, _: (
            None if math.isnan(r.summary.cosine) else f"{r.summary.cosine:.4f} and {r.summary.cosine_least:.4f}"
        ),
    ),
    "spectral-radius-against-step": Picture(
        "Spectral radius against training step",
        "J is the Jacobian of the cell at the equilibrium; its spectral radius is the factor by which a disturbance "
        "shrinks with every application of the cell. Near 0 the model is almost an ordinary shallow network; towards "
        "1 it has a long memory, and both solves take longer. Training determines this number.",
        along("audits", "spectral_radius", "spectral radius of J (median)"),
        "In this run, from the first audit to the last:",
        ends,
    ),
    "accuracy-against-step": Picture(
        "Validation accuracy against training step",
        "The share of correctly classified images among those that are never trained on, after every epoch. "
        "It should rise and level off; falling while the training loss still falls would be overfitting.",
        along("validations", "accuracy", "validation accuracy (%)", 100, one=False),
        "In this run, at the end:",
        lambda r, _: f"{100 * r.summary.validation_accuracy:.1f} %",
    ),
}


def drawings(results: Results) -> list[CaptionedFigure]:
    """The figures for which there is data."""

    tracks = [result.track for result in results.estimators.values()]
    audited = any(track.audits for track in tracks)
    there = {
        "loss-against-time": any(track.steps for track in tracks),
        "residual-against-iteration": True,
        "cosine-against-step": audited,
        "spectral-radius-against-step": audited,
        "accuracy-against-step": not audited and any(track.validations for track in tracks),
    }
    drawn = []
    for name in (name for name, known in there.items() if known):
        figure = canvas(6.0, 3.9)
        axes = figure.subplots()
        PICTURES[name].draw(axes, results)
        known = axes.get_legend_handles_labels()
        figure.legend(*known, loc="outside upper left", ncols=3, columnspacing=1.4, handlelength=2.2)
        drawn.append(CaptionedFigure(name, figure, PICTURES[name].reading))
    return drawn


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponentially weighted running mean, with bias correction at the start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


# -- The page ----------------------------------------------------------------------------------------------------------


def write(results: Results, run: Run) -> None:
    """Write ``figures/*.png`` and a self-contained ``index.html`` that needs no network."""
    with styled():
        drawn = drawings(results)
        pictures = [
            replace(one, title=PICTURES[drawing.name].title, now=PICTURES[drawing.name].now(results))
            for one, drawing in zip(saved(drawn, run, 160), drawn, strict=True)
        ]
    count = len(results.estimators)
    done = min(result.summary.steps for result in results.estimators.values())
    marks = {name: look(name)["color"] for name in results.estimators}
    meanings = field_docs(DigitsConfig)
    sections = [
        Section(keys=[(marks[n], r.label, ESTIMATORS[n].explanation) for n, r in results.estimators.items()]),
        Section(heading="Results", table=summary_table(results.estimators), marks=list(marks.values())),
        Section(heading="Training", pictures=pictures),
        Section(
            heading="Settings",
            settings=[
                (f"--{name.replace('_', '-')}", _value(value), meanings.get(name, ""))
                for name, value in asdict(results.config).items()
            ],
        ),
    ]
    title = f"One equilibrium model, {_number(count)} gradient{'s' * (count > 1)}"
    notice = (
        f"This run was interrupted after {done} of {results.planned_steps} steps. Everything below shows the results "
        "so far."
    )
    page = document(
        title,
        introduction(results),
        sections,
        date=results.environment.date,
        notice=notice if results.state != "complete" else "",
        footer=[footer(results)],
    )
    run.write_text("index.html", page)


def introduction(results: Results) -> list[str]:
    """An introduction for readers new to equilibrium models."""
    count = len(results.estimators)
    text = (
        f"Here {_number(count)} classifier{'s' * (count > 1)} of {results.parameters:,} parameters learned to read "
        f"handwritten digits of 8 × 8 pixels, from {results.training_images} images; the accuracy is measured on "
        f"{results.validation_images} others."
    )
    if count > 1:
        text += (
            " They started from the same weights and saw the same batches in the same order. They differ in one line "
            "of code only, the gradient estimator:"
        )
    return [
        Markup(
            "A deep equilibrium model has no stack of layers. Its output is the state z that one small network f, the "
            "<em>cell</em>, leaves unchanged: z = f(z, x). A solver finds that state. To train the cell one needs the "
            "gradient of the state, which can be exact or a cheaper estimate."
        ),
        text,
    ]


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    (tree,) = ast.parse(dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for pair in pairwise(tree.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def footer(results: Results) -> Markup:
    """Environment of the run, and the command to reproduce it."""
    e = results.environment
    where = (
        f"Made with torchimplicit {e.torchimplicit_version}, PyTorch {e.torch_version} and Python {e.python_version} "
        f"on {e.device}, {e.cores} cores, {e.threads} threads, {e.system}; {results.wall_seconds:.0f} s in all."
    )
    return Markup(
        "{} Times are those of this machine and depend on its load. All figures are in <code>results.json</code> "
        "beside this page, every step in <code>logs/metrics.csv</code>. The same seeds on the same machine give the "
        "same losses; <code>torchimplicit demo --seed 1</code> tries others."
    ).format(where)


def _number(count: int) -> str:
    return ["no", "one", "two", "three", "four"][count]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return shown(value, "g") if isinstance(value, float) or value is None else str(value)
