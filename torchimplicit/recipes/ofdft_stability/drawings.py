"""The figures of the table."""

from __future__ import annotations

from matplotlib.figure import Figure

from torchimplicit.recipes.ofdft_runs import measured
from torchimplicit.recipes.ofdft_stability.rows import HELPS, INNER, Row
from torchimplicit.recipes.orbital_free.measure import Summary
from torchimplicit.recipes.plotting import COLOURS, LINES, axes
from torchimplicit.recipes.reproduce.runner import Drawing

NAMES = {"descent": "by-descent", "l-bfgs": "by-l-bfgs"}


def drawings(rows: list[Row]) -> list[Drawing]:
    """One for each way to find a density that has a run."""
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
    return made


def _along(rows: list[Row]) -> Figure:
    figure, panels = axes(3, width=4.0, height=3.6)
    for row in rows:
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
                    linewidth=1.2,
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
