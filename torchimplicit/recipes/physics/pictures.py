"""Figures and page of a solved equation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchimplicit.recipes.physics.statement import MEASURES
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.table import CaptionedFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchimplicit.recipes.physics.solve_equation import Results
    from torchimplicit.recipes.physics.statement import Array, Equation
    from torchimplicit.recipes.runtime.run import Run

CAPTIONS = {
    "solution": "The solution that was found (lines, or the field on the left), and the reference solution, if there "
    "is one (dots, or the field on the right).",
    "error": "Absolute error against the reference solution.",
    "training": "Loss and relative error (L2) against iterations (left) and against seconds (right).",
}


def figures(results: Results, equation: Equation, values: Array) -> dict[str, Figure]:
    """The figures by the names in :data:`CAPTIONS`, from the field's values on the grid; with more than two
    coordinates, only the training."""
    right = equation.reference(equation.points())
    drawn: dict[str, Figure] = {}
    with styled():
        if len(equation.inputs) == 1:
            drawn["solution"], (plot,) = axes()
            lines(plot, equation, values)
        elif len(equation.inputs) == 2:
            both = {f"{name}": values[:, i] for i, name in enumerate(equation.outputs)}
            if right is not None:
                both = {"found": values[:, 0], "reference": right[:, 0]}
            drawn["solution"], plots = axes(len(both), width=4.6, height=3.8)
            for plot, (name, one) in zip(plots, both.items(), strict=True):
                colours(plot, equation, one, name, cmap="RdBu_r")
        if right is not None and len(equation.inputs) <= 2:
            drawn["error"] = _error(equation, np.abs(values - right))
        return {**drawn, "training": training(results)}


def _error(equation: Equation, gap: Array) -> Figure:
    if len(equation.inputs) == 2:
        drawn, (plot,) = axes(width=4.6, height=3.8)
        colours(plot, equation, gap[:, 0], "absolute error", cmap="viridis")
        return drawn
    drawn, (plot,) = axes()
    for index, name in enumerate(equation.outputs):
        plot.plot(equation.points()[:, 0], np.maximum(gap[:, index], 1e-17), color=COLOURS[index], label=name)
    plot.set(xlabel=next(iter(equation.inputs)), ylabel="absolute error", yscale="log")
    plot.legend()
    return drawn


def training(results: Results) -> Figure:
    """The loss and the error along a training."""
    drawn, (by_iteration, by_time) = axes(2, width=5.2)
    looks, colour = results.looks, COLOURS[0]
    measured = [look for look in looks if np.isfinite(look.relative_l2)]
    for plot, place in ((by_iteration, "iteration"), (by_time, "seconds")):
        plot.plot([getattr(x, place) for x in looks], [x.loss for x in looks], color=colour, linewidth=1, alpha=0.6)
        x, error = [getattr(look, place) for look in measured], [look.relative_l2 for look in measured]
        plot.plot(x, error, color=colour, marker="o", markersize=3, label=results.config.model)
        plot.set(xlabel=place, yscale="log")
    by_iteration.set(ylabel="relative error (dots), loss (thin)" if measured else "loss")
    if measured:
        by_iteration.legend()
    return drawn


def lines(plot: Axes, equation: Equation, values: Array) -> None:
    """Plot a function of one coordinate on the equation's grid as a line, and the reference solution as dots."""
    grid = equation.points()
    right, some = equation.reference(grid), slice(None, None, max(1, len(grid) // 25))
    for index, name in enumerate(equation.outputs):
        colour = COLOURS[index % len(COLOURS)]
        plot.plot(grid[:, 0], values[:, index], color=colour, label=name)
        if right is not None:
            plot.plot(grid[some, 0], right[some, index], "o", color=colour, markersize=3.5)
    plot.set(xlabel=next(iter(equation.inputs)))
    plot.legend()


def colours(plot: Axes, equation: Equation, values: Array, title: str, **look: Any) -> None:
    """Plot a function of two coordinates on the equation's grid, ``[points]``, as a colour map; white outside of the
    domain."""
    import torch

    grid = equation.points()
    if equation.where is not None:
        values = np.where(equation.where(torch.as_tensor(grid)).numpy().ravel(), values, np.nan)
    first, second = (np.unique(grid[:, i]) for i in (0, 1))
    image = plot.pcolormesh(first, second, values.reshape(len(first), len(second)).T, rasterized=True, **look)
    plot.figure.colorbar(image, ax=plot)
    across, up = equation.inputs
    plot.set(xlabel=across, ylabel=up, title=title)
    plot.grid(False)


def write_report(results: Results, equation: Equation, values: Array, run: Run) -> None:
    """Write ``figures/*.png`` and a self-contained ``index.html``."""
    from torchimplicit.recipes.physics.solve_equation import OPTIMIZERS

    drawn = figures(results, equation, values)
    with styled():
        pictures = saved([CaptionedFigure(name, one, CAPTIONS[name]) for name, one in drawn.items()], run)
    unknown = ", ".join(f"{name} = {value:.6g}" for name, value in results.unknown.items())
    said = [f"{MEASURES[name]} {value:.2e}" for name, value in results.errors.items()]
    lead = (
        f"{results.config.model.capitalize()} with {results.parameters} weights after {results.iterations} iterations "
        f"of {OPTIMIZERS[results.config.optimizer]}. The loss is {results.loss:.2e}, and {results.validation:.2e} at "
        "points that were not trained on."
    )
    leads = [lead]
    if said:
        leads.append(f"Errors against the reference solution ({results.reference}): {', '.join(said)}.")
    if unknown:
        leads.append(f"Estimated parameters: {unknown}.")
    run.write_text("index.html", document(equation.title, leads, [Section(pictures=pictures)]))
