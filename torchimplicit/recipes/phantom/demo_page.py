"""The page about the estimators on digits."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from textwrap import dedent
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchimplicit.recipes.phantom.demo_results import EstimatorResult, Results, summary_table
from torchimplicit.recipes.phantom.demo_settings import DigitsConfig
from torchimplicit.recipes.phantom.demo_task import ESTIMATORS
from torchimplicit.recipes.runtime.page import FIGURE, document, save_figure, svg
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import Table

# -- How the estimators are drawn --------------------------------------------------------------------------------------


class Look(NamedTuple):
    """How an estimator is drawn. Colour, line and marker each tell the estimators apart on their own."""

    colour: str
    line: Any
    marker: str


LOOKS = {
    "implicit": Look("#0b63a5", "-", "o"),
    "unrolled-phantom": Look("#d1495b", (0, (5, 1.5)), "s"),
    "neumann-phantom": Look("#2e8b57", (0, (4, 1.2, 1, 1.2)), "^"),
    "one-step": Look("#8a5fbf", (0, (2, 1)), "D"),
}


def look(name: str) -> Look:
    """How an estimator is drawn."""
    return LOOKS[name]


# -- How to read each picture, and the figures that it shows in this run -----------------------------------------------


@dataclass(frozen=True)
class Caption:
    """What stands with a picture.

    Attributes:
        title: what it shows.
        reading: how a newcomer reads it.
        numbers: its figures in this run, in a sentence.
    """

    title: str
    reading: str
    numbers: Callable[[Results], str]


def _each(results: Results, figure: Callable[[EstimatorResult], str | None]) -> str:
    found = {result.label: figure(result) for result in results.estimators.values()}
    return "; ".join(f"{name} {text}" for name, text in found.items() if text is not None)


def _loss(results: Results) -> str:
    return "In this run, loss over the last epoch and time spent: " + _each(
        results, lambda r: f"{r.summary.training_loss:.3f} after {r.summary.training_seconds:.1f} s"
    )


def _residual(results: Results) -> str:
    def reached(result: EstimatorResult) -> str:
        texts = []
        for profile in result.profiles:
            hits = [i for i, value in enumerate(profile.median) if value <= results.config.tolerance]
            texts.append(f"{hits[0] if hits else f'more than {len(profile.median) - 1}'} ({profile.solver})")
        return " and ".join(texts)

    return "In this run, iterations until the median sample is within the tolerance: " + _each(results, reached)


def _cosine(results: Results) -> str:
    return "In this run, median and least cosine: " + _each(
        results,
        lambda r: None if math.isnan(r.summary.cosine) else f"{r.summary.cosine:.4f} and {r.summary.cosine_least:.4f}",
    )


def _radius(results: Results) -> str:
    def ends(result: EstimatorResult) -> str | None:
        audits = result.track.audits
        return f"{audits[0].spectral_radius:.2f} to {audits[-1].spectral_radius:.2f}" if audits else None

    return "In this run, from the first audit to the last: " + _each(results, ends)


def _accuracy(results: Results) -> str:
    return "In this run, at the end: " + _each(results, lambda r: f"{100 * r.summary.validation_accuracy:.1f} %")


CAPTIONS = {
    "loss-against-time": Caption(
        "Training loss against time",
        "Lower is better, and further left is faster. The faint line is the loss of every single batch, the strong "
        "line its running mean. All the classifiers take the same number of steps, so a curve that ends earlier had "
        "the cheaper steps. Where two curves lie on each other, the estimate taught the classifier as much per second "
        "as the exact gradient did.",
        _loss,
    ),
    "residual-against-iteration": Caption(
        "Solver residual against iteration",
        "How far the state still is from being unchanged by the cell, on validation images, after training. Every "
        "line should fall straight, for the scale is logarithmic; the steeper, the fewer evaluations. The solid line "
        "is Anderson acceleration, with the band between the 10 % and the 90 % quantile of the images; the dotted one "
        "simply applies the cell again and again. Between them lies what the solver gains. A line that levels off far "
        "above the tolerance would mean that there is no equilibrium to be found. (Training stops each image at the "
        "dashed tolerance; here the solve goes on to 1e-6.)",
        _residual,
    ),
    "cosine-against-step": Caption(
        "Cosine to the exact gradient against training step",
        "Now and then training pauses its stopwatch, and the exact gradient is computed on the same batch at the same "
        "weights, to a far tighter tolerance. A cosine of 1 means that the estimate points the same way, 0 "
        "that it is at right angles to it and of no use. A phantom gradient keeps only the first terms of a series, "
        "so its cosine drops when the spectral radius of J (next picture) comes near 1 and the left-out terms matter. "
        "It can be well below 1 and still train well, as long as it points downhill.",
        _cosine,
    ),
    "spectral-radius-against-step": Caption(
        "Spectral radius against training step",
        "J is the Jacobian of the cell at the equilibrium; its spectral radius is the factor by which a disturbance "
        "shrinks with every application of the cell. Near 0 the model is almost an ordinary shallow network; towards "
        "1 it remembers for long, and both solves take longer. Training chooses this number by itself.",
        _radius,
    ),
    "accuracy-against-step": Caption(
        "Validation accuracy against training step",
        "The share of images classified right among those that the classifier is never trained on, after every epoch. "
        "It should rise and level off; falling while the training loss still falls would be overfitting.",
        _accuracy,
    ),
}


# -- The pictures of a run, with matplotlib ----------------------------------------------------------------------------


SIZE = (6.0, 3.9)
"""Inches."""


def figures(results: Results) -> dict[str, Figure]:
    """The pictures that there is data for, by file name."""
    drawn: dict[str, Figure] = {}
    tracks = [result.track for result in results.estimators.values()]
    with matplotlib.rc_context(FIGURE):
        if any(track.steps for track in tracks):
            drawn["loss-against-time"] = loss_against_time(results)
        drawn["residual-against-iteration"] = residual_against_iteration(results)
        if any(track.audits for track in tracks):
            drawn["cosine-against-step"] = cosine_against_step(results)
            drawn["spectral-radius-against-step"] = spectral_radius_against_step(results)
        elif any(track.validations for track in tracks):
            drawn["accuracy-against-step"] = accuracy_against_step(results)
    return drawn


def loss_against_time(results: Results) -> Figure:
    """Every step's loss, faint, and its running mean."""
    with _axes() as (figure, axes):
        for name, result in results.estimators.items():
            seconds = list(_cumulated([step.seconds for step in result.track.steps]))
            loss = [step.loss for step in result.track.steps]
            axes.plot(seconds, loss, color=look(name).colour, linewidth=0.6, alpha=0.25)
            axes.plot(seconds, smoothed(loss), color=look(name).colour, linestyle=look(name).line, label=result.label)
        axes.set(xlabel="time in training steps (s)", ylabel="training loss (nats)", yscale="log")
        axes.set_xlim(left=0)
    return figure


