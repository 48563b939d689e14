"""The figures of the table."""

from __future__ import annotations

from matplotlib.figure import Figure

from torchimplicit.recipes.ofdft_runs import measured
from torchimplicit.recipes.ofdft_stability.growth import steps
from torchimplicit.recipes.ofdft_stability.rows import HELPS, INNER, Row
from torchimplicit.recipes.orbital_free.measure import Summary
from torchimplicit.recipes.plotting import COLOURS, LINES, axes
from torchimplicit.recipes.runtime.table import Drawing

NAMES = {"descent": "by-descent", "l-bfgs": "by-l-bfgs"}


def drawings(rows: list[Row]) -> list[Drawing]:
    """One for each way to find a density that has a run, and one of all."""
    made = []
    for inner, label in INNER.items():
        there = [row for row in rows if row.inner == inner]
        if there:
            made.append(
                Drawing(
                    NAMES[inner],
                    _along(there),
                    f"Trained with densities found by {label}: steps of a minimization from the superposition of atoms "
                    "(mean of the molecules), the least and the largest eigenvalue of their Hessians, along training; "
                    "a line a seed.",
                )
            )
    if rows:
        made.append(
            Drawing(
                "by-eigenvalue",
                _by_eigenvalue(rows),
                "Steps after training (mean of the molecules) over the least eigenvalue then, a point a run: filled by "
                "gradient descent, hollow by L-BFGS with the Hessian of the start; dotted, what they were before. "
                "What was not found within the budget is left out.",
            )
        )
    return made


def _by_eigenvalue(rows: list[Row]) -> Figure:
    figure, (panel,) = axes(1, width=6.4, height=3.9)
    for row in rows:
        colour = COLOURS[list(HELPS).index(row.help) % len(COLOURS)]
        for number, (seed, one) in enumerate(row.counted.items()):
            least = min(found.least for found in row.results[seed].train)
            named = HELPS[row.help].label if not number and row.inner == rows[0].inner else None
            for after, face in ((one.descent_after, colour), (one.l_bfgs_after, "none")):
                label = named if face == colour else None
                panel.scatter(least, steps(after), s=26, facecolor=face, edgecolor=colour, label=label)
    first = next(iter(rows[0].counted.values()))
    for before in (first.descent_before, first.l_bfgs_before):
        panel.axhline(steps(before), color="0.6", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="least eigenvalue, hartree", ylabel="steps")
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _along(rows: list[Row]) -> Figure:
    figure, panels = axes(3, width=4.0, height=3.6)
    for place, row in enumerate(rows):
        colour = COLOURS[list(HELPS).index(row.help) % len(COLOURS)]
        for number, one in enumerate(row.results.values()):
            looks = measured(one)
            for panel, what in zip(panels, ("mean_steps", "least", "largest"), strict=True):
                panel.plot(
                    [look.iteration for look, _ in looks],
                    [_figure(found, what) for _, found in looks],
                    color=colour,
                    linestyle=LINES[number % len(LINES)],
                    marker="o",
                    markersize=2.5,
                    linewidth=1.0 + 0.45 * (len(rows) - 1 - place),  # rows that coincide are all to be seen
                    label=None if number else HELPS[row.help].label,
                )
    for panel, label in zip(panels, ("steps", "least eigenvalue, hartree", "largest, hartree"), strict=True):
        panel.set(xlabel="iteration", title=label)
    for panel in panels:
        low, high = panel.dataLim.y0, panel.dataLim.y1
        if low > 0 and high < 10 * low:
            panel.set_ylim(0, 1.1 * high)
        else:
            panel.set_yscale("symlog", linthresh=max(1e-2, 1e-4 * high))
    panels[-1].legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _figure(found: Summary, what: str) -> float:
    value: float = getattr(found, what)
    return value
