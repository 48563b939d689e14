"""Compares finished runs: a table, learning curves, and a page with both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import write_text
from torchimplicit.recipes.runtime.log import Row, rows
from torchimplicit.recipes.runtime.page import Section, Shown, axes, document, style, styled, svg
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import NONE, Cell, Table, sheet, shown
from torchimplicit.recipes.runtime.task import SHARES, Metric, told
from torchimplicit.recipes.runtime.trainer import Results, Validation

TITLE = "Runs compared"

MOST_NAMED = 12
"""Largest number of runs whose curves have a legend and markers."""

MOST_POINTS = 500
"""Largest number of points in a curve of the training loss, which is thinned out to it."""


@dataclass(frozen=True)
class Finished:
    """A finished run and its files."""

    name: str
    recipe: str
    results: Results
    log: list[Row]


def finished(path: Path) -> Finished:
    """Read a run's directory.

    Raises:
        UserError: if there is no training run, or it has no results.
    """
    run = Run(path)
    recipe = run.read()["recipe"]
    try:
        return Finished(str(path), recipe, Results.of(run), rows(run.metrics))
    except OSError:
        raise UserError(f"{path} has no results yet; continue with: torchimplicit resume {run}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is a run of '{recipe}', which writes a page of its own: {path}/index.html") from None


def comparison(runs: Sequence[Finished]) -> Table:
    """A table with a row per run."""

    def cost(figure: str, form: str, scale: float = 1.0) -> Callable[[Finished], str]:
        return lambda run: shown(run.results.costs and scale * getattr(run.results.costs, figure), form)

    def figure(run: Finished, validation: Validation | None) -> str:
        if validation is None:
            return NONE
        metric = Metric(run.results.metric, "%" if run.results.metric in SHARES else "", "max")
        said = told(validation.figures, metric)
        return ", ".join(f"{name} {value}" for name, value in said.items() if name != "loss" or len(said) == 1)

    return sheet("", runs, [
        Cell("Run", lambda run: run.name),
        Cell("Recipe", lambda run: run.recipe),
        Cell("Best validation", lambda run: figure(run, run.results.best), "",
             "Figures of the best validation, which selects the weights of the test."),
        Cell("Test", lambda run: figure(run, run.results.test) if run.results.test else run.results.state),
        Cell("Steps", lambda run: str(run.results.steps)),
        Cell("Step", cost("seconds", ".0f", 1000), "ms",
             "Time of a training step (forward, backward and update), median over the steps."),
        Cell("Forward", cost("forward", ".1f"), "evaluations",
             "Evaluations of the layer in a training step, in whole-batch equivalents; mean over the steps."),
        Cell("Backward", cost("backward", ".1f"), "products",
             "Products with the Jacobian in the backward pass of a training step; mean over the steps."),
    ]).table  # fmt: skip


def curves(runs: Sequence[Finished]) -> Figure:
    """Training loss and validation metric of every run against steps, and against seconds."""
    drawn, (loss, by_step, by_time) = axes(3, width=4.6, height=3.6)
    named = len(runs) <= MOST_NAMED
    for index, run in enumerate(runs):
        look = style(index) if named else style(index) | {"marker": None}
        plain = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1}
        steps = [row for row in run.log if "loss" in row]
        steps = steps[:: -(-len(steps) // MOST_POINTS) or 1]
        loss.plot([row["step"] for row in steps], [row["loss"] for row in steps], **plain, label=run.name)
        values = [v.figures[run.results.metric] for v in run.results.validations]
        by_step.plot([v.step for v in run.results.validations], values, **look)
        by_time.plot([v.seconds for v in run.results.validations], values, **look)
    metrics = " / ".join(dict.fromkeys(run.results.metric for run in runs))
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    by_step.set(xlabel="step", ylabel=f"validation {metrics}")
    by_time.set(xlabel="seconds in training steps")
    if named:
        loss.legend()
    return drawn


def write(runs: Sequence[Finished], file: Path, title: str = TITLE, pictures: Sequence[Shown] = ()) -> None:
    """Write the page, with further pictures, in one file."""
    with styled():
        picture = svg(curves(runs), "curves")
    caption = "Training loss and validation figures of the runs, against steps and against time in training steps."
    shown = [Shown(media=picture, caption=caption), *pictures]
    write_text(file, document(title, [], [Section(table=comparison(runs)), Section(heading="Curves", pictures=shown)]))