def residual_against_iteration(results: Results) -> Figure:
    """Median over samples for both solvers, with the band from the 10 % to the 90 % quantile for the first."""
    solvers: dict[str, str] = {}
    with _axes() as (figure, axes):
        for name, result in results.estimators.items():
            colour = look(name).colour
            for index, profile in enumerate(result.profiles):
                iterations = range(len(profile.median))
                if index == 0:
                    axes.fill_between(iterations, profile.low, profile.high, color=colour, alpha=0.12, linewidth=0)
                line = "-" if index == 0 else ":"
                axes.plot(iterations, profile.median, color=colour, linestyle=line)
                if profile.solver not in solvers:
                    solvers[profile.solver] = line
            axes.plot([], [], color=colour, label=result.label)
        for solver, line in solvers.items():
            axes.plot([], [], color="#4b5563", linestyle=line, label=solver)
        axes.axhline(results.config.tolerance, color="#6b7280", linewidth=0.9, linestyle="--")
        axes.annotate(
            "tolerance",
            (1, results.config.tolerance),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color="#6b7280",
            fontsize=8,
        )
        axes.set(xlabel="solver iteration", ylabel="relative residual ‖f(z) − z‖ / ‖f(z)‖", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(left=0)
    return figure


def cosine_against_step(results: Results) -> Figure:
    """Of each audit."""
    with _axes() as (figure, axes):
        for name, result in results.estimators.items():
            audits = result.track.audits
            _marked(axes, name, result.label, [a.step for a in audits], [a.cosine for a in audits])
        axes.axhline(1, color="#6b7280", linewidth=0.9, linestyle="--")
        axes.set(xlabel="training step", ylabel="cosine to the exact gradient")
    return figure


def spectral_radius_against_step(results: Results) -> Figure:
    """Of each audit: the median over the samples."""
    with _axes() as (figure, axes):
        for name, result in results.estimators.items():
            audits = result.track.audits
            _marked(axes, name, result.label, [a.step for a in audits], [a.spectral_radius for a in audits])
        axes.axhline(1, color="#6b7280", linewidth=0.9, linestyle="--")
        axes.set(xlabel="training step", ylabel="spectral radius of J (median)")
        axes.set_ylim(bottom=0)
    return figure


def accuracy_against_step(results: Results) -> Figure:
    """On the validation split."""
    with _axes() as (figure, axes):
        for name, result in results.estimators.items():
            found = result.track.validations
            _marked(axes, name, result.label, [v.step for v in found], [100 * v.accuracy for v in found])
        axes.set(xlabel="training step", ylabel="validation accuracy (%)")
    return figure


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """The exponentially weighted mean of what came so far, without bias at the start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def _cumulated(values: Sequence[float]) -> Iterator[float]:
    total = 0.0
    for value in values:
        total += value
        yield total


def _marked(axes: Axes, name: str, label: str, x: list[int], y: list[float]) -> None:
    shown = look(name)
    axes.plot(x, y, color=shown.colour, linestyle=shown.line, marker=shown.marker, markersize=4.5, label=label)


@contextmanager
def _axes() -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, finished with a legend above them."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    yield figure, axes
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.4, handlelength=2.2)


# -- The one-page report: everything in one HTML file, with no script and nothing to fetch -----------------------------


def page(results: Results, pictures: dict[str, str]) -> str:
    """The page.

    Args:
        results: of the run.
        pictures: SVG by name; those without a caption are left out.
    """
    count = len(results.estimators)
    title = f"One equilibrium model, {_number(count)} gradient{'s' * (count > 1)}"
    parts = [
        f'<p class="tag">torchimplicit · {escape(results.environment.date)}</p>',
        f"<h1>{escape(title)}</h1>",
        introduction(results),
        keys(results),
        "<h2>What came out</h2>",
        summary(results),
        "<h2>How it came about</h2>",
        '<div class="grid">',
        *(picture(results, name, svg) for name, svg in pictures.items()),
        "</div>",
        "<h2>What the settings were</h2>",
        settings(results.config),
        footer(results),
    ]
    return document(title, parts)


def introduction(results: Results) -> str:
    """What was done, for somebody who has never met an equilibrium model."""
    count = len(results.estimators)
    text = (
        "<p class='lead'>A deep equilibrium model has no stack of layers. Its output is the state z that one small "
        "network f, the <em>cell</em>, leaves unchanged: z = f(z, x). A solver finds that state. To train the cell one "
        "needs the gradient of the state, and that can be exact, or a cheaper estimate.</p>"
        f"<p class='lead'>Here {_number(count)} classifier{'s' * (count > 1)} of {results.parameters:,} parameters "
        f"learned to read handwritten digits of 8 × 8 pixels, from {results.training_images} images; the accuracy is "
        f"measured on {results.validation_images} others."
    )
    if count > 1:
        text += (
            " They started from the same weights and saw the same batches in the same order. They differ in one line "
            "of code only, the gradient estimator:"
        )
    text += "</p>"
    if results.state != "complete":
        done = min(result.summary.steps for result in results.estimators.values())
        text += (
            f"<p class='notice'>This run was interrupted after {done} of {results.planned_steps} steps. Everything "
            "below shows what was done until then.</p>"
        )
    return text


def keys(results: Results) -> str:
    """One line for each estimator, with its colour."""
    lines = []
    for name, result in results.estimators.items():
        lines.append(
            f"<li>{_dot(name)}<strong>{escape(result.label)}</strong> {escape(ESTIMATORS[name].explanation)}</li>"
        )
    return f'<ul class="keys">{"".join(lines)}</ul>'


def summary(results: Results) -> str:
    """The table, and what its columns are."""
    table = summary_table(results.estimators)
    dots = [_dot(name) for name in results.estimators]
    notes = "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.note)}</dd>" for column in table.columns if column.note
    )
    return f'<div class="card"><div class="scroll">{html_table(table, dots)}</div><dl>{notes}</dl></div>'


def html_table(table: Table, marks: list[str]) -> str:
    """The table with a mark before each row's name."""
    heads = "".join(
        f'<th scope="col">{escape(column.title)}<small>{escape(column.unit) or "&nbsp;"}</small></th>'
        for column in table.columns
    )
    rows = ""
    for mark, (first, *rest) in zip(marks, table.rows, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows += f'<tr><th scope="row">{mark}{escape(first)}</th>{cells}</tr>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def picture(results: Results, name: str, svg: str) -> str:
    """One picture with its caption."""
    caption = CAPTIONS[name]
    return (
        f'<figure class="card" role="group" aria-label="{escape(caption.title)}"><h3>{escape(caption.title)}</h3>{svg}'
        f"<figcaption><p>{escape(caption.reading)}</p>"
        f'<p class="now">{escape(caption.numbers(results))}</p></figcaption></figure>'
    )


def settings(config: DigitsConfig) -> str:
    """Every setting with its value and what it means."""
    meanings = field_docs(DigitsConfig)
    rows = "".join(
        f"<tr><td><code>--{name.replace('_', '-')}</code></td><td>{escape(_value(value))}</td>"
        f"<td>{escape(meanings.get(name, ''))}</td></tr>"
        for name, value in asdict(config).items()
    )
    return f'<div class="card scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'


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


def footer(results: Results) -> str:
    """On what it was made, and how to make it again."""
    e = results.environment
    return (
        f"<footer><p>Made with torchimplicit {escape(e.torchimplicit_version)}, PyTorch {escape(e.torch_version)} and "
        f"Python {escape(e.python_version)} on {escape(e.device)}, {e.cores} cores, {e.threads} threads, "
        f"{escape(e.system)}; {results.wall_seconds:.0f} s in all. Times are of this machine and move with what else "
        "it does. All figures are in <code>results.json</code> beside this page, every step in "
        "<code>logs/metrics.csv</code>. The same seeds on the same machine give the same losses; "
        "<code>torchimplicit demo --seed 1</code> tries others.</p></footer>"
    )


def _dot(name: str) -> str:
    return f'<span class="dot" style="background:{look(name).colour}"></span>'


def _number(count: int) -> str:
    return ["no", "one", "two", "three", "four"][count]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# -- Puts the report into the run's directory --------------------------------------------------------------------------


def write_report(results: Results, run: Run) -> None:
    """``figures/*.png`` and ``index.html``, which holds its pictures itself and needs no network."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    drawn = figures(results)
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png", 160)
    run.write_text("index.html", page(results, {name: svg(figure, name) for name, figure in drawn.items()}))
