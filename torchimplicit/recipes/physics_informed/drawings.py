"""The figures of the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from torchimplicit.recipes.optimizing.objective import Array
from torchimplicit.recipes.physics.config import EquationName
from torchimplicit.recipes.physics.equations import EQUATIONS
from torchimplicit.recipes.physics.runner import restored, values
from torchimplicit.recipes.physics_informed.jobs import MODELS, OPTIMIZERS, name_of, ordinary
from torchimplicit.recipes.physics_informed.read import MEASURE, Cell, Found
from torchimplicit.recipes.plotting import COLOURS, axes
from torchimplicit.recipes.run import Run

MEASURES = {"iae": "IAE", "relative_l2": "relative error (L2)"}


def against_seconds(found: Found, equation: EquationName) -> Figure:
    """The error along the runs, a panel an optimizer, a line a run."""
    there = [optimizer for optimizer in OPTIMIZERS if found.of(equation, optimizer)]
    figure, panels = axes(len(there), width=4.4, height=3.7)
    for panel, optimizer in zip(panels, there, strict=True):
        for cell in found.of(equation, optimizer):
            for number, one in enumerate(cell.results.values()):
                panel.plot(
                    [look.seconds for look in one.looks],
                    [getattr(look, MEASURE[equation]) for look in one.looks],
                    color=_colour(cell.model),
                    linestyle="-" if MODELS[cell.model].states else "--",
                    linewidth=1.1,
                    label=None if number else MODELS[cell.model].label,
                )
        panel.set(title=OPTIMIZERS[optimizer], xscale="log", yscale="log", xlabel="seconds of the processor's time")
        left, right = panel.get_xlim()
        ticks = [n * 10.0**k for k in range(-2, 4) for n in (1, 2, 5) if left <= n * 10.0**k <= right]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
    low = min(panel.get_ylim()[0] for panel in panels)
    high = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(low, high)
    panels[0].set_ylabel(MEASURES[MEASURE[equation]])
    panels[-1].legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def solution(cells: list[Cell], runs: Mapping[str, Run], seed: int) -> Figure | None:
    """The solution and the error of the models, of one optimizer and seed; ``None`` if there are no such runs."""
    made: dict[str, Array] = {}
    for cell in cells:
        if seed in cell.results:
            run = runs[name_of(cell.equation, cell.model, cell.optimizer, seed)]
            made[cell.model] = values(restored(cell.results[seed].config, run), EQUATIONS[cell.equation])
    if not made:
        return None
    return (_lines if ordinary(cells[0].equation) else _maps)(cells[0].equation, made)


def _lines(name: EquationName, made: dict[str, Array]) -> Figure:
    equation = EQUATIONS[name]
    grid = equation.grid()
    right = equation.reference(grid)
    shown = "equilibrium-5" if "equilibrium-5" in made else next(iter(made))
    figure, (left, other) = axes(2, width=5.4)
    some = slice(None, None, max(1, len(grid) // 25))
    for index, output in enumerate(equation.outputs):
        left.plot(grid[:, 0], made[shown][:, index], color=COLOURS[index], label=output)
        left.plot(grid[some, 0], right[some, index], "o", color=COLOURS[index], markersize=3.5)
    left.set(xlabel=equation.inputs[0], title=f"{MODELS[shown].label} (lines), trusted (dots)")
    left.legend()
    for model, found in made.items():
        gap = np.maximum(np.abs(found - right).max(1), 1e-17)
        line = "-" if MODELS[model].states else "--"
        other.plot(grid[:, 0], gap, color=_colour(model), linestyle=line, linewidth=1.2, label=MODELS[model].label)
    other.set(xlabel=equation.inputs[0], yscale="log", title="largest absolute error of a component")
    other.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _maps(name: EquationName, made: dict[str, Array]) -> Figure:
    equation = EQUATIONS[name]
    grid = equation.grid()
    right = equation.reference(grid)
    first, second = (np.unique(grid[:, i]) for i in (0, 1))
    chosen = [model for model in ("equilibrium-20", "network-20") if model in made] or list(made)[:2]
    gaps = {model: np.log10(np.maximum(np.abs(made[model] - right)[:, 0], 1e-12)) for model in chosen}
    low = min(float(np.quantile(gap, 0.05)) for gap in gaps.values())
    high = max(float(gap.max()) for gap in gaps.values())
    panels = {f"{MODELS[chosen[0]].label}: solution": made[chosen[0]][:, 0]}
    panels |= {f"{MODELS[model].label}: log₁₀ of the error": gap for model, gap in gaps.items()}
    figure, plots = axes(len(panels), width=4.4, height=3.6)
    for number, (plot, (title, shown)) in enumerate(zip(plots, panels.items(), strict=True)):
        shape = shown.reshape(len(first), len(second)).T
        look: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high} if number else {"cmap": "RdBu_r"}
        image = plot.pcolormesh(first, second, shape, rasterized=True, **look)
        figure.colorbar(image, ax=plot)
        plot.set(xlabel=equation.inputs[0], ylabel=equation.inputs[1], title=title)
        plot.grid(False)
    return figure


def _colour(model: str) -> str:
    return COLOURS[list(MODELS).index(model)]
