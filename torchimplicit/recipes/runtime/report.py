"""Finished runs side by side: a table, learning curves, and a page that shows both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import write_text
from torchimplicit.recipes.runtime.fitting import Row, rows
from torchimplicit.recipes.runtime.page import Section, Shown, axes, document, style, styled, svg
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.trainer import Results

TITLE = "Runs compared"


@dataclass(frozen=True)
class Finished:
    """A run with what it wrote."""

    name: str
    recipe: str
    results: Results
    log: list[Row]


def finished(path: Path) -> Finished:
    """What a run's directory holds.

    Raises:
        UserError: if there is no training run, or it has no results.
    """
    run = Run(path)
    recipe = run.read()["recipe"]
    try:
        return Finished(str(path), recipe, Results.of(run), rows(run.metrics))
    except OSError:
        raise UserError(f"{path} has no results yet; go on with: torchimplicit resume {run}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is a run of '{recipe}', which writes a page of its own: {path}/index.html") from None


def comparison(runs: Sequence[Finished]) -> Table:
    """A row a run."""
    columns = [
        Column("Run"),
        Column("Recipe"),
        Column("Best validation", note="by which the tested weights were selected"),
        Column("Test"),
        Column("Steps"),
        Column("Step", "ms", "median of a training step: forward, backward and update"),
        Column("Forward", "evaluations", "mean of a step, in whole-batch equivalents"),
        Column("Backward", "evaluations", "products with the Jacobian, likewise"),
    ]
    return Table(columns, [_line(run) for run in runs])


def _line(run: Finished) -> list[str]:
    r = run.results
    costs = ["–"] * 3
    if r.costs is not None:
        costs = [f"{1000 * r.costs.seconds:.0f}", f"{r.costs.forward:.1f}", f"{r.costs.backward:.1f}"]
    validation = "–" if r.best is None else f"{r.best.figures[r.metric]:.4g}"
    test = r.state if r.test is None else f"{r.test.figures[r.metric]:.4g}"
    return [run.name, run.recipe, validation, test, str(r.steps), *costs]


def curves(runs: Sequence[Finished]) -> Figure:
    """Training loss and validation metric of every run against steps, and against seconds."""
    drawn, (loss, by_step, by_time) = axes(3, width=4.6, height=3.6)
    for index, run in enumerate(runs):
        look = style(index)
        plain = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1}
        steps = [row for row in run.log if "loss" in row]
        loss.plot([row["step"] for row in steps], [row["loss"] for row in steps], **plain, label=run.name)
        values = [v.figures[run.results.metric] for v in run.results.validations]
        by_step.plot([v.step for v in run.results.validations], values, **look)
        by_time.plot([v.seconds for v in run.results.validations], values, **look)
    metrics = " / ".join(dict.fromkeys(run.results.metric for run in runs))
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    by_step.set(xlabel="step", ylabel=f"validation {metrics}")
    by_time.set(xlabel="seconds in training steps")
    loss.legend()
    return drawn


def write(runs: Sequence[Finished], file: Path) -> None:
    """The page, in one file."""
    with styled():
        picture = svg(curves(runs), "curves")
    caption = "Training loss and validation figures of the runs, against steps and against time in training steps."
    shown = [Shown(media=picture, caption=caption)]
    write_text(file, document(TITLE, [], [Section(table=comparison(runs)), Section(heading="Curves", pictures=shown)]))
