"""The pictures of a solved equation, and its page."""

from __future__ import annotations

from html import escape

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from torchimplicit.models.physics_informed import Field
from torchimplicit.recipes.physics.equations import Equation
from torchimplicit.recipes.physics.history import Look, Results
from torchimplicit.recipes.runtime.page import COLOURS, FIGURE, axes, document, figure, save_figure, svg
from torchimplicit.recipes.runtime.run import Run

CAPTIONS = {
    "solution": "What was found (lines, or the field on the left), and the trusted solution (dots, or on the right).",
    "error": "The absolute error.",
    "training": "The loss and the relative error in the mean square, against iterations and against seconds.",
}


def figures(results: Results, equation: Equation, made: Field) -> dict[str, Figure]:
    """By the names of :data:`CAPTIONS`."""
    grid = equation.grid()
    with torch.no_grad():
        found = made(torch.as_tensor(grid)).numpy()
    right = equation.reference(grid)
    with matplotlib.rc_context(FIGURE):
        if len(equation.inputs) == 1:
            drawn = {
                "solution": _lines(equation, grid, found, right),
                "error": _line_errors(equation, grid, found, right),
            }
        else:
            drawn = {
                "solution": _maps(equation, grid, {"found": found[:, 0], "trusted": right[:, 0]}, "RdBu_r"),
                "error": _maps(equation, grid, {"absolute error": np.abs(found - right)[:, 0]}, "viridis"),
            }
        drawn["training"] = training({results.config.model: results.looks})
    return drawn


def training(tracks: dict[str, list[Look]]) -> Figure:
    """Loss and error of some trainings, by their names."""
    drawn, (by_iteration, by_time) = axes(2, width=5.2)
    for index, (name, looks) in enumerate(tracks.items()):
        colour = COLOURS[index % len(COLOURS)]
        measured = [look for look in looks if np.isfinite(look.relative_l2)]
        by_iteration.plot([x.iteration for x in looks], [x.loss for x in looks], color=colour, linewidth=1, alpha=0.6)
        for plot, place in ((by_iteration, "iteration"), (by_time, "seconds")):
            x = [getattr(look, place) for look in measured]
            plot.plot(x, [look.relative_l2 for look in measured], color=colour, marker="o", markersize=3, label=name)
    by_iteration.set(xlabel="iteration", ylabel="relative error (dots), loss (thin)", yscale="log")
    by_time.set(xlabel="seconds", ylabel="relative error", yscale="log")
    by_iteration.legend()
    return drawn


def _lines(equation: Equation, grid: np.ndarray, found: np.ndarray, right: np.ndarray) -> Figure:
    drawn, (plot,) = axes()
    some = slice(None, None, max(1, len(grid) // 25))
    for index, name in enumerate(equation.outputs):
        plot.plot(grid[:, 0], found[:, index], color=COLOURS[index], label=name)
        plot.plot(grid[some, 0], right[some, index], "o", color=COLOURS[index], markersize=3.5)
    plot.set(xlabel=equation.inputs[0])
    plot.legend()
    return drawn


def _line_errors(equation: Equation, grid: np.ndarray, found: np.ndarray, right: np.ndarray) -> Figure:
    drawn, (plot,) = axes()
    for index, name in enumerate(equation.outputs):
        gap = np.maximum(np.abs(found - right)[:, index], 1e-17)
        plot.plot(grid[:, 0], gap, color=COLOURS[index], label=name)
    plot.set(xlabel=equation.inputs[0], ylabel="absolute error", yscale="log")
    plot.legend()
    return drawn


def _maps(equation: Equation, grid: np.ndarray, values: dict[str, np.ndarray], colours: str) -> Figure:
    first, second = (np.unique(grid[:, i]) for i in (0, 1))
    drawn, plots = axes(len(values), width=4.6, height=3.8)
    for plot, (name, one) in zip(plots, values.items(), strict=True):
        image = plot.pcolormesh(first, second, one.reshape(len(first), len(second)).T, cmap=colours, rasterized=True)
        drawn.colorbar(image, ax=plot)
        plot.set(xlabel=equation.inputs[0], ylabel=equation.inputs[1], title=name)
        plot.grid(False)
    return drawn


def write_report(results: Results, equation: Equation, made: Field, run: Run) -> None:
    """``figures/*.png`` and ``index.html``, which holds its pictures itself."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    drawn = figures(results, equation, made)
    for name, one in drawn.items():
        save_figure(one, folder / f"{name}.png", 130)
    said = ", ".join(f"{name} {value:.2e}" for name, value in results.errors.items())
    parts = [
        f"<h1>{escape(equation.title)}</h1>",
        f"<p class='lead'>{escape(results.config.model.capitalize())} of {results.parameters} weights, after "
        f"{results.iterations} iterations of {escape(results.config.optimizer)}: {escape(said)}, against "
        f"{escape(results.reference)}.</p>",
        "<div class='grid'>",
        *(figure(svg(one, name), CAPTIONS[name]) for name, one in drawn.items()),
        "</div>",
    ]
    run.write_text("index.html", document(equation.title, parts))
