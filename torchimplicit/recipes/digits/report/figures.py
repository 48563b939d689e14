"""The pictures of a run, with matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchimplicit.recipes.digits.report.style import look
from torchimplicit.recipes.digits.results import Results
from torchimplicit.recipes.runtime.page import FIGURE

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
